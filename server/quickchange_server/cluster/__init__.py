"""Everything that imports Ray: the cluster's deployments, and the engine inside `ray.serve.llm`."""
