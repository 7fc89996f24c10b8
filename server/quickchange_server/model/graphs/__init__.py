"""Forward passes captured once and run again: CUDA graphs on a GPU, recorded steps on a CPU."""
