"""The client of engines, and the two kinds of them: of this machine, and replicas elsewhere."""
