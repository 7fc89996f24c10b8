"""Turbo heads from prompts: makes the model's own outputs, trains on them, reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from torch import uint8

from quickchange_training.adapters.adapter_recipes import TrainingDtype
from quickchange_training.checkpoint import Checkpoints, fingerprint
from quickchange_training.errors import RecipeError
from quickchange_training.examples import few_examples, split
from quickchange_training.turbo.base_ends import base_ends
from quickchange_training.turbo.fitting import StartingHeads, checked_start
from quickchange_training.turbo.turbo_data import (
    Generate,
    KeptOutputs,
    OwnOutput,
    Positions,
    Prompt,
    draft_vocabulary,
    not_its_own,
    own_outputs,
    positions,
    short_outputs,
    widened,
)
from quickchange_training.turbo.turbo_trainer import BaseEnds, HeadMeasures, TurboTrainer

if TYPE_CHECKING:
    from torch import Tensor

    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
    from quickchange_store.canonical.turbo_part import TurboHeads
    from quickchange_training.turbo.turbo_recipe import TurboRecipe


Said = Mapping[tuple[int, ...], tuple[int, ...]]  # outputs by their prompts, as token ids


@dataclass(frozen=True)
class WantedOutputs:
    """A model, with or without an adapter, and the limits of the outputs wanted from it.

    A prompt in `said` gets the output there, and the model is only read for its states.
    """

    model: str  # a folder or a hub id
    adapter: CanonicalAdapter | None  # None: the base alone
    dtype: TrainingDtype
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    said: Said = field(default_factory=dict)


GenerateFor = Callable[[WantedOutputs], Generate]


@dataclass(frozen=True)
class HeadsSource:
    """Model, adapter and prompts that heads are made from."""

    model: str  # a folder or a hub id
    spec: BaseSpec
    adapter: CanonicalAdapter | None  # the LoRA that the heads are for; None: the base alone
    prompts: tuple[Prompt, ...]
    stop_token_ids: frozenset[int]
    said: Said = field(default_factory=dict)  # outputs that are there, by their prompts
    start: StartingHeads | None = None  # None: from nothing
    tenant: str | None = None  # whose requests the prompts are; the heads draft for it alone


@dataclass(frozen=True)
class TurboReport:
    """Figures of a run and measures of its heads."""

    prompts: int
    held_out_prompts: int
    tokens: int  # total of the outputs learned from
    mean_output_tokens: float
    generate_seconds: float
    steps: int
    seconds: float  # heads' training alone
    train_loss: float  # mean over the last tenth of the steps
    held_out: HeadMeasures | None  # None where nothing was held out
    started_from: str | None  # the heads that these go on from
    before: HeadMeasures | None  # of those heads, on the same outputs
    depth: int
    draft_vocabulary: int
    parameters: int
    medusa1_parameters: int  # parameters of as many Medusa heads with an LM head each
    warnings: tuple[str, ...]


def make_heads(
    source: HeadsSource,
    recipe: TurboRecipe,
    generate_for: GenerateFor,
    work: Path,
    checkpoint_every: int,
) -> tuple[TurboHeads, TurboReport]:
    """Train heads. Outputs and checkpoints are kept in the folder `work`, for a resumed run.

    Raises TrainingError.
    """
    from quickchange_store.canonical.adapter_bytes import digest

    tenant = _owner(source)
    wanted = WantedOutputs(
        source.model,
        source.adapter,
        recipe.dtype,
        recipe.max_new_tokens,
        source.stop_token_ids,
        source.said,
    )
    of_outputs = fingerprint(
        source.spec.name,
        None if source.adapter is None else digest(source.adapter),
        [prompt.tokens for prompt in source.prompts],
        [recipe.dtype, recipe.max_new_tokens, sorted(source.stop_token_ids)],
        *([sorted(source.said.items())] if source.said else []),
    )
    ends = base_ends(source.model, source.spec, source.adapter)
    start = None
    if source.start is not None:
        start = checked_start(source.start, recipe, ends.head.shape[1])
    started = time.monotonic()
    with KeptOutputs(work, of_outputs, ends.head.shape[1]) as kept:
        outputs = own_outputs(source.prompts, generate_for(wanted), kept)
    generated = time.monotonic() - started
    train, held_out = split(outputs, recipe.held_out, recipe.seed)
    vocabulary = _vocabulary(train, recipe, source, start)
    trainer = TurboTrainer(recipe, ends, vocabulary, start)
    rows = positions(train, recipe.depth)
    run = fingerprint(of_outputs, recipe.as_dict(), *([] if start is None else [_values(start)]))
    heads, curve = trainer.train(rows, Checkpoints(work, run, checkpoint_every))
    exported = replace(heads.export(vocabulary), tenant=tenant)
    hidden = ends.head.shape[1]
    report = TurboReport(
        prompts=len(train),
        held_out_prompts=len(held_out),
        tokens=len(rows),
        mean_output_tokens=len(rows) / len(train),
        generate_seconds=generated,
        steps=len(curve.losses),
        seconds=curve.seconds,
        train_loss=curve.final,
        held_out=trainer.measure(heads, held_out) if held_out else None,
        started_from=None if source.start is None else source.start.name,
        before=_before(source.start, recipe, ends, rows, held_out),
        depth=exported.depth,
        draft_vocabulary=len(ends.head) if vocabulary is None else len(vocabulary),
        parameters=sum(b.weight.numel() + b.bias.numel() for b in exported.blocks),
        medusa1_parameters=recipe.depth * (hidden * hidden + hidden + ends.head.numel()),
        warnings=tuple(_warnings(source, outputs)),
    )
    return exported, report


def _vocabulary(
    train: Sequence[OwnOutput], recipe: TurboRecipe, source: HeadsSource, start: TurboHeads | None
) -> Tensor | None:
    """The tokens to draft: of the outputs, then of the heads' before; None: every token."""
    if not recipe.vocabulary:
        return None
    chosen = draft_vocabulary(train, recipe.vocabulary, source.stop_token_ids)
    if start is None or start.vocabulary is None:
        return chosen
    return widened(chosen, start.vocabulary, recipe.vocabulary)


