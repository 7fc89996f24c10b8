"""Recordings: served requests that a tenant has had kept, as token ids, to train heads on."""
