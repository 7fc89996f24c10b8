"""Random base models and adapters for load tests."""
