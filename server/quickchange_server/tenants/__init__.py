"""Who may use the server and how much: API keys, their limits, and usage for billing."""
