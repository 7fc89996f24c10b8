"""Evaluation of adapters on a task: answers by the engine, scores, and their report."""
