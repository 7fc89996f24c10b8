"""Training of adapters of every kind, and the formats they are saved in."""
