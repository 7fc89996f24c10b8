"""Speculative decoding: what is drafted, what drafts cost and bring, and their verification."""
