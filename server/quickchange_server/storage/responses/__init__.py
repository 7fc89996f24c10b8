"""Stored responses of /v1/responses: kept for a time, within a bound, for their owner alone."""
