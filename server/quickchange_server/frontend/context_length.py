"""Prompts against the model's context: what fits, and the refusal of what does not.

Lengths in tokens. Knows nothing of requests: `param` is what the caller calls the prompt.
"""

from __future__ import annotations

from quickchange_server.errors import ContextLengthError, InvalidRequestError


def check_fits(limit: int, tokens: int, param: str) -> None:
    """Raises where a prompt that is only read is empty or exceeds the context, `limit`."""
    if tokens == 0:
        raise InvalidRequestError(f"{param}: has no tokens; give a text", param=param)
    if tokens > limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and {param} has {tokens}; "
            "shorten it",
            param=param,
        )


def room(limit: int, tokens: int, wanted: int | None, param: str) -> int:
    """Tokens that fit behind a prompt. Raises where it, or it with `wanted` more, is too long."""
    if tokens == 0:
        raise InvalidRequestError(f"{param}: has no tokens; give a prompt", param=param)
    if tokens >= limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and the prompt has "
            f"{tokens}, which leaves no room for an answer; shorten {param}",
            param=param,
        )
    if wanted is not None and tokens + wanted > limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and you asked for "
            f"{tokens + wanted} ({tokens} in {param}, {wanted} to generate); "
            f"shorten {param} or lower max_tokens to {limit - tokens}",
            param=param,
        )
    return limit - tokens
