"""Resolution of a request's `model`, `adapters` and `turbo` to adapter versions and drafting.

A name is resolved once, when its request arrives: the request keeps its digests, whatever happens
to the name meanwhile. HTTP and the engine are not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import Lock

from cachetools import LRUCache, cached

from quickchange_server.adapter_registry.composed_terms import WeightedName, composed_terms
from quickchange_server.adapter_registry.visibility import Sees, everything, reachable, seen
from quickchange_server.config import Settings
from quickchange_server.errors import (
    AdapterFailedError,
    ForbiddenError,
    InvalidRequestError,
    UnknownModelError,
)
from quickchange_server.frontend.adapter_spans import Invocations, activated
from quickchange_server.frontend.adapter_texts import OwnTokenizer
from quickchange_server.frontend.request_base import MAX_COMPONENTS
from quickchange_server.protocol import LOOKUP, Component, Drafting
from quickchange_store.base_model.base_source import base_name
from quickchange_store.canonical.classifier_part import ClassifierHead
from quickchange_store.errors import AdapterNotFoundError, CorruptVersionError, StoreError
from quickchange_store.index import Version
from quickchange_store.info import AdapterInfo
from quickchange_store.names import did_you_mean, parse_reference
from quickchange_store.store import Store

BASE_LABEL = "base"  # neither label can be an adapter's name
COMPOSITION_LABEL = "+"
AUTO, OFF = "auto", "off"  # values of `turbo` besides LOOKUP and names; reserved as names
KNOWN_VERSIONS = 4096  # versions whose info is cached
HEADS_BYTES = 256 * 2**20  # of cached classification heads
# What clients made for servers of one model send for it; the base, unless an adapter is named so.
PLACEHOLDERS = frozenset({"", "dummy", "tgi"})


@dataclass(frozen=True, slots=True)
class Named:
    """The versions that a name stands for now."""

    version: Version
    drafter: Version | None  # has the draft heads: the alias's Turbo, else the version itself


@dataclass(frozen=True, slots=True)
class Selection:
    """The adapter versions and the drafting that serve a request."""

    model: str  # as the client named it
    adapters: tuple[Component, ...]  # sorted by digest; empty: the plain base
    label: str  # for metrics: the adapter's name without version, or one of the labels above
    drafting: Drafting | None = None  # None: no speculative decoding
    drafter: str | None = None  # for metrics: name of the adapter whose heads draft
    classifiers: frozenset[str] = frozenset()  # those of its adapters that classify, by digest
    invocations: Invocations = field(default_factory=dict)  # of those of them that are activated
    tokenizer: OwnTokenizer | None = None  # None: the base's

    def serving(self, prompt: Sequence[int]) -> tuple[Component, ...]:
        """The adapters that serve a prompt, each from where it begins."""
        return activated(self.adapters, self.invocations, prompt)

    @property
    def virtual_tokens(self) -> int:
        """Tokens of the context that its adapters put in front of the text."""
        return sum(component.virtual_tokens for component in self.adapters)

    def check_generates(self) -> None:
        """Raise InvalidRequestError if an adapter of it was trained to classify texts."""
        if self.classifiers:
            raise InvalidRequestError(
                f"model: {self.model!r} is served with an adapter that classifies texts and "
                "generates none; send them to /classify or /score, or name another adapter",
                param="model",
            )


def base_names(settings: Settings) -> tuple[str, ...]:
    """The names of the base model; it is listed under the first."""
    return settings.served_names or (base_name(settings.model),)


class Catalog:
    """The resolver of names over one store."""

    def __init__(
        self,
        store: Store,
        names: tuple[str, ...],
        *,
        adapters: bool = True,
        turbo: bool = True,
        prompt_lookup: bool = True,
        further: Callable[[], Iterable[str]] = tuple,
        tokens: int | None = None,
    ) -> None:
        """`further`: what else requests may name, for those who misspell it. `tokens`: those that
        the served model has rows for, the spare ones among them; None: not known."""
        self._store = store
        self._further = further
        self._adapters = adapters
        self._turbo = turbo
        self._lookup = prompt_lookup
        self._tokens = tokens
        self.base_names = names
        # `Store.info`, cached: a digest's content never changes.
        self.info: Callable[[str], AdapterInfo] = lru_cache(KNOWN_VERSIONS)(store.info)
        self._heads = cached(LRUCache(HEADS_BYTES, _size), lock=Lock())(store.classifier)

    @property
    def base_name(self) -> str:
        return self.base_names[0]

    def is_base(self, name: str) -> bool:
        return name in self.base_names

    def _read(self, digest: str) -> AdapterInfo:
        """A version's figures. Raises AdapterFailedError where they can't be read."""
        try:
            return self.info(digest)
        except (CorruptVersionError, AdapterNotFoundError) as error:
            raise AdapterFailedError(f"model: {error}", param="model") from error

    async def classifier(self, selection: Selection) -> ClassifierHead:
        """The head that classifies for a selection. Raises InvalidRequestError where it has none,
        AdapterFailedError where it can't be read, and StoreUnavailableError."""
        named = f"model: {selection.model!r}"
        if not selection.classifiers:
            raise InvalidRequestError(
                f"{named} has no classification head; name an adapter that was trained with one "
                "(PEFT's SEQ_CLS), which GET /v1/models marks, or use /v1/embeddings",
                param="model",
            )
        only, *more = selection.adapters
        if more or only.weight != 1:
            raise InvalidRequestError(
                "adapters: a classification head reads the states of its own adapter alone, at "
                "the weight 1; name that adapter as model",
                param="adapters",
            )
        try:
            head = await asyncio.to_thread(self._heads, only.digest)
        except (CorruptVersionError, AdapterNotFoundError) as error:
            raise AdapterFailedError(f"{named}: {error}", param="model") from error
        assert head is not None
        return head

    def select(
        self,
        model: str,
        composition: Sequence[WeightedName] | None = None,
        turbo: str = AUTO,
        *,
        sees: Sees = everything,
        tenant: str | None = None,
    ) -> Selection:
        """Resolve `model`, or the base with a composition Σ weightᵢ · adapterᵢ, and the drafting
        by `turbo`: AUTO, OFF, LOOKUP or the name of an adapter with draft heads.

        Heads that learned from a tenant's requests draft for requests of this `tenant` alone: under
        AUTO others go without, by name they are refused. A name that the caller may not see does
        not exist for it; the base is always seen. Raises UnknownModelError, InvalidRequestError,
        or ForbiddenError, also if a setting switches it off.
        """
        if self._is_placeholder(model, sees):
            model = self.base_name
        if composition:
            composed = self._composed(model, composition, sees)
            return self._drafted(composed, None, turbo, sees, tenant)
        if self.is_base(model):
            return self._drafted(Selection(model, (), BASE_LABEL), None, turbo, sees, tenant)
        named = self._find(model, sees, param="model")
        alone = self._alone(model, named.version)
        return self._drafted(alone, named.drafter, turbo, sees, tenant)

    def _is_placeholder(self, model: str, sees: Sees) -> bool:
        if model not in PLACEHOLDERS or self.is_base(model):
            return False
        try:
            self._find(model, sees, param="model")
        except (UnknownModelError, ForbiddenError):
            return True
        return False

    def _alone(self, model: str, version: Version) -> Selection:
        if self._only_drafts(version):  # the base itself, with its prefix cache
            return Selection(model, (), BASE_LABEL)
        return self._selection(model, version.name, [(version, WeightedName(model))])

    def _selection(
        self, model: str, label: str, parts: Sequence[tuple[Version, WeightedName]]
    ) -> Selection:
        """The selection of a sum of versions. Raises InvalidRequestError."""
        composed = composed_terms(parts, self._read)
        tokenizer = None
        if composed.tokenizer is not None:
            digest, changes = composed.tokenizer
            self.check_room(changes.rows, f"model: version {digest[:12]}")
            tokenizer = OwnTokenizer(digest, changes.content)
        return Selection(
            model,
            composed.components,
            label if composed.components else BASE_LABEL,
            classifiers=composed.classifiers,
            invocations=composed.invocations,
            tokenizer=tokenizer,
        )

    def _only_drafts(self, version: Version) -> bool:
        """True if the version holds Turbo heads and nothing that changes the model."""
        if not version.turbo or version.virtual_tokens:
            return False
        return self._read(version.digest).modules == 0

    def _composed(self, model: str, composition: Sequence[WeightedName], sees: Sees) -> Selection:
        if not self.is_base(model):
            raise InvalidRequestError(
                f"adapters: a composition is over the base model, and model names {model!r}; "
                f"set model to {self.base_name!r} and list {model!r} among the adapters",
                param="adapters",
            )
        if len(composition) > MAX_COMPONENTS:
            raise InvalidRequestError(
                f"adapters: at most {MAX_COMPONENTS} adapters in one composition, "
                f"not {len(composition)}",
                param="adapters",
            )
        parts = [
            (self._term(entry.name, sees, param=f"adapters[{index}].id"), entry)
            for index, entry in enumerate(composition)
        ]
        names = {version.name for version, _ in parts}
        label = names.pop() if len(names) == 1 else COMPOSITION_LABEL
        return self._selection(model, label, parts)

    def check_room(self, rows: int, subject: str) -> None:
        """Raise InvalidRequestError where the served model lacks rows for so many tokens."""
        if self._tokens is not None and rows > self._tokens:
            raise InvalidRequestError(
                f"{subject} adds tokens: it needs rows for {rows}, and the server has "
                f"{self._tokens}; serve with --extra-vocabulary greater by {rows - self._tokens}",
                param="model",
            )

    def _term(self, reference: str, sees: Sees, *, param: str) -> Version:
        """The version named by one entry of a composition."""
        version = self._find(reference, sees, param=param).version
        if self._only_drafts(version):
            raise InvalidRequestError(
                f"{param}: {reference!r} holds Turbo heads alone, which add nothing to the model; "
                f"take it off the list and set turbo to {reference!r}",
                param=param,
            )
        return version

    def _find(self, reference: str, sees: Sees, *, param: str) -> Named:
        if not self._adapters:
            raise ForbiddenError(
                f"{param}: {reference!r} is not the base model ({self.base_name!r}), and adapters "
                "are switched off by the setting adapters (QUICKCHANGE_ADAPTERS)",
                param=param,
            )
        try:
            parsed = parse_reference(reference)
            index = reachable(self._store.snapshot(), parsed, sees)
            return Named(index.find(parsed), index.drafting(parsed))
        except StoreError as error:
            raise self._unknown(reference, sees, error, param) from error

    def _unknown(
        self, reference: str, sees: Sees, error: StoreError, param: str
    ) -> UnknownModelError:
        """The error for a name, with those that are spelled much like it and the caller sees."""
        there = seen(self._store.snapshot(), sees)
        further = (each for each in self._further() if sees(each))
        known = (*self.base_names, *there.entries, *there.aliases, *further)
        name = reference.partition("@")[0]
        if name in known:  # it has no such version; the store says which it has
            why = f": {error}"
        else:
            near = did_you_mean(name, known)
            why = f"; {near}" if near else "."
        return UnknownModelError(
            f"{param}: there is no model {reference!r}{why} GET /v1/models lists what there is",
            param=param,
        )

    # --- drafting -------------------------------------------------------------------------------

    def _drafted(
        self,
        selection: Selection,
        bound: Version | None,
        turbo: str,
        sees: Sees,
        tenant: str | None,
    ) -> Selection:
        """The selection with its drafting. `bound`: the version whose heads AUTO uses."""
        if turbo == OFF:
            return selection
        if turbo == AUTO:
            drafts = bound is not None and self._turbo and self._drafts_for(bound, tenant)
            return self._by_heads(selection, bound) if bound and drafts else selection
        self._check_on("turbo", self._turbo)
        if turbo == LOOKUP:
            self._check_on("prompt_lookup", self._lookup)
            return replace(selection, drafting=Drafting(lookup=True))
        drafter = self._find(turbo, sees, param="turbo").drafter
        if drafter is None:
            raise InvalidRequestError(
                f"turbo: {turbo!r} has no Turbo heads; name an adapter that has (GET /v1/models "
                f'marks them), or send "{LOOKUP}" or "{OFF}"',
                param="turbo",
            )
        if not self._drafts_for(drafter, tenant):
            raise ForbiddenError(
                f"turbo: {turbo!r} has learned from requests of another tenant, and drafts for its "
                f'requests alone; name other heads, or send "{OFF}"',
                param="turbo",
            )
        return self._by_heads(selection, drafter)

    def drafts_for(self, turbo: str, tenant: str) -> bool:
        """False if `turbo` names heads that learned from another tenant's requests."""
        try:
            drafter = self._find(turbo, everything, param="turbo").drafter
        except (UnknownModelError, ForbiddenError):
            return True  # AUTO, LOOKUP and OFF; and what the look-up will refuse
        return drafter is None or self._drafts_for(drafter, tenant)

    def _drafts_for(self, drafter: Version, tenant: str | None) -> bool:
        heads = self._read(drafter.digest).turbo
        return heads is None or heads.tenant in (None, tenant)

    def _by_heads(self, selection: Selection, drafter: Version) -> Selection:
        drafting = Drafting(drafter.digest, lookup=self._lookup)
        return replace(selection, drafting=drafting, drafter=drafter.name)

    def _check_on(self, setting: str, on: bool) -> None:
        if not on:
            raise ForbiddenError(
                f"turbo: switched off by the setting {setting} (QUICKCHANGE_{setting.upper()}); "
                f'leave the field out, or send "{OFF}"',
                param="turbo",
            )


def _size(head: ClassifierHead | None) -> int:
    """Bytes of a head in the cache."""
    return 0 if head is None else sum(tensor.nbytes for tensor in head.tensors.values())
