"""AdapterHub directories: bottleneck adapters."""
