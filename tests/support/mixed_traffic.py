"""Requests of every kind, as hypothesis draws them, and adapters of every rank for any model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from engine_driver import request
from hypothesis import strategies as st
from turbo_adapters import make_turbo

from quickchange_server.model.loading.model_loader import LoadedModel
from quickchange_server.protocol import Constraint, Drafting, Submit
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

RANKS = (8, 16, 64, 128)
HEADS = {  # by name: arguments of make_turbo
    "parallel": {"depth": 3},
    "sequential": {"depth": 2, "sequential": True},
    "deep": {"depth": 2, "blocks_a_head": 2, "vocabulary": range(0, 40, 3)},
    "own": {"depth": 2, "own_outputs": 48},
    "odd": {"depth": 2, "own_outputs": 33, "vocabulary": range(33)},
}
_FILTERS = {"top_k": 3, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.7}
_WEIGHTS = st.sampled_from([1.0, -0.5])
_PENALTIES = {"frequency_penalty": 0.5, "presence_penalty": 0.2, "repetition_penalty": 1.3}


@dataclass(frozen=True)
class TrafficLimits:
    """Bounds of what is drawn."""

    prompt: int
    vocabulary: int
    adapters: bool = True
    constraints: bool = False


def adapter_for(model: LoadedModel, digest: str) -> CanonicalAdapter:
    """The adapter that a digest names: "lora-16-a", "experts-8-a", or heads by their name.

    All numbers are zero, and shared between updates of one shape.
    """
    kind, _, rest = digest.partition("-")
    if kind in HEADS:
        turbo = make_turbo(model.hidden, **HEADS[kind])  # type: ignore[arg-type]
        return CanonicalAdapter("Any", "any", {}, turbo=turbo)
    rank = int(rest.partition("-")[0])
    wanted = ("expert",) if kind == "experts" else ("linear",)
    updates = {
        member.path: LowRankUpdate(
            torch.zeros(rank, group.in_features), torch.zeros(member.width, rank), 1.0
        )
        for group in model.groups
        if group.kind in wanted and group.source == "input"
        for member in group.members
    }
    return CanonicalAdapter("Any", "any", updates)


@st.composite
def requests(draw: st.DrawFn, limits: TrafficLimits, name: str) -> Submit:
    """A request of any kind."""
    length = draw(st.one_of(st.integers(1, 40), st.integers(1, limits.prompt)))
    prompt = [(7 * place + length) % limits.vocabulary for place in range(length)]
    rank = st.sampled_from(RANKS)
    labels = draw(st.sampled_from(["", "", "a", "b", "ab"])) if limits.adapters else ""
    adapters = [(f"lora-{draw(rank)}-{label}", draw(_WEIGHTS)) for label in labels]
    read = draw(st.sampled_from([None] * 6 + ["logprobs", "last", "mean"]))
    if read in ("last", "mean"):
        return request(name, prompt, adapters, pooling=read)  # type: ignore[arg-type]
    sampling: dict[str, object] = {"temperature": draw(st.sampled_from([0.0, 0.7]))}
    for options in (_FILTERS, _PENALTIES):
        for key in draw(st.sets(st.sampled_from(sorted(options)), max_size=len(options))):
            sampling[key] = options[key]
    if draw(st.booleans()):
        sampling["logit_bias"] = {1: 2.0, 5: -1.0}
    sampling["logprobs"] = draw(st.sampled_from([None, None, 0, 2, 20]))
    if read == "logprobs":
        sampling["prompt_logprobs"] = draw(st.sampled_from([0, 3]))
    asked = request(name, prompt, adapters, max_tokens=draw(st.integers(1, 12)), **sampling)
    lookup, heads = draw(st.booleans()), None
    if limits.adapters:
        heads = draw(st.sampled_from([None, None, *HEADS]))
    if lookup or heads is not None:
        asked = replace(asked, drafting=Drafting(heads=heads, lookup=lookup))
    if limits.constraints and draw(st.integers(0, 4)) == 0:
        asked = replace(asked, constraint=Constraint("regex", "[a-z]{1,9}"))
    return asked


@st.composite
def traffic(draw: st.DrawFn, limits: TrafficLimits) -> list[tuple[Submit, int]]:
    """Requests in order of arrival, each with the steps that pass until the next one comes."""
    count = draw(st.integers(1, 12))
    pause = st.integers(0, 4)
    return [(draw(requests(limits, f"{place}")), draw(pause)) for place in range(count)]


_number = itertools.count()


def renamed(arrivals: Sequence[tuple[Submit, int]]) -> Iterator[tuple[Submit, int]]:
    """The same with ids that no engine has met."""
    for submit, pause in arrivals:
        yield replace(submit, request_id=f"{next(_number)}"), pause