def _owner(source: HeadsSource) -> str | None:
    """The tenant whose text went into the heads, or into those that they go on from.

    Raises RecipeError where these are two.
    """
    before = None if source.start is None else source.start.heads.tenant
    if None not in (before, source.tenant) and before != source.tenant:
        raise RecipeError(
            f"--from {source.start.name if source.start else ''}: these heads have learned from "
            f"requests of {before!r}, and those recorded are of {source.tenant!r}; go on from "
            "heads that no tenant's requests went into"
        )
    return source.tenant or before


def _before(
    start: StartingHeads | None,
    recipe: TurboRecipe,
    ends: BaseEnds,
    rows: Positions,
    held_out: Sequence[OwnOutput],
) -> HeadMeasures | None:
    """Measures of the heads that were gone on from, as deep and with the tokens that they had."""
    if start is None or not held_out:
        return None
    vocabulary = None if start.heads.vocabulary is None else start.heads.vocabulary.long()
    trainer = TurboTrainer(replace(recipe, depth=start.heads.depth), ends, vocabulary, start.heads)
    return trainer.measure(trainer.begun(rows), held_out)


def _values(heads: TurboHeads) -> list[str]:
    """What tells heads from others, for a run's fingerprint."""
    from quickchange_store.canonical.turbo_bytes import parts

    layout, tensors = parts(heads)
    named = {
        name: sha256(t.contiguous().view(uint8).numpy().tobytes()) for name, t in tensors.items()
    }
    return [repr(layout), *(f"{name} {hash.hexdigest()}" for name, hash in sorted(named.items()))]


def _warnings(source: HeadsSource, outputs: Sequence[OwnOutput]) -> list[str]:
    return [
        *few_examples(len(outputs)),
        *short_outputs([len(output.tokens) for output in outputs]),
        *not_its_own(source.prompts, outputs, source.stop_token_ids),
    ]
