"""Admission of requests to the engine: limits, seeds, constraints, observers.

All HTTP surfaces admit requests here, with adapters by digest. Knows nothing of HTTP, bodies, the
look-up of names or the choice of a variant.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from quickchange_server.engine_client.client import EngineClient
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.adapter_spans import Invocations, activated
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.context_length import check_fits, room
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.output_processor import Transcript
from quickchange_server.frontend.request_observers import (
    Account,
    Assignment,
    Bookkeeper,
    Opened,
    TokenRecorder,
)
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Component, Submit
from quickchange_server.structured_output.validator import Asked, ConstraintChecks

MAX_SEQUENCES = 2_048  # of one request
FEW_BEST = 32  # tokens at one position, which are told of as many positions as there are
MOST_BEST = 2**21  # of one request where it asks for more: 42 positions of 49,152 tokens
SEED_BITS = 63
SEED_BYTES = 8
_MARK = re.compile(r"<\[(\d{1,9})\]>")  # a token by its id, in Lark's syntax


class Seeds:
    """Seeds for requests without one. With a `seed` their sequence is repeatable."""

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(seed) if seed is not None else secrets.SystemRandom()

    def draw(self) -> int:
        return self._random.getrandbits(SEED_BITS)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a choice (from 0): the request's for the first, else derived from it."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:SEED_BYTES], "little")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request to admit: what to generate, for whom, and who observes it.

    `submit` is the template of each choice's submit, with the request's id and the client's
    sampling parameters; the admission sets prompt, seed and constraint.
    """

    submit: Submit
    caller: Caller
    model: str  # the client's own name for it
    label: str  # the adapters' label in metrics
    prompts: Sequence[Sequence[int]]
    prompt_param: str  # the body's field that holds the prompts
    candidates: int = 1  # choices generated for each prompt
    default_tokens: int | None = None  # if the sampling has no max_tokens; None: all that fit
    constraint: Asked | None = None
    shown: frozenset[int] = frozenset()  # special tokens that are text in any case
    scored_alike: bool = False  # prompt log-probabilities for all choices, not the first alone
    drafter: str | None = None  # name of the adapter whose heads draft
    invocations: Invocations = field(default_factory=dict)  # of the submit's activated adapters
    derive: Callable[[], Awaitable[str]] | None = None  # merges the adapters into one; its digest
    assignment: Assignment | None = None
    user: str | None = None  # the body's field
    traceparent: str | None = None
    http_id: str = ""
    streamed: bool = False
    observers: Sequence[Bookkeeper] = ()
    text: Text | None = None  # under its adapters; None: the base's


