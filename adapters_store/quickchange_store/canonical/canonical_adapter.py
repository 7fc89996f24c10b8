"""Canonical form in which every adapter is stored and served: a list of low-rank updates.

A canonical adapter is, per module of the base model, `A [r, in]`, `B [out, r]` and a scale, with an
optional shift and activation between them, a bias and a gain:

    y + w · ((gain − 1) ⊙ y + scale · B act(A x + shift) + bias)

where y is the module's own output and w the weight that a request gives the adapter. x is the
module's input, or for bottleneck adapters what `LowRankUpdate.source` says. Readers of other
formats (PEFT, AdapterHub) produce this form; the engine knows nothing else. Knows nothing of the
store's layout on disk, of devices or of HTTP.

Its bytes are one safetensors file, written so that they are a pure function of what the adapter
computes: the architecture, the modules, their tensors (dtype included) and scales. `base_name` and
`source` only say where an adapter came from. They are not in the bytes, so the same weights
imported from two paths or by two tools are one version and share every cache. The digest of an
adapter is the SHA-256 of these bytes. Defaults are not written, so a plain LoRA stays format 1;
anything more makes it format 2, Turbo heads (`turbo_bytes`) format 3 and a classification head
(`classifier_part`) format 4, which older readers refuse instead of dropping a part.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, get_args

from quickchange_store.canonical import classifier_part, turbo_bytes
from quickchange_store.canonical.classifier_part import ClassifierHead, Floats
from quickchange_store.canonical.turbo_bytes import TurboLayout
from quickchange_store.errors import CorruptVersionError, InvalidAdapterError

if TYPE_CHECKING:  # imported where it is needed: names and digests are useful without torch
    import torch

    from quickchange_store.canonical.turbo_part import TurboHeads

ModuleKind = Literal["linear", "embedding", "expert", "router"]
Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"]
Source = Literal["input", "output", "residual", "stream"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
SOURCES: tuple[Source, ...] = get_args(Source)

PLAIN_FORMAT = 1  # A, B, scale and bias alone
FULL_FORMAT = 2
TURBO_FORMAT = 3
CLASSIFIER_FORMAT = 4
METADATA_KEY = "quickchange"  # one key only: a header's keys have no guaranteed order
DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
# The most that a number of an adapter may be, and by which an update may multiply its input. With
# inputs and a request's weights of 1,000 each the result is below 1e19, whose square (RMSNorm's)
# float32 holds.
LARGEST = 1e12
_OVERFLOW_REMEDY = "train again with a smaller learning rate, or take an earlier checkpoint"
_PIECE = 1 << 18  # bytes hashed at once
_STORED = {**DTYPES, "torch.int32": "I32"}


@dataclass(frozen=True)
class ModuleShape:
    """A module of the base model that an adapter may update."""

    kind: ModuleKind
    in_features: int  # an embedding's vocabulary
    out_features: int
    bias: bool = False  # True: the base module has one
    transposed: bool = False  # True: the module's weight is [in, out], as Conv1D's
    output_scale: float = 1.0  # the module multiplies its own output by it (scaled embeddings)


@dataclass(frozen=True)
class ExpertPart:
    """One of the matrices that every expert of a layer has, all experts' in one parameter.

    A module of the base for each expert, as far as adapters go: its path is `expert_path`.
    """

    experts: int
    in_features: int
    out_features: int
    interleaved: bool = False  # outputs of gate and up take turns; False: all of gate, then of up


@dataclass(frozen=True)
class ExpertPiece:
    """The outputs of one expert's matrix that were a module of their own (gate, or up)."""

    parameter: str
    expert: int
    index: int  # of the piece among the matrix's pieces
    pieces: int

    @property
    def path(self) -> str:
        """The path of the expert's matrix."""
        return expert_path(self.parameter, self.expert)


def expert_path(parameter: str, expert: int) -> str:
    """Path by which an update names one expert's matrix in the parameter at `parameter`."""
    return f"{parameter}.{expert}"


class ExpertModules(Protocol):
    """Modules of single experts, as checkpoints of older versions have them."""

    def find(self, path: str) -> ExpertPiece | None:
        """What the module `path` became; None for other paths."""
        ...

    def module(self, path: str) -> str | None:
        """What the module `path` of an earlier version is called now, if it is whole."""
        ...


@dataclass(frozen=True)
class SubLayer:
    """An attention or a feed-forward part of one layer, named by the module that ends it."""

    layer: int  # from 0
    kind: Literal["attention", "mlp"]
    norm: str | None  # path of the norm that the residual stream enters it through, where known
    plain_stream: bool  # its output joins the residual stream as it is, without another norm


