"""Load on a running server: clients, workloads, server processes and their resource use."""
