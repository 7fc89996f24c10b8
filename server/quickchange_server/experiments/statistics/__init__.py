"""Statistical analysis of experiments: intervals, differences and decisions, from sums alone."""
