"""Engines elsewhere: replicas that are reached by calls."""
