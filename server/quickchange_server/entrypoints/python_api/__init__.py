"""Parts of the Python API: what a call is given, and what it answers."""
