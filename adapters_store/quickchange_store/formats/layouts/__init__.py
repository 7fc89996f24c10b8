"""Layouts of trainers that name or order an adapter's tensors in their own way."""