class BaseWeights(Protocol):
    """The base model's own weights, read only for imports that need them."""

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter `name` as the checkpoint holds it, on the CPU.

        Raises BaseModelError where it can't be read.
        """
        ...


@dataclass(frozen=True)
class BaseSpec:
    """The base model's architecture and module shapes, which an adapter must fit."""

    architecture: str  # transformers' class name, e.g. "LlamaForCausalLM"
    name: str  # informal; a different name alone only warns
    modules: dict[str, ModuleShape]  # by module path, e.g. "model.layers.0.self_attn.q_proj"
    model_type: str = ""  # transformers' model type, e.g. "llama"
    output_head: str | None = None  # module path of the LM head, which "all-linear" leaves out
    producers: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Modules whose input is, factor for factor, another module's output: down_proj -> up_proj."""
    tied: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Modules whose weight is another module's: lm_head -> model.embed_tokens."""
    sublayers: Mapping[str, SubLayer] = field(default_factory=dict, compare=False)
    """The modules that end a sub-layer, whose output joins the residual stream."""
    weights: BaseWeights | None = field(default=None, compare=False, repr=False)
    experts: Mapping[str, ExpertPart] = field(default_factory=dict)
    """Parameters that hold a matrix for each expert, by path."""
    expert_modules: ExpertModules | None = field(default=None, compare=False, repr=False)
    head_dim: int | None = field(default=None, compare=False)
    """Width of a head of attention, where all have one."""

    def expert(self, path: str) -> ExpertPart | None:
        """The part that one expert's matrix is of; None for any other path."""
        parameter, _, number = path.rpartition(".")
        part = self.experts.get(parameter)
        known = part is not None and number.isdecimal() and int(number) < part.experts
        return part if known and str(int(number)) == number else None

    @property
    def head(self) -> ModuleShape | None:
        """The LM head: `in_features` is the hidden size, `out_features` the vocabulary."""
        return None if self.output_head is None else self.modules.get(self.output_head)


@dataclass(frozen=True)
class LowRankUpdate:
    """One module's update, in the dtype in which it was trained.

    Shapes: a [r, in], b [out, r], bias [out], shift [r], gain [out], the last three or None. r may
    be 0 (bias or gain only). For an embedding, x is the one-hot row of a token, so `A x` is a
    column of a [r, vocabulary]. gelu is the exact one (erf), gelu_tanh its usual approximation.

    `source` says what x is: the module's "input"; its "output", after the updates that read the
    input; the "residual" that enters the module's sub-layer (attention, MLP) ahead of its norm; or
    the "stream" behind the sub-layer: output + residual. All but "input" have `in` = `out`.

    Raises InvalidAdapterError where the shapes disagree or parts do not go together.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    activation: Activation = "identity"
    source: Source = "input"
    shift: torch.Tensor | None = None
    gain: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise InvalidAdapterError(
                f"A {list(self.a.shape)} and B {list(self.b.shape)} do not fit together",
                remedy="they must be [r, in] and [out, r]",
            )
        self._check_vector("bias", self.bias, "out", self.b.shape[0])
        self._check_vector("gain", self.gain, "out", self.b.shape[0])
        self._check_vector("shift", self.shift, "r", self.b.shape[1])
        if self.activation not in ACTIVATIONS or self.source not in SOURCES:
            raise InvalidAdapterError(
                f"activation {self.activation!r} or source {self.source!r} is not known",
                remedy=f"use one of {', '.join(ACTIVATIONS)} and one of {', '.join(SOURCES)}",
            )
        if self.source != "input" and (self.gain is not None or self.a.shape[1] != len(self.b)):
            raise InvalidAdapterError(
                f"an update that reads the {self.source} has a gain, or A {list(self.a.shape)} and "
                f"B {list(self.b.shape)} of different widths",
                remedy="give the gain to an update that reads the input, and one width to A and B",
            )

    def _check_vector(self, name: str, tensor: torch.Tensor | None, axis: str, size: int) -> None:
        if tensor is not None and tuple(tensor.shape) != (size,):
            raise InvalidAdapterError(
                f"{name} {list(tensor.shape)} does not fit A {list(self.a.shape)} and "
                f"B {list(self.b.shape)}",
                remedy=f"it must be [{axis}]",
            )

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The update's tensors by their stored names, without those that are None."""
        parts = {
            "a": self.a,
            "b": self.b,
            "bias": self.bias,
            "shift": self.shift,
            "gain": self.gain,
        }
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @property
    def plain(self) -> bool:
        """True if A, B, scale and bias say all of the update."""
        return (
            self.activation == "identity"
            and self.source == "input"
            and self.shift is None
            and self.gain is None
        )


