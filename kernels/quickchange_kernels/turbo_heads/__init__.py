"""Draft heads of Turbo adapters, and the logits over their draft vocabularies."""