class RequestAdmission:
    """Admits requests to one engine."""

    def __init__(
        self,
        client: EngineClient,
        text: Text,
        constraints: ConstraintChecks,
        seeds: Seeds,
        recorder: TokenRecorder,
    ) -> None:
        self._client = client
        self._recorder = recorder
        self._text = text
        self._constraints = constraints
        self._seeds = seeds

    async def admit(self, wanted: Wanted) -> Generation:
        """Start the generation of a request's choices, in the order of its prompts.

        If `submit` has a pooling, the engine makes embeddings instead, of prompts that may fill the
        context. Raises InvalidRequestError, ContextLengthError, RateLimitedError, QueueFullError or
        UnavailableError, and what `derive` raises; then nothing runs.
        """
        self._check_count(wanted)
        submits = self._submits(await self._constrained(wanted))
        opened = _opened(wanted, submits)
        account = await Account.open(opened, wanted.observers)
        try:
            if wanted.derive is not None:
                submits = await self._derived(wanted, wanted.derive, submits)
            stream = self._client.generate(submits, label=wanted.label, drafter=wanted.drafter)
        except asyncio.CancelledError:
            account.end("cancelled")
            raise
        except BaseException:
            account.end("refused")
            raise
        text = wanted.text or self._text
        transcripts = [Transcript(text, submit.sampling, wanted.shown) for submit in submits]
        record = self._recorder.begin(opened, submits[0])
        return Generation(stream, transcripts, account, wanted.candidates, record)

    def _check_count(self, wanted: Wanted) -> None:
        count = len(wanted.prompts) * wanted.candidates
        if count > MAX_SEQUENCES:
            param = wanted.prompt_param if wanted.candidates == 1 else "n"
            raise InvalidRequestError(
                f"{param}: {count} sequences in one request, of {MAX_SEQUENCES} at most; send "
                "fewer prompts or a smaller n",
                param=param,
            )

    async def _constrained(self, wanted: Wanted) -> Wanted:
        if wanted.constraint is None:
            return wanted
        if wanted.text is not None and wanted.text is not self._text:
            self._check_marks(wanted.constraint)
        constraint = await self._constraints.accept(wanted.constraint)
        return replace(wanted, submit=replace(wanted.submit, constraint=constraint))

    def _check_marks(self, asked: Asked) -> None:
        """Raise InvalidRequestError for a constraint that needs an adapter's own tokens: grammars
        are made of the base's."""
        constraint = asked.constraint
        marks = map(int, _MARK.findall(constraint.before + constraint.source))
        if any(mark >= self._text.vocab_size for mark in marks):
            raise InvalidRequestError(
                f"{asked.place}: the adapter writes this with tokens of its own, which no "
                "constraint can ask for; leave the choice to the model, and the schema out",
                param=asked.place,
            )

    def _submits(self, wanted: Wanted) -> list[Submit]:
        """One submit per choice."""
        asked = wanted.submit.sampling
        text = wanted.text or self._text
        seed = self._seeds.draw() if asked.seed is None else asked.seed % 2**64
        submits: list[Submit] = []
        for prompt in wanted.prompts:
            text.check_ids(prompt, wanted.prompt_param)  # whatever form it came in
            new_tokens = self._new_tokens(wanted, len(prompt))
            sampling = asked.resolved(
                max_tokens=new_tokens,
                eos_ids=text.eos_ids,
                vocab_size=text.vocab_size,
            )
            ids = tuple(prompt)
            adapters = activated(wanted.submit.adapters, wanted.invocations, ids)
            for choice in range(wanted.candidates):
                scored = choice == 0 or wanted.scored_alike
                submit = replace(
                    wanted.submit,
                    request_id=f"{wanted.submit.request_id}-{len(submits)}",
                    prompt=ids,
                    adapters=adapters,
                    sampling=sampling if scored else replace(sampling, prompt_logprobs=None),
                    seed=choice_seed(seed, choice),
                )
                submits.append(submit)
        _check_told(submits)
        return submits

    def _new_tokens(self, wanted: Wanted, prompt_tokens: int) -> int:
        """Limit of new tokens for a prompt. Raises if it, or the wanted tokens, don't fit."""
        limit, virtual = self._client.engine.max_model_len, wanted.submit.virtual_tokens
        if wanted.submit.pooling is not None:
            check_fits(limit, prompt_tokens, wanted.prompt_param, virtual)
            return 0
        sampling = wanted.submit.sampling
        left = room(limit, prompt_tokens, sampling.max_tokens, wanted.prompt_param, virtual)
        if sampling.max_tokens is not None:
            return sampling.max_tokens
        limits = (left, wanted.default_tokens, _share(wanted))
        most = min(limit for limit in limits if limit is not None)
        if sampling.min_tokens > most:
            raise InvalidRequestError(
                f"min_tokens: {sampling.min_tokens} exceeds max_tokens, {most} by default; "
                "lower it, or set max_tokens",
                param="min_tokens",
            )
        return most

    async def _derived(
        self, wanted: Wanted, derive: Callable[[], Awaitable[str]], submits: Sequence[Submit]
    ) -> list[Submit]:
        """The submits with the merged adapter, which is not made if the queue is full."""
        self._client.check_room(len(submits))
        digest = await derive()
        # Only adapters of one invocation are merged, and the result has it.
        common = list(wanted.invocations.values())[:1]
        invocations = dict(zip([digest], common, strict=False))
        merged = (Component(digest),)
        return [
            replace(submit, adapters=activated(merged, invocations, submit.prompt))
            for submit in submits
        ]


def _opened(wanted: Wanted, submits: Sequence[Submit]) -> Opened:
    return Opened(
        request_id=wanted.submit.request_id,
        caller=wanted.caller,
        model=wanted.model,
        label=wanted.label,
        prompt_tokens=sum(map(len, wanted.prompts)),
        max_tokens=sum(submit.sampling.token_limit for submit in submits),
        choices=len(submits),
        at=time.time(),
        assignment=wanted.assignment,
        user=wanted.user,
        traceparent=wanted.traceparent,
        http_id=wanted.http_id,
        digests=tuple({component.digest: None for component in wanted.submit.adapters}),
        sampling=None if wanted.submit.pooling else wanted.submit.sampling,
        streamed=wanted.streamed,
    )


def _check_told(submits: Sequence[Submit]) -> None:
    """Raise for log-probabilities of so many tokens that they would not fit in memory."""
    for name in ("logprobs", "prompt_logprobs"):
        total = 0
        for submit in submits:
            best = getattr(submit.sampling, name) or 0
            of_prompt = name == "prompt_logprobs"
            positions = len(submit.prompt) if of_prompt else submit.sampling.token_limit
            total += best * positions if best > FEW_BEST else 0
        if total > MOST_BEST:
            shorter = "shorten the prompt" if of_prompt else "lower max_tokens"
            raise InvalidRequestError(
                f"{name}: {total} log-probabilities in one answer, of {MOST_BEST} at most; ask "
                f"for those of fewer tokens, or {shorter}",
                param=name,
            )


def _share(wanted: Wanted) -> int | None:
    """The caller's limit of new tokens, divided among all choices; None: no limit."""
    limit = wanted.caller.max_new_tokens
    if limit is None:
        return None
    return max(1, limit // (len(wanted.prompts) * wanted.candidates))
