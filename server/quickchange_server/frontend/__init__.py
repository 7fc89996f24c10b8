"""From a client's request to the engine's and back to text. No HTTP, no tensors."""
