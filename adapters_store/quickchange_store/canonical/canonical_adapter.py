"""Canonical form in which every adapter is stored and served: a list of low-rank updates.

A canonical adapter is, per module of the base model, `A [r, in]`, `B [out, r]` and a scale, with an
optional shift and activation between them, a bias and a gain:

    y + w · ((gain − 1) ⊙ y + scale · B act(A x + shift) + bias)

where y is the module's own output and w the weight that a request gives the adapter. x is the
module's input, or for bottleneck adapters what `LowRankUpdate.source` says. Readers of other
formats (PEFT, AdapterHub) produce this form; the engine knows nothing else. Knows nothing of the
store's layout on disk, of devices or of HTTP.

Beside its updates it may have Turbo heads, a classification head, and parts of other kinds
(`stored_parts`). `adapter_bytes` writes and reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from quickchange_store.canonical import turbo_bytes
from quickchange_store.canonical.classifier_part import ClassifierHead
from quickchange_store.canonical.composition_part import Composition
from quickchange_store.canonical.prompt_part import VirtualPrompt
from quickchange_store.canonical.stored_parts import Invocation, StoredPart
from quickchange_store.canonical.tokenizer_part import TokenizerChanges
from quickchange_store.errors import InvalidAdapterError

if TYPE_CHECKING:  # imported where it is needed: names and digests are useful without torch
    import torch

    from quickchange_store.canonical.turbo_part import TurboHeads

ModuleKind = Literal["linear", "embedding", "expert", "router", "norm"]
Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"]
Source = Literal["input", "output", "residual", "stream"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
SOURCES: tuple[Source, ...] = get_args(Source)


@dataclass(frozen=True)
class ModuleShape:
    """A module of the base model that an adapter may update."""

    kind: ModuleKind
    in_features: int  # an embedding's vocabulary
    out_features: int
    bias: bool = False  # True: the base module has one
    transposed: bool = False  # True: the module's weight is [in, out], as Conv1D's
    output_scale: float = 1.0  # the module multiplies its own output by it (scaled embeddings)
    weight_offset: float = 0.0  # a norm multiplies by offset + weight (1 in Gemma's)


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


class BaseTokenizer(Protocol):
    """The base model's tokenizer, read only where an adapter's folder brings one."""

    @property
    def backend(self) -> Any:
        """The `tokenizers` library's; None where there is none, or one of another kind."""
        ...

    @property
    def template(self) -> Any:
        """The chat template, as text or by name; None where there is none."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a text."""
        ...

    def mark(self, name: str) -> str | None:
        """A marking token, by tokenizers' name for it: eos_token, bos_token."""
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
    tokenizer: BaseTokenizer | None = field(default=None, compare=False, repr=False)
    spare_tokens: int | None = field(default=None, compare=False)
    """Tokens that adapters may add, where a server says how many it has rows for."""
    head_dim: int | None = field(default=None, compare=False)
    """Width of a head of attention, where all have one."""

    def expert(self, path: str) -> ExpertPart | None:
        """The part that one expert's matrix is of; None for any other path."""
        parameter, _, number = path.rpartition(".")
        part = self.experts.get(parameter)
        known = part is not None and number.isdecimal() and int(number) < part.experts
        return part if known and str(int(number)) == number else None

    def tied_to(self, path: str) -> tuple[str, ...]:
        """The other modules that have this one's weight."""
        source = self.tied.get(path, path)
        group = (source, *(each for each in self.tied if self.tied[each] == source))
        return tuple(each for each in group if each != path)

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
    invocation: Invocation | None = None  # None: it serves the whole text
    composition: Composition | None = None  # the versions that it stands for, of a named sum
    tokenizer: TokenizerChanges | None = None  # what differs from the base's
    prompt: VirtualPrompt | None = None  # virtual tokens in front of every text

    @property
    def parameters(self) -> int:
        """Number of stored values, those of heads included."""
        updates = sum(t.numel() for u in self.updates.values() for t in u.tensors.values())
        heads = 0 if self.turbo is None else turbo_bytes.parameters(self.turbo)
        parts = sum(t.numel() for part in self.parts.values() for t in part.tensors.values())
        classes = 0 if self.classifier is None else self.classifier.parameters
        return updates + heads + classes + parts

    @property
    def parts(self) -> dict[str, StoredPart]:
        """Its parts beside updates and heads, by the name that the bytes have them under."""
        parts: dict[str, StoredPart | None] = {
            "composition": self.composition,
            "invocation": self.invocation,
            "prompt": self.prompt,
            "tokenizer": self.tokenizer,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def needs(self) -> tuple[str, ...]:
        """Digests of the versions that it is the sum of, sorted."""
        terms = () if self.composition is None else self.composition.terms
        return tuple(sorted({term.digest for term in terms}))

    @property
    def virtual_tokens(self) -> int:
        """Number of tokens that it puts in front of every text."""
        return 0 if self.prompt is None else self.prompt.tokens

    @property
    def max_rank(self) -> int:
        return max((u.rank for u in self.updates.values()), default=0)
