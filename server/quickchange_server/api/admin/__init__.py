"""Administration over HTTP: adapters, experiments, API keys, usage."""
