"""Several machines: the API and the engine as two deployments of Ray Serve."""
