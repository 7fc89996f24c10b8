"""Compositions under a name: weighted sums of stored adapters, published as versions of a name.

A term may hold for a span of positions, and may scale single modules: of these a version without a
name is made, whose updates are multiplied, so the sum stays exact. A composition among the terms
gives its own terms. Turbo heads of the terms are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.composition_part import Composition, Term
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.vocabulary.resized_vocabulary import NEVER
from quickchange_store.index import Version
from quickchange_store.info import AdapterInfo
from quickchange_store.names import check_name
from quickchange_store.store import Store


@dataclass(frozen=True, slots=True)
class GivenTerm:
    """A term as its owner gives it. `scales`: factors of modules, by patterns with `*`; the first
    that fits a module's path counts."""

    reference: str
    weight: float = 1.0
    begin: int = 0
    end: int | None = None
    scales: Mapping[str, float] = field(default_factory=dict)


def compose(store: Store, name: str, given: Sequence[GivenTerm]) -> Version:
    """Publish the sum of the terms as the version that `name` serves.

    References mean the versions that they mean now. Raises StoreError: for terms that are not
    there, that generate nothing, for different base models, and for scales that fit no module.
    """
    check_name(name)
    terms: list[Term] = []
    infos: list[AdapterInfo] = []
    for term in given:
        resolved = store.resolve(term.reference)
        info = store.info(resolved.digest)
        _check(term.reference, info, infos[0] if infos else info)
        infos.append(info)
        terms += _terms(store, term, resolved.digest)
    _check_prompts(store, terms)
    composition = Composition(tuple(terms))
    first = infos[0]
    source = {"format": "composed", "terms": [_informal(term) for term in given]}
    adapter = CanonicalAdapter(
        first.architecture, first.base_name, {}, source, composition=composition
    )
    return store.add(name, adapter)


def _check(reference: str, info: AdapterInfo, first: AdapterInfo) -> None:
    if info.classifier is not None or not (info.modules or info.composition or info.prompt):
        raise UnsupportedFeatureError(
            "it has a classification head, or nothing that changes the model",
            key=reference,
            remedy="leave it out; an alias binds Turbo heads to a composition",
        )
    sizes = {info.base_hidden, first.base_hidden} - {None}  # not known of what was derived
    if info.architecture != first.architecture or len(sizes) > 1:
        raise BaseMismatchError(
            f"it is for {info.architecture} with a hidden size of {info.base_hidden}, the first "
            f"term for {first.architecture} with {first.base_hidden}",
            key=reference,
            remedy="compose adapters of one base model",
        )


def _check_prompts(store: Store, terms: Sequence[Term]) -> None:
    """Raise unless at most one term has virtual tokens, at the weight 1 and for the whole text."""
    prompts = [term for term in terms if store.info(term.digest).prompt is not None]
    whole = all(term == Term(term.digest) for term in prompts)
    if len(prompts) > 1 or not whole:
        raise UnsupportedFeatureError(
            "virtual tokens (prompt or prefix tuning) stand in front of the text once, at the "
            "weight 1 and for all of it",
            key=prompts[-1].digest,
            remedy="compose one such adapter at most, with no other weight and no span",
        )


def _terms(store: Store, given: GivenTerm, digest: str) -> list[Term]:
    """The terms that one entry stands for."""
    adapter = store.load(digest)
    own = [Term(digest)] if adapter.composition is None else adapter.composition.terms
    if given.scales:
        unused = set(given.scales)
        own = [replace(t, digest=_scaled(store, t.digest, given.scales, unused)) for t in own]
        if unused:
            some = sorted(path for term in own for path in store.load(term.digest).updates)[:2]
            raise InvalidAdapterError(
                f"the adapter {given.reference} updates no module that this scale is the first to "
                f"fit; it updates {', '.join(some)}, …",
                key=min(unused),
                remedy="give a module's path, with * for any part: *.mlp.*",
            )
    found = [term.within(given.weight, given.begin, given.end) for term in own]
    kept = [term for term in found if term is not None]
    if not kept:
        raise InvalidAdapterError(
            f"no term of it serves a position from {given.begin} to {given.end}",
            key=given.reference,
            remedy="give another span, or leave it out",
        )
    return kept


def _scaled(store: Store, digest: str, scales: Mapping[str, float], unused: set[str]) -> str:
    """Digest of the version with scaled modules; patterns that fit leave `unused`."""
    adapter = store.load(digest)
    updates: dict[str, LowRankUpdate] = {}
    for path, update in adapter.updates.items():
        pattern = next((p for p in scales if fnmatchcase(path, p)), None)
        if pattern is None:
            updates[path] = update
            continue
        unused.discard(pattern)
        if scales[pattern] or _keeps_tokens_away(update):
            updates[path] = _times(update, scales[pattern])
    source = {"format": "scaled", "of": digest, "scales": dict(scales)}
    return store.publish(replace(adapter, updates=updates, turbo=None, source=source))


def _keeps_tokens_away(update: LowRankUpdate) -> bool:
    """True if the update has a bias against tokens that the adapter's model lacked."""
    return update.bias is not None and bool((update.bias <= NEVER).any())


def _times(update: LowRankUpdate, factor: float) -> LowRankUpdate:
    """The update multiplied, but for a bias that keeps tokens away."""
    bias, gain = update.bias, update.gain
    return replace(
        update,
        scale=update.scale * factor,
        bias=None if bias is None else (bias * factor).where(bias > NEVER, bias),
        gain=None if gain is None else 1 + (gain - 1) * factor,
    )


def _informal(term: GivenTerm) -> dict[str, object]:
    """A term for those who read the version's source."""
    told: dict[str, object] = {"adapter": term.reference, "weight": term.weight}
    if term.begin or term.end is not None:
        told |= {"begin": term.begin, "end": term.end}
    return told | ({"scales": dict(term.scales)} if term.scales else {})
