"""Where a process begins: an engine in this process, and the public Python API on it."""
