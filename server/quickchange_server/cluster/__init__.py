"""Engines and ingresses on many machines, as an application of Ray Serve (the extra `ray`)."""
