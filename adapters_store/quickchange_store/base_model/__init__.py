"""What the store knows of a base model: shapes, weights by name, sub-layers."""
