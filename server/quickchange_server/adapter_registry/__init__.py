"""From names to digests: what `model` and `adapters` mean, and how adapters are added."""
