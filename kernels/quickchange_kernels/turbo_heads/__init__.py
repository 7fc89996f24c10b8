"""Turbo heads and the logits over their draft vocabularies."""
