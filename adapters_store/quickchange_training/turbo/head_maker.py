"""Turbo heads from prompts: makes the model's own outputs, trains on them, reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_training.checkpoint import Checkpoints, fingerprint
from quickchange_training.examples import few_examples, split
from quickchange_training.lora.lora_recipe import TrainingDtype
from quickchange_training.turbo.base_ends import base_ends
from quickchange_training.turbo.turbo_data import (
    Generate,
    KeptOutputs,
    OwnOutput,
    Prompt,
    draft_vocabulary,
    not_its_own,
    own_outputs,
    positions,
    short_outputs,
)
from quickchange_training.turbo.turbo_trainer import HeadMeasures, TurboTrainer

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
    from quickchange_store.canonical.turbo_part import TurboHeads
    from quickchange_training.turbo.turbo_recipe import TurboRecipe


@dataclass(frozen=True)
class WantedOutputs:
    """A model, with or without an adapter, and the limits of the outputs wanted from it."""

    model: str  # a folder or a hub id
    adapter: CanonicalAdapter | None  # None: the base alone
    dtype: TrainingDtype
    max_new_tokens: int
    stop_token_ids: frozenset[int]


GenerateFor = Callable[[WantedOutputs], Generate]


@dataclass(frozen=True)
class HeadsSource:
    """Model, adapter and prompts that heads are made from."""

    model: str  # a folder or a hub id
    spec: BaseSpec
    adapter: CanonicalAdapter | None  # the LoRA that the heads are for; None: the base alone
    prompts: tuple[Prompt, ...]
    stop_token_ids: frozenset[int]


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

    wanted = WantedOutputs(
        source.model,
        source.adapter,
        recipe.dtype,
        recipe.max_new_tokens,
        source.stop_token_ids,
    )
    of_outputs = fingerprint(
        source.spec.name,
        None if source.adapter is None else digest(source.adapter),
        [prompt.tokens for prompt in source.prompts],
        [recipe.dtype, recipe.max_new_tokens, sorted(source.stop_token_ids)],
    )
    ends = base_ends(source.model, source.spec, source.adapter)
    started = time.monotonic()
    with KeptOutputs(work, of_outputs, ends.head.shape[1]) as kept:
        outputs = own_outputs(source.prompts, generate_for(wanted), kept)
    generated = time.monotonic() - started
    train, held_out = split(outputs, recipe.held_out, recipe.seed)
    vocabulary = (
        draft_vocabulary(train, recipe.vocabulary, source.stop_token_ids)
        if recipe.vocabulary
        else None
    )
    trainer = TurboTrainer(recipe, ends, vocabulary)
    rows = positions(train, recipe.depth)
    run = fingerprint(of_outputs, recipe.as_dict())
    heads, curve = trainer.train(rows, Checkpoints(work, run, checkpoint_every))
    exported = heads.export(vocabulary)
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
        depth=exported.depth,
        draft_vocabulary=len(ends.head) if vocabulary is None else len(vocabulary),
        parameters=sum(b.weight.numel() + b.bias.numel() for b in exported.blocks),
        medusa1_parameters=recipe.depth * (hidden * hidden + hidden + ends.head.numel()),
        warnings=tuple(_warnings(source, outputs)),
    )
    return exported, report


def _warnings(source: HeadsSource, outputs: Sequence[OwnOutput]) -> list[str]:
    return [
        *few_examples(len(outputs)),
        *short_outputs([len(output.tokens) for output in outputs]),
        *not_its_own(source.prompts, outputs, source.stop_token_ids),
    ]
