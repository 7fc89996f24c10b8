"""Names by which metrics, logs and spans tell adapters and requests."""
