"""The API process's side of the pipe: one engine, supervised, and what is in flight with it."""
