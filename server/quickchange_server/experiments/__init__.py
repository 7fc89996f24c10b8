"""A/B testing: which variant a request gets, and what the variants came to."""
