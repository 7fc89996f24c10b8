"""Load on a running server: clients, workloads, server processes and what they use."""
