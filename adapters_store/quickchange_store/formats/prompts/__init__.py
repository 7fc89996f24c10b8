"""PEFT adapters that are a prompt of trained numbers in front of every text."""
