"""Process start: the command `serve`, the HTTP application and the engine in this process."""