@dataclass(frozen=True)
class CanonicalAdapter:
    """An adapter as the engine serves it.

    `updates` is keyed by the base model's module path; an expert's, by its `expert_path`.
    """

    architecture: str
    base_name: str  # from the source; informal, not in the digest
    updates: dict[str, LowRankUpdate]
    source: dict[str, Any] = field(default_factory=dict)  # format, recipe: informal, as base_name
    turbo: TurboHeads | None = None  # the heads that draft for it
    classifier: ClassifierHead | None = None  # classifies texts by their last hidden state

    @property
    def parameters(self) -> int:
        """Number of stored values, those of heads included."""
        updates = sum(t.numel() for u in self.updates.values() for t in u.tensors.values())
        heads = 0 if self.turbo is None else turbo_bytes.parameters(self.turbo)
        return updates + heads + (0 if self.classifier is None else self.classifier.parameters)

    @property
    def max_rank(self) -> int:
        return max((u.rank for u in self.updates.values()), default=0)


# --- bytes --------------------------------------------------------------------------------------


def write(adapter: CanonicalAdapter, stream: BinaryIO) -> str:
    """Write the adapter's bytes to `stream` and return their SHA-256, in hexadecimal.

    One tensor at a time, so that memory use stays at one tensor's. Raises InvalidAdapterError for
    a tensor of an unsupported dtype and for numbers that are not finite or beyond LARGEST.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(adapter):
        digest.update(chunk)
        stream.write(chunk)
    return digest.hexdigest()


def digest(adapter: CanonicalAdapter) -> str:
    """SHA-256 of the adapter's bytes, in hexadecimal. Raises as `write`."""
    total = hashlib.sha256()
    for chunk in _chunks(adapter):
        total.update(chunk)
    return total.hexdigest()


def load(
    path: Path, *, base_name: str = "", source: dict[str, Any] | None = None
) -> CanonicalAdapter:
    """Read an adapter's file; its tensors are memory-mapped, read from disk when first used.

    The header is checked, the tensors' content is not: compare `file_digest` for that. Raises
    CorruptVersionError for a file that is missing, damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = _parse_metadata(path, file.metadata())
            names = set(file.keys())
            updates = {
                module: LowRankUpdate(
                    a=file.get_tensor(f"{module}.a"),
                    b=file.get_tensor(f"{module}.b"),
                    scale=scale,
                    activation=header.activations.get(module, "identity"),
                    source=header.sources.get(module, "input"),
                    **{
                        part: file.get_tensor(f"{module}.{part}")
                        for part in ("bias", "shift", "gain")
                        if f"{module}.{part}" in names
                    },
                )
                for module, scale in header.scales.items()
            }
            layout = header.turbo
            turbo = None if layout is None else turbo_bytes.assemble(layout, file.get_tensor)
            classifier = _classifier(
                path, header, names, lambda name: file.get_tensor(name).numpy()
            )
    except (SafetensorError, OSError, InvalidAdapterError) as error:
        raise _corrupt(path, str(error)) from error
    return CanonicalAdapter(
        header.architecture, base_name, updates, source or {}, turbo, classifier
    )


def load_classifier(path: Path) -> ClassifierHead | None:
    """The classification head in an adapter's file, without torch; None where it has none.

    Raises as `load`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            header = _parse_metadata(path, file.metadata())
            return _classifier(path, header, set(file.keys()), file.get_tensor)
    except (SafetensorError, OSError, InvalidAdapterError) as error:
        raise _corrupt(path, str(error)) from error


def _classifier(
    path: Path, header: _Header, names: set[str], tensor: Callable[[str], Floats]
) -> ClassifierHead | None:
    if header.classifier is None:
        return None
    try:
        return classifier_part.assemble(header.classifier, names, tensor)
    except (KeyError, TypeError) as error:
        raise _corrupt(path, f"the classification head's entry is damaged: {error!r}") from error


