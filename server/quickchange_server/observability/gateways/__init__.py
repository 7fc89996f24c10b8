"""Metrics and names that gateways and tracing backends read, as others have named them."""
