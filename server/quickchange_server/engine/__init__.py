"""The engine process: scheduling, KV cache, sampling, the step loop. No HTTP, no text."""
