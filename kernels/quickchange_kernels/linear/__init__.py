"""Linear layers of few rows: float weights and int8 weights."""
