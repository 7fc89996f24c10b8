"""One sequence being generated: its tokens, its KV blocks and how far they are computed.

What some requests read of their own prompt: its tokens' log-probabilities, or an embedding.

Rows are read in order and each once, also where the prompt is computed in chunks, or anew after a
preemption. Knows nothing of devices.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quickchange_server.engine.kv_cache_manager import block_key
from quickchange_server.protocol import (
    Component,
    Drafting,
    FinishReason,
    Pooling,
    Submit,
    TokenLogprobs,
)
from quickchange_server.spec_decode.prompt_lookup import PromptLookup, WordLookup
from quickchange_server.spec_decode.step_view import HeadDrafts
from quickchange_server.structured_output.compiler import Matcher

Doubles = npt.NDArray[np.float64]


class Reading:
    """One request's. Row i is that of the prompt's token i, whose logits judge token i + 1."""

    def __init__(self, length: int, top: int | None, pooling: Pooling | None) -> None:
        """length: of the prompt, in tokens. top: log-probabilities are read, with so many of the
        best tokens; None: an embedding is, by `pooling`."""
        self.top = top
        self.done = length - 1 if pooling == "last" else 0  # rows before it need no reading
        self._end = length if top is None else length - 1
        self._pooled = self._end - self.done
        self.sound = True  # whether all that was read is finite
        self._scores: list[TokenLogprobs] = []
        self._sum: Doubles | None = None

    @classmethod
    def of(cls, submit: Submit) -> Reading | None:
        """What a submission still reads: one with output has told its prompt's before."""
        if submit.pooling is not None:
            return cls(len(submit.prompt), None, submit.pooling)
        if submit.sampling.prompt_logprobs is None or submit.output:
            return None
        return cls(len(submit.prompt), submit.sampling.prompt_logprobs, None)

    @property
    def complete(self) -> bool:
        return self.done >= self._end

    @property
    def scores(self) -> tuple[TokenLogprobs, ...]:
        """Of the prompt's tokens but the first, as far as read."""
        return tuple(self._scores)

    @property
    def embedding(self) -> bytes | None:
        """float32 little-endian [H], once complete; None where log-probabilities are read."""
        if self._sum is None or not self.complete:
            return None
        return (self._sum / self._pooled).astype("<f4").tobytes()

    def rows(self, first: int, count: int) -> range:
        """Which of the rows [first, first + count) are to be read now."""
        return range(max(first, self.done), min(first + count, self._end))

    def add_scores(self, scores: Seq[TokenLogprobs]) -> None:
        """Those of the next rows."""
        self.sound &= all(math.isfinite(score.logprob) for score in scores)
        self._scores += scores
        self.done += len(scores)

    def add_states(self, total: Doubles, rows: int) -> None:
        """The sum [H] of the next rows' hidden states."""
        self.sound &= bool(np.isfinite(total).all())
        self._sum = total if self._sum is None else self._sum + total
        self.done += rows


def composition_key(adapters: Seq[Component], salt: str = "") -> bytes:
    """Content key of Σ weightᵢ · adapterᵢ: equal for equal compositions, whatever their names.

    Under different salts equal compositions have different keys. So cached blocks are not shared
    between salts, admission is fair over them, and what is learned of drafts is not told by one to
    another: whoever has a salt of its own can't be slowed, sped up or watched through these.
    """
    secret = hashlib.blake2b(salt.encode(), digest_size=32).digest() if salt else b""
    digest = hashlib.blake2b(digest_size=16, key=secret)
    for component in sorted(adapters, key=lambda c: (c.digest, c.weight)):
        digest.update(component.digest.encode() + struct.pack("<d", component.weight))
    return digest.digest()


@dataclass(eq=False)
class Sequence:
    """A request in the engine. `tokens` is prompt and output; everything else follows from it."""

    request: Submit
    arrival: float  # seconds, monotonic
    # What follows from the request.
    request_id: str = field(init=False)  # read many times a step: a property would be a call each
    tokens: list[int] = field(init=False)
    key: bytes = field(init=False)  # of its composition and salt
    reading: Reading | None = field(init=False)  # what is read of its prompt's rows
    generates: bool = field(init=False)  # False: it ends when its prompt is computed
    drafting: Drafting | None = field(init=False)
    digests: list[str] = field(init=False)  # of all adapter versions that it needs on the device
    # How far it has come.
    head_drafts: HeadDrafts | None = None  # those made last
    lookup: PromptLookup | None = None  # over `tokens`, where drafting asks for it
    words: WordLookup | None = None  # the same by text, where the engine has a tokenizer
    matcher: Matcher | None = None  # where its text is constrained
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as needed
    computed: int = 0  # leading tokens whose keys and values are in `blocks`
    committed: int = 0  # leading blocks offered to the prefix cache
    first_scheduled: float | None = None
    cached_tokens: int | None = None  # found in the prefix cache at first admission
    told: bool = False  # whether a delta of it has left the engine

    def __post_init__(self) -> None:
        request = self.request
        self.request_id = request.request_id
        self.tokens = [*request.prompt, *request.output]
        self.key = composition_key(request.adapters, request.salt)
        self.reading = Reading.of(request)
        # A request for its prompt's log-probabilities alone has no new token.
        more = self.reading is None or request.sampling.token_limit > 0
        self.generates = request.pooling is None and more
        # Drafts buy speed with rows: nobody waits for a background request, who could use them.
        self.drafting = request.drafting if self.generates and not request.background else None
        heads = () if self.heads is None else (self.heads,)
        self.digests = list(dict.fromkeys([*(c.digest for c in request.adapters), *heads]))

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def output_length(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def reusable(self) -> int:
        """Leading tokens whose rows need not be computed if their keys and values are known."""
        known = len(self.tokens) - 1  # the last one's hidden state gives the next token
        if self.reading is None or self.reading.complete:
            return known
        return min(known, self.reading.done)

    @property
    def queue_seconds(self) -> float | None:
        """From arrival to its first step."""
        return None if self.first_scheduled is None else self.first_scheduled - self.arrival

    @property
    def heads(self) -> str | None:
        """Digest of the adapter version whose Turbo heads draft for it."""
        return None if self.drafting is None else self.drafting.heads

    def keys_of_full_blocks(self, count: int, block_size: int) -> list[bytes]:
        """Content keys of the first `count` full blocks."""
        while len(self.block_keys) < count:
            index = len(self.block_keys)
            parent = self.block_keys[-1] if index else self.key
            tokens = self.tokens[index * block_size : (index + 1) * block_size]
            self.block_keys.append(block_key(parent, tokens))
        return self.block_keys[:count]

    def take(self, token: int) -> None:
        """The next token of the output."""
        self.tokens.append(token)
        if self.matcher is not None and token not in self.request.sampling.stop_token_ids:
            self.matcher.advance(token)

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Whether it has ended: by its last token, or without any where none is to come."""
        if not self.generates:
            if self.remaining:
                return None
            return "stop" if self.reading is not None and self.reading.top is None else "length"
        sampling, new = self.request.sampling, self.output_length
        if new and self.tokens[-1] in sampling.stop_token_ids:
            return "stop"
        if self.matcher is not None and self.matcher.complete:
            return "stop"  # before min_tokens, too: nothing else may follow
        if new >= sampling.token_limit or len(self.tokens) >= max_model_len:
            return "length"
        return None
