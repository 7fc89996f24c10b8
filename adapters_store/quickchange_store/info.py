"""Figures of a version, kept in `info.json` so that no tensor need be read for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from quickchange_store.canonical import turbo_bytes
from quickchange_store.canonical.classifier_part import ClassActivation, ClassifierHead
from quickchange_store.canonical.composition_part import Term
from quickchange_store.canonical.prompt_part import PromptForm
from quickchange_store.errors import BaseMismatchError, CorruptVersionError, InvalidAdapterError
from quickchange_store.index import LAST_SECOND
from quickchange_store.json_files import UnreadableFileError, read_file, read_object

MAX_INFO_BYTES = 16 * 1024**2  # four times an adapter's configuration, which is kept in it

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
    from quickchange_store.canonical.tokenizer_part import TokenizerChanges
    from quickchange_store.canonical.turbo_part import TurboHeads

CHECKSUM = "checksum"  # of the other figures: a flipped bit is noticed


@dataclass(frozen=True, slots=True)
class TurboInfo:
    """Figures of a version's Turbo heads."""

    depth: int  # tokens that the heads draft at once
    hidden: int
    sequential: bool
    vocabulary: int | None  # tokens that can be drafted; None: all
    own_outputs: bool  # the heads have LM heads of their own
    parameters: int  # trained values
    tenant: str | None = None  # the only one that they draft for; None: they do for everybody

    def medusa_parameters(self, vocabulary: int) -> int:
        """Parameters of as many Medusa-1 heads, each with an LM head of [vocabulary, hidden]."""
        return (self.hidden * self.hidden + vocabulary * self.hidden) * self.depth


@dataclass(frozen=True, slots=True)
class ClassifierInfo:
    """Figures of a version's classification head."""

    labels: tuple[str, ...]  # of the classes, by number
    activation: ClassActivation
    parameters: int


@dataclass(frozen=True, slots=True)
class VocabularyInfo:
    """Figures of what a version's tokenizer adds to its base's."""

    tokens: int  # added
    rows: int  # token ids that requests under it may have, from 0
    template: bool  # it brings a chat template
    content: str  # SHA-256 of all that it changes: equal for equal tokenizers


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """Figures of a version's virtual tokens."""

    form: PromptForm
    tokens: int


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """Figures of a version. `base_name` and `source` are as given when it was first added."""

    digest: str
    architecture: str
    base_name: str
    ranks: tuple[int, ...]  # the distinct ranks, ascending
    targets: tuple[str, ...]  # the last parts of the module paths, e.g. "q_proj"
    modules: int
    parameters: int  # stored values
    dtypes: tuple[str, ...]  # e.g. "bfloat16"
    size: int  # bytes of the version's file
    created: Annotated[float, Field(ge=0, le=LAST_SECOND)]  # seconds since 1970
    source: Mapping[str, Any]
    kind: str = ""  # "LoRA", "bottleneck", …; unknown where an earlier release added it
    turbo: TurboInfo | None = None
    classifier: ClassifierInfo | None = None
    composition: tuple[Term, ...] = ()  # the versions that it is the sum of
    invocation: tuple[int, ...] = ()  # tokens that activate it; empty: it serves the whole text
    tokenizer: VocabularyInfo | None = None
    prompt: PromptInfo | None = None
    base_hidden: int | None = None  # hidden size of the base that it was checked against
    base_vocabulary: int | None = None

    @property
    def max_rank(self) -> int:
        return max(self.ranks, default=0)

    def encode(self) -> bytes:
        """The figures as JSON. Raises InvalidAdapterError where `source` is not plain data."""
        try:
            tree = asdict(self)
            tree[CHECKSUM] = _checksum(tree)
            return json.dumps(tree, sort_keys=True, indent=1, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InvalidAdapterError(
                f"it can't be written as JSON ({error})",
                key="source",
                remedy="describe the adapter's source with strings, finite numbers and lists",
            ) from error

    @classmethod
    def read(cls, path: Path) -> AdapterInfo:
        """Read `info.json`. Raises CorruptVersionError."""
        try:
            tree = read_object(read_file(path, MAX_INFO_BYTES))
            checksum = tree.pop(CHECKSUM, None)  # earlier releases wrote none
            if checksum is not None and checksum != _checksum(tree):
                raise UnreadableFileError(f"the checksum of its content is {_checksum(tree)}")
            return _READER.validate_python(tree)
        except UnreadableFileError as error:
            raise _unreadable(path, error.problem, error.key) from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise _unreadable(path, first["msg"], ".".join(map(str, first["loc"]))) from error


_READER = TypeAdapter(AdapterInfo)


def _unreadable(path: Path, problem: str, key: str | None) -> CorruptVersionError:
    return CorruptVersionError(
        problem,
        file=str(path),
        key=key,
        remedy="add the adapter again: the same content repairs the version",
    )


def _checksum(tree: Mapping[str, Any]) -> str:
    """SHA-256 of the figures, whatever the white space between them."""
    content = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


def describe(
    adapter: CanonicalAdapter, digest: str, *, size: int, created: float, base: BaseSpec | None
) -> AdapterInfo:
    """Figures of `adapter`, checked against `base` and stored in `size` bytes."""
    updates, prompt = adapter.updates, adapter.prompt
    head = None if base is None else base.head
    weights = [update.a for update in updates.values()]
    weights += [] if adapter.turbo is None else [block.weight for block in adapter.turbo.blocks]
    weights += [] if adapter.prompt is None else [adapter.prompt.values]
    return AdapterInfo(
        digest=digest,
        architecture=adapter.architecture,
        base_name=adapter.base_name,
        ranks=tuple(sorted({update.rank for update in updates.values()})),
        targets=tuple(sorted({_target(path) for path in updates})),
        modules=len(updates),
        parameters=adapter.parameters,
        dtypes=tuple(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})),
        size=size,
        created=created,
        source=dict(adapter.source),
        kind=_kind(adapter),
        turbo=None if adapter.turbo is None else _turbo(adapter.turbo),
        classifier=None if adapter.classifier is None else _classifier(adapter.classifier),
        composition=() if adapter.composition is None else adapter.composition.terms,
        invocation=() if adapter.invocation is None else adapter.invocation.tokens,
        tokenizer=None if adapter.tokenizer is None else _tokenizer(adapter.tokenizer),
        prompt=None if prompt is None else PromptInfo(prompt.form, prompt.tokens),
        base_hidden=None if head is None else head.in_features,
        base_vocabulary=None if head is None else head.out_features,
    )


