"""The API process's side of the pipe: the engine's client, its supervision and restarts."""
