"""A/B testing: assignment of requests to variants, and comparison of the variants' outcomes."""