def _target(path: str) -> str:
    """The name of the module or, where the last part is an expert's number, of the matrix."""
    return next(part for part in reversed(path.split(".")) if not part.isdecimal())


def _turbo(turbo: TurboHeads) -> TurboInfo:
    return TurboInfo(
        depth=turbo.depth,
        hidden=turbo.hidden,
        sequential=turbo.sequential,
        vocabulary=None if turbo.vocabulary is None else len(turbo.vocabulary),
        own_outputs=bool(turbo.outputs),
        parameters=turbo_bytes.parameters(turbo),
        tenant=turbo.tenant,
    )


def _classifier(head: ClassifierHead) -> ClassifierInfo:
    return ClassifierInfo(head.labels, head.activation, head.parameters)


def _tokenizer(changes: TokenizerChanges) -> VocabularyInfo:
    entry = json.dumps(changes.encode(), sort_keys=True).encode()
    content = hashlib.sha256(entry).hexdigest()
    return VocabularyInfo(len(changes.tokens), changes.rows, changes.template is not None, content)


def _kind(adapter: CanonicalAdapter) -> str:
    """The kind's usual name, from what the adapter computes."""
    updates = adapter.updates.values()
    if adapter.classifier is not None:
        return f"{_kind(replace(adapter, classifier=None))} classifier"
    if adapter.composition is not None:
        return "composition"
    if adapter.prompt is not None:
        others = replace(adapter, prompt=None)
        own = adapter.prompt.kind
        return f"{_kind(others)} with {own}" if updates or others.turbo else own
    if not updates:
        return "Turbo" if adapter.turbo is not None else "empty"
    if any(update.activation != "identity" or update.source != "input" for update in updates):
        kind = "bottleneck"
    elif any(update.gain is not None for update in updates):
        kind = "DoRA" if adapter.max_rank else "IA3"
    else:
        kind = "LoRA"
    if adapter.invocation is not None:
        kind = f"a{kind}"
    return kind if adapter.turbo is None else f"Turbo {kind}"


def check_fit(name: object, heads: AdapterInfo, target: AdapterInfo) -> None:
    """Raise where the heads of the version `name` can't draft for `target`.

    InvalidAdapterError where it has none, BaseMismatchError where they are for another base model.
    """
    if heads.turbo is None:
        raise InvalidAdapterError(
            "it has no Turbo heads",
            key=str(name),
            remedy="bind an adapter whose kind, in `quickchange adapters list`, is Turbo",
        )
    hidden = target.base_hidden if target.turbo is None else target.turbo.hidden
    ours, theirs = (heads.architecture, heads.turbo.hidden), (target.architecture, hidden)
    if ours[0] != theirs[0] or ours[1] != (hidden or ours[1]):
        raise BaseMismatchError(
            f"its heads are for {ours[0]} with a hidden size of {ours[1]}, and the adapter that "
            f"they would draft for is for {theirs[0]}"
            + (f" with {hidden}" if hidden is not None else ""),
            key=str(name),
            remedy="bind heads that were trained on the same base model",
        )
