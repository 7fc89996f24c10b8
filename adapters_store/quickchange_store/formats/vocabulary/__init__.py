"""Tokens and texts: adapters of other vocabularies than the base, and tokenizers in folders."""
