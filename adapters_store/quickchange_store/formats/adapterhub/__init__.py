"""AdapterHub's bottleneck adapters."""
