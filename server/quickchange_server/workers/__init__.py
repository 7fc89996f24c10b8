"""Child processes for what the API process does without: torch and transformers."""
