"""Checks of prompt lengths against the model's context length, in tokens.

Knows nothing of requests: `param` is the prompt's name in error messages. `virtual`: tokens that
an adapter puts in front of the prompt, which take their part of the context.
"""

from __future__ import annotations

from quickchange_server.errors import ContextLengthError, InvalidRequestError

CONTEXTS = 4  # so many context lengths are read of a text that is only counted, or is cut


def check_fits(limit: int, tokens: int, param: str, virtual: int = 0) -> None:
    """Check a prompt that nothing is generated for.

    Raises InvalidRequestError if it is empty, ContextLengthError if it exceeds `limit`.
    """
    if tokens == 0:
        raise InvalidRequestError(f"{param}: has no tokens; give a text", param=param)
    if tokens + virtual > limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens{_taken(virtual)}, and {param} "
            f"has {tokens}; shorten it",
            param=param,
        )


def room(limit: int, tokens: int, wanted: int | None, param: str, virtual: int = 0) -> int:
    """Number of tokens that fit behind a prompt.

    Raises InvalidRequestError if it is empty, ContextLengthError if it, or it and `wanted` new
    tokens, exceed `limit`.
    """
    if tokens == 0:
        raise InvalidRequestError(f"{param}: has no tokens; give a prompt", param=param)
    context = f"{limit} tokens{_taken(virtual)}"
    limit -= virtual
    if tokens >= limit:
        raise ContextLengthError(
            f"this model's maximum context length is {context}, and the prompt has "
            f"{tokens}, which leaves no room for an answer; shorten {param}",
            param=param,
        )
    if wanted is not None and tokens + wanted > limit:
        raise ContextLengthError(
            f"this model's maximum context length is {context}, and you asked for "
            f"{tokens + wanted} ({tokens} in {param}, {wanted} to generate); "
            f"shorten {param} or lower max_tokens to {limit - tokens}",
            param=param,
        )
    return limit - tokens


def _taken(virtual: int) -> str:
    return f", of which the adapter's virtual tokens take {virtual}" if virtual else ""
