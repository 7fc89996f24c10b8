"""Proof at load: the wrapped model on paged attention gives what transformers' own model gives.

A few short texts of random tokens are read by the unwrapped model, one by one, with eager attention
and no cache; then by the wrapped one as the engine would: in one flattened batch, in parts that are
cut at different places, down to single rows. All rows' logits must agree. The first text stands at
position 0, the others cross each limit that the configuration names for its positions
(original_max_position_embeddings, for dynamic NTK max_position_embeddings); windows and chunks of
attention, and the scale by which Llama 4 tempers it, are made so short for the proof that the texts
are longer.

Bounded: nine rows a text, two or three texts, each computed twice. Of a stack of layers only the
first of each kind runs (by modules' classes, their parameters' shapes, what they hold and the
layer's type), if the model runs with those alone; and half the layers at most are kept in this way,
or all run. The model is left as it was, whatever happens, and so is torch's generator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.architectures.position_scaling import rope_kinds
from quickchange_server.model.forward_context import (
    FIRST_STATE,
    ZERO_STATE,
    AttentionBatch,
    ForwardContext,
    StatePart,
    StepHolder,
)
from quickchange_server.model.loading.proof_conditions import (
    kept_state,
    kinds_of_layers,
    only_layers,
    reference_attention,
    short_windows,
    shortened,
    text_config,
    windows_of,
)

# Logits of asked rows: (model, ids [T], positions [T], rows [R]) to [R, V].
Run = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest difference of a model from the reference."""

    error: float  # distance of a row's logits, relative to the row's size
    # Rows of a text that may lie further away: in a short dtype, rounding sends a token that is
    # nearly as near to two experts now to the one, now to the other.
    strays: int = 0


TOLERANCE = {
    torch.float32: Tolerance(1e-3),
    torch.float16: Tolerance(5e-2, strays=2),
    torch.bfloat16: Tolerance(0.2, strays=2),
}
LOOSE = Tolerance(0.2, strays=2)  # where activations are rounded each time
ROUNDED = Tolerance(0.3, strays=2)  # where weights are rounded after the reference

_LENGTH = 9  # rows of a text
_CUTS = ((0, 4, 6, 7, 8, 9), (0, 3, 6, 7, 8, 9))  # of even and odd texts: the rows of each step
_BEFORE = 3  # rows of a text before the limit that it crosses
_ELSEWHERE = 37  # position of the second text where there is no limit
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class ProofText:
    """Tokens, and the logits [_LENGTH, V] that transformers' own model gives for them."""

    ids: Tensor  # [_LENGTH], at positions from `start` on
    start: int
    logits: Tensor

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.start, self.start + _LENGTH)


# One step: for each text the rows [begin, end) that it computes.
Step = Sequence[tuple[int, int]]


