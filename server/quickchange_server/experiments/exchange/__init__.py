"""Experiments in the terms of gateways."""
