"""Everything that a GPU is needed for, in one run of minutes."""
