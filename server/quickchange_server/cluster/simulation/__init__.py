"""Plans for many replicas: traffic replayed on models of routing, residency and steps."""
