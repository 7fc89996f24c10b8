"""Forward passes captured once and run again: on a GPU by CUDA graphs, on a CPU by recorded steps."""
