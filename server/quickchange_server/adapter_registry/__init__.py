"""From names to digests: what a request's `model` and `adapters` mean, and how adapters are added."""
