"""The engine of this machine: its process, its supervision, and recovery from its crashes."""