class ModelProof:
    """What transformers' own model gives for some texts, against which another form is held."""

    def __init__(self, model: nn.Module, *, rounded: bool) -> None:
        """Read the texts with `model`, in which nothing may have been replaced so far.

        rounded: it is quantised, or will be.
        """
        self._model = model
        if rounded:  # quantised modules may set themselves up in the first pass, all at once
            with reference_attention(model):
                _text(model, torch.zeros(1, dtype=torch.long), 0)
        self._stacks = kinds_of_layers(model)
        self._short = shortened({size for _, _, size in windows_of(model)})
        self._texts: list[ProofText] = []
        self._failed: Exception | None = None  # told by `difference`: other refusals say more
        for stacks in (self._stacks, []):  # some models don't run without all their layers
            self._stacks = stacks
            try:
                self._texts, self._failed = self._read(), None
                break
            except Exception as error:
                self._failed = error

    def difference(
        self, install: Callable[..., None], holder: StepHolder, run: Run, tolerance: Tolerance
    ) -> str | None:
        """The difference of the model, wrapped and with other modules by now; None: none.

        install: gives the model its caches (`LoadedModel.install_caches`).
        """
        if self._failed is not None:
            raise self._failed
        paged = _Paged(self._model, install, holder, run)
        parts = [_CUTS[number % len(_CUTS)] for number in range(len(self._texts))]
        steps = [
            [(cut[index], cut[index + 1]) for cut in parts] for index in range(len(_CUTS[0]) - 1)
        ]
        found = self._differs(steps, paged, tolerance)
        return None if found is None else self._explained(found, paged, tolerance)

    def _explained(self, found: str, paged: _Paged, tolerance: Tolerance) -> str:
        """The difference with what calls it forth: already one text, several, or its parts."""
        whole, none = (0, _LENGTH), (0, 0)
        for number in range(len(self._texts)):
            alone = [whole if each == number else none for each in range(len(self._texts))]
            if error := self._differs([alone], paged, tolerance):
                return f"{error}, already for one text by itself{_hint(self._model)}"
        if error := self._differs([[whole] * len(self._texts)], paged, tolerance):
            return (
                f"{error}, where several texts share a step: rows are not kept apart by their "
                "position_ids"
            )
        return (
            f"{found}, where a text is computed in parts: it does not go by position_ids, or keeps "
            "more between steps than keys and values"
        )

    def _read(self) -> list[ProofText]:
        with self._as_proved(), reference_attention(self._model), kept_state(self._model):
            drawn = _drawn(self._model)
            return [_text(self._model, ids, start) for ids, start in drawn]

    def _differs(self, steps: Sequence[Step], paged: _Paged, tolerance: Tolerance) -> str | None:
        found: list[list[tuple[float, int]]] = [[] for _ in self._texts]  # (error, position)
        with self._as_proved():
            paged.begin(len(self._texts))
            for step in steps:
                logits = paged.run(self._texts, step)
                ends = accumulate(end - at for at, end in step)
                for text, (begin, end), stop, errors in zip(
                    self._texts, step, ends, found, strict=True
                ):
                    got = logits[stop - (end - begin) : stop]
                    rows = enumerate(_errors(got, text.logits[begin:end]), text.start + begin)
                    errors += [(error, position) for position, error in rows]
        counted = [sorted(errors)[: -tolerance.strays or None] for errors in found]
        worst, where = max(pair for errors in counted for pair in [*errors, (0.0, 0)])
        if worst <= tolerance.error:
            return None
        return f"logits differ from eager attention's by {worst:.1%} at position {where}"

    @contextmanager
    def _as_proved(self) -> Iterator[None]:
        """The model with few layers and short windows, as eager attention and paged one meet it."""
        device = next(self._model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(short_windows(self._model, self._short))
            for layers, kept in self._stacks:
                stack.enter_context(only_layers(self._model, layers, kept))
            yield


class _Paged:
    """The model on paged attention, step by step as the engine runs it, one block a text."""

    def __init__(
        self, model: nn.Module, install: Callable[..., None], holder: StepHolder, run: Run
    ) -> None:
        self._model, self._install, self._holder, self._run = model, install, holder, run
        self._device = next(model.parameters()).device

    def begin(self, texts: int) -> None:
        """Forget what was computed."""
        dtype: torch.dtype = self._model.dtype  # type: ignore[assignment]
        self._install(
            num_blocks=texts,
            block_size=_BLOCK_SIZE,
            state_rows=FIRST_STATE + texts,
            dtype=dtype,
            device=self._device,
        )

    def run(self, texts: Sequence[ProofText], step: Step) -> Tensor:
        """Logits of the step's rows."""
        device = self._device
        spans = list(zip(texts, step, strict=True))
        ids = torch.cat([text.ids[at:end] for text, (at, end) in spans])
        positions = torch.cat([text.positions[at:end] for text, (at, end) in spans])
        slots = [torch.arange(at, end) + _BLOCK_SIZE * n for n, (at, end) in enumerate(step)]
        reach = [torch.full((end - at,), text.start + _LENGTH) for text, (at, end) in spans]
        starts = torch.tensor([0, *(end - at for at, end in step)]).cumsum(0)
        batch = AttentionBatch(
            slots=torch.cat(slots).to(device),
            block_tables=torch.arange(len(step), dtype=torch.int32)[:, None].to(device),
            seq_lens=torch.tensor([end for _, end in step], dtype=torch.int32).to(device),
            query_start=starts.to(torch.int32).to(device),
        )
        states = tuple(
            self._states(number, int(start), at, end)
            for number, (start, (at, end)) in enumerate(zip(starts, step, strict=False))
            if end > at
        )
        self._holder.step = ForwardContext(batch, None, states, torch.cat(reach).to(device))
        try:
            return self._run(self._model, ids, positions, torch.arange(len(ids)))
        finally:
            self._holder.step = None

    def _states(self, number: int, first: int, at: int, end: int) -> StatePart:
        """One text's rows for layers that keep states."""
        own = torch.tensor([FIRST_STATE + number], device=self._device)
        count = end - at
        before = own if at else torch.full_like(own, ZERO_STATE)
        return StatePart(
            rows=torch.arange(first, first + count, device=self._device),
            length=count,
            read=None if count > 1 and not at else before,
            write=own,
            adapters=None,
        )


def _errors(got: Tensor, expected: Tensor) -> list[float]:
    """Distance of each row from the expected one, relative to its size; inf where it is not finite.

    Rows whose reference is not finite are not judged.
    """
    got, expected = got.float(), expected.float()
    size = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    errors = ((got - expected).norm(dim=-1) / size).nan_to_num(nan=float("inf"))
    return torch.where(size.isfinite(), errors, 0.0).tolist()


def _hint(model: nn.Module) -> str:
    config: PretrainedConfig = model.config
    if getattr(config, "is_decoder", True) is False:
        return "; its configuration has is_decoder off, so that each token sees those behind it"
    return ""


def _drawn(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Tokens of each text and the position at which it begins."""
    config = text_config(model)
    limits = _limits(model)
    most = getattr(config, "max_position_embeddings", None) or _ELSEWHERE + _LENGTH
    starts = [0, *(max(limit - _BEFORE, 0) for limit in limits)]
    if not limits:
        starts.append(max(min(_ELSEWHERE, most - _LENGTH), 0))
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    special: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"):
        value = getattr(config, name, None)
        if value is not None:
            special |= set(value if isinstance(value, list) else [value])
    plain = [token for token in range(min(vocabulary, 1 << 12)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(plain), (len(starts), _LENGTH), generator=generator)
    return list(zip(torch.tensor(plain)[drawn], starts, strict=True))


@torch.inference_mode()
def _text(model: nn.Module, ids: Tensor, start: int) -> ProofText:
    """A text read by the model as it is, at `start` if position_ids can put it there."""
    device = next(model.parameters()).device

    def read(first: int | None) -> Tensor:
        given = {} if first is None else {"position_ids": torch.arange(first, first + _LENGTH)}
        named = {name: value[None].to(device) for name, value in given.items()}
        output = model(input_ids=ids[None].to(device), use_cache=False, **named)
        logits: Tensor = output.logits[0]
        return logits

    plain = read(None)
    if not start or "position_ids" not in inspect.signature(model.forward).parameters:
        return ProofText(ids, 0, plain)
    if max(_errors(read(0), plain)) > TOLERANCE[torch.float32].error:
        return ProofText(ids, 0, plain)  # its position_ids don't count from 0, as RoBERTa's
    there = read(start)
    return ProofText(ids, 0, plain) if torch.equal(there, plain) else ProofText(ids, start, there)


def _limits(model: nn.Module) -> list[int]:
    """Positions from which on the configuration says that something changes."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = {part.get("original_max_position_embeddings") for part in ropes}
    kinds = {kind for m in model.modules() for kind in rope_kinds(m).values()}
    if kinds & {"longrope", "su"}:
        limits.add(getattr(config, "original_max_position_embeddings", None))
    if any("dynamic" in kind for kind in kinds):
        limits.add(config.max_position_embeddings)
    return sorted(int(limit) for limit in limits if limit)


def explained(model: nn.Module, error: Exception) -> UnsupportedModelError:
    """The refusal of a model in which something went wrong while it was made ready."""
    name = type(model).__name__
    if isinstance(error, UnsupportedModelError):
        if name in error.message or error.message.startswith("model:"):
            return error
        return UnsupportedModelError(f"{name}: {error.message}", param=error.param)
    reason = " ".join(str(error).split())[:300]
    return UnsupportedModelError(
        f"{name} can't be served: it does not run on a flattened batch "
        f"({type(error).__name__}: {reason})",
        param="model",
    )
