"""Evaluation of adapters on a task: answers by the engine, scores, report."""
