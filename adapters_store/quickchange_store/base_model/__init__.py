"""Facts about a base model that adapters are checked against: shapes, weights, sub-layers."""
