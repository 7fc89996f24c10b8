"""HTTP surfaces, one router each, and what they share: callers, errors, streams."""
