"""Training of Turbo heads on what the model itself says."""
