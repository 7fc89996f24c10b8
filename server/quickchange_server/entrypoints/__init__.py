"""Entry points of processes: the HTTP server, the engine process, and the Python API."""
