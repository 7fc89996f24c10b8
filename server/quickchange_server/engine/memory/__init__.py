"""What takes memory: caches, the adapters' arena, and how a device's memory is divided."""