def file_digest(path: Path, pause: Callable[[], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal. Raises CorruptVersionError where it can't be read.

    pause: called between pieces of the work, of about a quarter of a millisecond each.
    """
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                total.update(piece)
                if pause is not None:
                    pause()
    except OSError as error:
        raise _corrupt(path, str(error)) from error
    return total.hexdigest()


def _chunks(adapter: CanonicalAdapter) -> Iterator[bytes]:
    """The file in pieces: length and header, then the tensors in the header's order."""
    import torch

    layout, heads = (None, {}) if adapter.turbo is None else turbo_bytes.parts(adapter.turbo)
    if adapter.classifier is not None:
        heads |= {n: torch.from_numpy(t) for n, t in adapter.classifier.tensors.items()}
    tensors = _ordered(adapter, heads)
    _check_numbers(adapter, tensors)
    yield _header(adapter, layout, tensors)
    for _, tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes()


def _check_numbers(adapter: CanonicalAdapter, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Raise InvalidAdapterError for numbers that no request could be served with."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not (largest := _largest(tensor)) <= LARGEST:
            raise InvalidAdapterError(
                f"its largest number is {largest:g}, where {LARGEST:g} is the most that can be "
                "served",
                key=name,
                remedy=_OVERFLOW_REMEDY,
            )
    for module, update in adapter.updates.items():
        if not abs(update.scale) <= LARGEST:
            raise InvalidAdapterError(
                f"the scale of its update (lora_alpha / r in a LoRA) is {update.scale:g}, where "
                f"{LARGEST:g} is the most that can be served",
                key=module,
                remedy="give a smaller lora_alpha",
            )
        gain = abs(update.scale) * _row_sum(update.a) * _row_sum(update.b)
        if not gain <= LARGEST:
            raise InvalidAdapterError(
                f"scale · B · A may multiply its input by {gain:g}, where {LARGEST:g} is the most "
                "that can be served",
                key=module,
                remedy=_OVERFLOW_REMEDY,
            )


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _row_sum(matrix: torch.Tensor) -> float:
    """The largest sum of a row's absolute values, by which a product with it grows at most."""
    return float(matrix.float().abs().sum(1).max()) if matrix.numel() else 0.0


def _ordered(
    adapter: CanonicalAdapter, heads: Mapping[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor), widest dtype first so that every tensor is aligned, then by name."""
    updates = {
        f"{module}.{part}": tensor
        for module, update in adapter.updates.items()
        for part, tensor in update.tensors.items()
    }
    clash = updates.keys() & heads.keys()
    if clash:
        raise InvalidAdapterError(
            "a module and the adapter's heads have a tensor of this name",
            key=min(clash),
            remedy="rename the module: no path of the base model may begin with turbo., or be "
            "classifier",
        )
    named = {**updates, **heads}
    for name, tensor in named.items():
        known = DTYPES if name != turbo_bytes.VOCABULARY else _STORED
        if str(tensor.dtype) not in known:
            raise InvalidAdapterError(
                f"dtype {tensor.dtype} can't be stored",
                key=name,
                remedy="convert it to float32, bfloat16 or float16",
            )
    return sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(
    adapter: CanonicalAdapter,
    layout: TurboLayout | None,
    tensors: list[tuple[str, torch.Tensor]],
) -> bytes:
    """The safetensors header. Written here because the library promises no stable bytes."""
    updates = adapter.updates
    plain = all(update.plain for update in updates.values())
    content: dict[str, Any] = {
        "architecture": adapter.architecture,
        "format": PLAIN_FORMAT if plain else FULL_FORMAT,
        "scales": {module: float(update.scale) for module, update in updates.items()},
    }
    if not plain:
        content["activations"] = {
            module: u.activation for module, u in updates.items() if u.activation != "identity"
        }
        content["sources"] = {
            module: update.source for module, update in updates.items() if update.source != "input"
        }
    if layout is not None:
        content["format"] = TURBO_FORMAT
        content["turbo"] = layout.encode()
    if adapter.classifier is not None:
        content["format"] = CLASSIFIER_FORMAT
        content["classifier"] = adapter.classifier.encode()
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: _json(content)}}
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _STORED[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = _json(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class _Header:
    architecture: str
    scales: dict[str, float]
    activations: dict[str, Activation]
    sources: dict[str, Source]
    turbo: TurboLayout | None
    classifier: Mapping[str, Any] | None  # its entry, not yet checked


def _parse_metadata(path: Path, metadata: dict[str, str] | None) -> _Header:
    """The parsed header; LowRankUpdate checks its activations and sources."""
    try:
        header = json.loads((metadata or {})[METADATA_KEY])
        known = (PLAIN_FORMAT, FULL_FORMAT, TURBO_FORMAT, CLASSIFIER_FORMAT)
        if header["format"] not in known:
            raise _corrupt(path, f"format {header['format']}, known are {list(known)}")
        classifies = header["format"] == CLASSIFIER_FORMAT
        has_heads = header["format"] == TURBO_FORMAT or (classifies and "turbo" in header)
        return _Header(
            architecture=str(header["architecture"]),
            scales={str(module): float(scale) for module, scale in header["scales"].items()},
            activations=dict(header.get("activations", {})),
            sources=dict(header.get("sources", {})),
            turbo=TurboLayout.decode(header["turbo"]) if has_heads else None,
            classifier=dict(header["classifier"]) if classifies else None,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _corrupt(path, f"the header lacks {METADATA_KEY!r}: {error!r}") from error


def _corrupt(path: Path, problem: str) -> CorruptVersionError:
    return CorruptVersionError(
        problem,
        file=str(path),
        remedy="add the adapter again: the same content repairs the version",
    )
