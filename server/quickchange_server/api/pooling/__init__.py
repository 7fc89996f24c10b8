"""Routes that answer with vectors, scores and classes."""
