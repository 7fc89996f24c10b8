"""Which rows run next: sequences, their blocks and states, fairness, and the plan of a step."""
