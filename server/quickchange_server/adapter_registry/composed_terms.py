"""Sums of adapter versions: their terms, and what these ask of a request together.

A version is a term itself, or stands for its composition's terms. Names are resolved elsewhere
(`resolver.py`); HTTP and the engine are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.adapter_spans import Invocations, summed
from quickchange_server.frontend.request_base import MAX_COMPONENTS, WeightedAdapter
from quickchange_server.protocol import Component
from quickchange_store.canonical.composition_part import Term
from quickchange_store.index import Version
from quickchange_store.info import AdapterInfo, VocabularyInfo

LEAST_WEIGHT = 0.01  # of an adapter whose model had fewer tokens than the base
InfoOf = Callable[[str], AdapterInfo]  # of a version, by its digest


@dataclass(frozen=True, slots=True)
class WeightedName:
    """One entry of a request's `adapters`, for tokens at positions [begin, end) of the text."""

    name: str
    weight: float = 1.0
    begin: int = 0
    end: int | None = None  # None: to the end of the text


@dataclass(frozen=True, slots=True)
class ComposedTerms:
    """The terms of a sum, with what requests under it must know."""

    components: tuple[Component, ...]  # sorted by digest; empty: the plain base
    classifiers: frozenset[str]  # digests of those that classify
    invocations: Invocations  # of those that are activated
    tokenizer: tuple[str, VocabularyInfo] | None  # whose it is, by digest; None: the base's


def weighted_names(entries: Iterable[WeightedAdapter]) -> list[WeightedName]:
    """The entries of a body's composition."""
    return [WeightedName(entry.id, entry.weight, entry.begin, entry.end) for entry in entries]


def composed_terms(parts: Sequence[tuple[Version, WeightedName]], info_of: InfoOf) -> ComposedTerms:
    """The sum of versions, each as it was named.

    Raises InvalidRequestError if a weight is not finite, if there are too many terms, and where
    virtual tokens or tokenizers can't be composed.
    """
    versions = [version for version, _ in parts]
    terms = [term for version, named in parts for term in _terms(version, named, info_of)]
    if len(terms) > MAX_COMPONENTS:
        raise InvalidRequestError(
            f"adapters: with the terms of named compositions {len(terms)} adapters, where "
            f"{MAX_COMPONENTS} is the most in one composition; name fewer",
            param="adapters",
        )
    components = _with_virtual_tokens(summed(terms), versions, info_of)
    if not all(math.isfinite(component.weight) for component in components):
        raise InvalidRequestError(
            "adapters: the weights of one adapter add up to infinity; give smaller weights",
            param="adapters",
        )
    _check_fewer_tokens(components, info_of)
    used = {component.digest for component in components}
    needed = {digest for version in versions for digest in version.needs}
    invoked = {version.digest for version in versions if version.invoked} | {
        digest for digest in needed if info_of(digest).invocation
    }
    return ComposedTerms(
        components,
        classifiers=frozenset(used & {v.digest for v in versions if v.classifier}),
        invocations={digest: info_of(digest).invocation for digest in sorted(used & invoked)},
        tokenizer=_tokenizer(used, versions, info_of),
    )


def _terms(version: Version, named: WeightedName, info_of: InfoOf) -> list[Component]:
    """What a version adds to the model where it is named: itself, or its composition's terms in
    the positions that both are for."""
    terms = info_of(version.digest).composition if version.needs else (Term(version.digest),)
    found = (term.within(named.weight, named.begin, named.end) for term in terms)
    return [Component(t.digest, t.weight, t.begin, t.end) for t in found if t is not None]


def _with_virtual_tokens(
    components: Sequence[Component], versions: Sequence[Version], info_of: InfoOf
) -> tuple[Component, ...]:
    virtual = {version.digest: version.virtual_tokens for version in versions}
    for needed in {digest for version in versions for digest in version.needs}:
        prompt = info_of(needed).prompt
        virtual[needed] = 0 if prompt is None else prompt.tokens
    told = tuple(replace(c, virtual_tokens=virtual[c.digest]) for c in components)
    _check_prompts(told, {version.digest: str(version) for version in versions})
    return told


def _check_prompts(components: Sequence[Component], names: Mapping[str, str]) -> None:
    """Raise unless at most one has virtual tokens, at the weight 1 in all of the text."""
    served = [component for component in components if component.virtual_tokens]
    if len({component.digest for component in served}) > 1:
        told = sorted(names.get(component.digest, component.digest[:12]) for component in served)
        raise InvalidRequestError(
            f"adapters: {' and '.join(told)} have virtual tokens (prompt or prefix "
            "tuning), and a text has one front; name one of them",
            param="adapters",
        )
    for component in served:
        if (component.weight, component.begin, component.end) != (1.0, 0, None):
            name = names.get(component.digest, component.digest[:12])
            raise InvalidRequestError(
                f"adapters: {name} has virtual tokens (prompt or prefix tuning), which are there "
                f"or not: its weight is {component.weight:g}, from {component.begin} to "
                f"{component.end or 'the end'}; give 1, and no begin or end",
                param="adapters",
            )


def _check_fewer_tokens(components: Sequence[Component], info_of: InfoOf) -> None:
    """Raise for a weight that would not keep away tokens that an adapter's model lacks: its update
    has a bias against them."""
    for component in components:
        if component.weight >= LEAST_WEIGHT:
            continue
        info = info_of(component.digest)
        changes, own = info.tokenizer, info.base_vocabulary
        if changes is not None and own is not None and changes.rows < own:
            raise InvalidRequestError(
                f"adapters: {component.digest[:12]} was trained with {changes.rows} of the base's "
                f"{own} tokens, and its weight is {component.weight:g}; give at least "
                f"{LEAST_WEIGHT:g}",
                param="adapters",
            )


def _tokenizer(
    used: Iterable[str], versions: Iterable[Version], info_of: InfoOf
) -> tuple[str, VocabularyInfo] | None:
    """The version whose tokenizer a request is served with. Raises for two that differ."""
    if not any(version.tokenizer or version.needs for version in versions):
        return None
    infos = ((digest, info_of(digest).tokenizer) for digest in sorted(used))
    found = [(digest, changes) for digest, changes in infos if changes is not None]
    if len({changes.content for _, changes in found}) > 1:
        raise InvalidRequestError(
            "adapters: two of them bring tokens or chat templates that differ, and a request "
            "has one tokenizer; compose adapters of one",
            param="adapters",
        )
    return found[0] if found else None
