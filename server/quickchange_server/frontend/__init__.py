"""Requests and their text, without HTTP: admission, tokenizer, generation, detokenizer."""
