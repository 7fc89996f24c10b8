"""Checks and measurements that need a GPU, in one run of minutes."""
