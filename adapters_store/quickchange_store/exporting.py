"""Export of a stored adapter to a folder that other tools, and `importing`, read.

    lorax    adapter_config.json and adapter_model.safetensors for the LoRA, config.json and
             medusa_lm_head.safetensors for the heads: a Turbo LoRA has both
    vllm     the heads alone, as vLLM's Medusa
    peft     the LoRA alone, with its classification head where it has one; or virtual tokens,
             where it is nothing else
    turbo    as lorax, with the heads in Quickchange's own layout, which says all of them

What a layout can't say is refused before anything is written.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.canonical.turbo_part import TurboHeads
from quickchange_store.errors import BaseMismatchError, NameConflictError, UnsupportedFeatureError
from quickchange_store.formats.peft.peft_write import check_peft, write_peft
from quickchange_store.formats.prompts.prompt_writer import write_prompt
from quickchange_store.formats.turbo.medusa_write import (
    check_base,
    check_lorax,
    check_vllm,
    write_lorax,
    write_vllm,
)
from quickchange_store.formats.turbo.turbo_directory import write_turbo_directory

_Step = tuple[str, Callable[[Path], None]]


class ExportLayout(StrEnum):
    """Layouts that `export_adapter` writes."""

    LORAX = "lorax"
    VLLM = "vllm"
    PEFT = "peft"
    TURBO = "turbo"


def export_adapter(
    adapter: CanonicalAdapter, directory: Path, layout: ExportLayout, base: BaseSpec
) -> tuple[str, ...]:
    """Write `adapter` to `directory`, which must not exist; returns the parts that were written.

    Raises NameConflictError (the folder exists), BaseMismatchError (another base model),
    UnsupportedFeatureError (the layout can't say it; the message names the module or the part) and
    BaseModelError (vLLM's layout needs the base's weights). Nothing is left behind by a failure.
    """
    if directory.exists():
        raise NameConflictError(
            "the folder exists", key=str(directory), remedy="give one that does not exist yet"
        )
    if adapter.composition is not None:
        raise UnsupportedFeatureError(
            "it is a composition, which no layout of one adapter says",
            key=", ".join(adapter.needs),
            remedy="export the adapters that it is made of",
        )
    if adapter.tokenizer is not None:
        raise UnsupportedFeatureError(
            "it adds tokens or brings a chat template, which no layout here writes",
            key="tokenizer",
            remedy="keep the folder that it was added from",
        )
    if adapter.architecture != base.architecture:
        raise BaseMismatchError(
            f"the adapter is for {adapter.architecture}, the base model is {base.architecture}",
            key="architecture",
            remedy="give the base model that the adapter was made for (--model)",
        )
    steps = _steps(adapter, layout, base)
    unfinished = directory.with_name(f"{directory.name}.{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        for _, write in steps:
            write(unfinished)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return tuple(part for part, _ in steps)


def _steps(adapter: CanonicalAdapter, layout: ExportLayout, base: BaseSpec) -> list[_Step]:
    """Parts to write, in order: name and writer. Raises where the layout can't say one."""
    steps: list[_Step] = []
    if (prompt := adapter.prompt) is not None:
        _check_prompt(adapter, layout)
        return [("the virtual tokens", lambda to: write_prompt(prompt, to, adapter.base_name))]
    if adapter.updates and layout is not ExportLayout.VLLM:
        check_peft(adapter.updates, base)
        if adapter.invocation is not None and layout is ExportLayout.LORAX:
            raise UnsupportedFeatureError(
                "LoRAX knows no activated adapters, and would serve the whole text with it",
                key="format",
                remedy="export it with --format peft, or turbo where it has heads",
            )
        steps.append(("the LoRA", lambda to: write_peft(adapter, to, base)))
    if adapter.turbo is not None and layout is not ExportLayout.PEFT:
        steps.append(("the Turbo heads", _heads_writer(adapter, adapter.turbo, layout, base)))
    if not steps:
        part = "Turbo heads" if layout is ExportLayout.VLLM else "LoRA"
        raise UnsupportedFeatureError(
            f"the adapter has no {part}, and {layout}'s folder holds nothing else",
            key="format",
            remedy="choose the layout of what it has: `quickchange adapters show` says its kind",
        )
    return steps


def _check_prompt(adapter: CanonicalAdapter, layout: ExportLayout) -> None:
    """Raise unless PEFT's layout is asked for and virtual tokens are all that there is to say."""
    more = adapter.updates or adapter.turbo is not None or adapter.classifier is not None
    if layout is not ExportLayout.PEFT or more:
        raise UnsupportedFeatureError(
            "it has virtual tokens, which only PEFT's layout can say, and that alone",
            key="format",
            remedy="choose the layout peft for an adapter of virtual tokens alone; of others, keep "
            "the folder that it was added from",
        )


def _heads_writer(
    adapter: CanonicalAdapter, turbo: TurboHeads, layout: ExportLayout, base: BaseSpec
) -> Callable[[Path], None]:
    name = adapter.base_name
    if layout is ExportLayout.LORAX:
        check_lorax(turbo, base)
        return lambda to: write_lorax(turbo, to, name)
    if layout is ExportLayout.VLLM:
        check_vllm(turbo, base)
        return lambda to: write_vllm(turbo, to, base, name)
    check_base(turbo, base)
    return lambda to: write_turbo_directory(turbo, to, name, dict(adapter.source))
