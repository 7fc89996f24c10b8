"""Training of Turbo heads on the model's own outputs."""
