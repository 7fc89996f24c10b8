"""A Turbo heads training from prompts to a folder and, where wanted, into a store.

The folder holds the heads and, where they are for a LoRA, the LoRA beside them: one Turbo LoRA.
Outputs and checkpoints are kept in a folder beside it until the end, for --resume.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_training.adapters.adapter_job import (
    PromptFormat,
    Publication,
    check_folders,
    load_tokenizer,
    uses_chat,
    work_folder,
)
from quickchange_training.errors import OutputError, RecipeError
from quickchange_training.turbo.fitting import fitted_adapter, starting_heads
from quickchange_training.turbo.head_maker import GenerateFor, HeadsSource, TurboReport, make_heads
from quickchange_training.turbo.recorded_requests import RecordingServer, recorded_requests
from quickchange_training.turbo.turbo_recipe import TurboRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quickchange_store.canonical.canonical_adapter import BaseSpec
    from quickchange_store.canonical.turbo_part import TurboHeads
    from quickchange_store.importing import Added
    from quickchange_training.turbo.turbo_data import Prompt


@dataclass(frozen=True)
class TurboJob:
    """Options of `quickchange train turbo`."""

    model: str  # a folder or a hub id
    base_name: str  # the base's name in the heads' folder
    data: Path | RecordingServer  # prompts, or the server that has recorded requests
    adapter: Path | None  # folder of the LoRA that the heads are for; None: the base alone
    out: Path
    prompt_format: PromptFormat
    recipe: TurboRecipe
    publication: Publication | None
    resume: bool
    checkpoint_every: int  # optimizer steps
    on: str | None = None  # the adapter of the store that the heads are for, instead of `adapter`
    start: str | None = None  # heads to go on from; None: those that draft for `on`, if there are
    store: str | None = None  # where `on` and `start` are

    @property
    def work(self) -> Path:
        """Folder of outputs and checkpoints until the end."""
        return work_folder(self.out)


def run(job: TurboJob, generate_for: GenerateFor) -> tuple[TurboReport, Added | None]:
    """Make outputs, train, save and publish. What can be refused is refused first.

    Raises TrainingError, and StoreError where the adapter can't be read or published.
    """
    from quickchange_store.base_model.base_spec import base_spec
    from quickchange_store.names import check_name

    check_folders(job.out, resume=job.resume)
    if job.publication is not None:
        check_name(job.publication.name)
    spec = base_spec(job.model, job.base_name)
    source = _source(job, spec)
    heads, report = make_heads(source, job.recipe, generate_for, job.work, job.checkpoint_every)
    save_heads(heads, job.out, spec, _notes(job, report), beside=job.adapter)
    shutil.rmtree(job.work)
    if job.publication is None:
        return report, None
    from quickchange_store.importing import add_adapter
    from quickchange_store.store import Store

    store = Store(job.publication.store)
    return report, add_adapter(store, job.publication.name, job.out, spec)


def _source(job: TurboJob, spec: BaseSpec) -> HeadsSource:
    from quickchange_store.importing import read_adapter
    from quickchange_store.store import Store
    from quickchange_training.turbo.base_ends import stop_token_ids

    wanted = job.on is not None or job.start is not None
    store = Store.at(job.store) if wanted and job.store is not None else None
    adapter = None if job.adapter is None else read_adapter(job.adapter, spec).adapter
    start = None if job.start is None else starting_heads(job.start, store, spec)
    tokenizer = load_tokenizer(job.model)
    stop = stop_token_ids(job.model, tokenizer)
    if job.on is None or store is None:
        if isinstance(job.data, RecordingServer):
            raise RecipeError("--recorded: requests are recorded by adapter; name it with --on")
        prompts = _prompts(job.data, job, tokenizer)
        return HeadsSource(job.model, spec, adapter, tuple(prompts), stop, start=start)
    fitted = fitted_adapter(store, job.on, spec)
    start = start or fitted.drafting
    if not isinstance(job.data, RecordingServer):
        prompts = _prompts(job.data, job, tokenizer)
        return HeadsSource(job.model, spec, fitted.adapter, tuple(prompts), stop, start=start)
    recorded = recorded_requests(job.data, fitted.name, fitted.digest, job.recipe.max_length)
    return HeadsSource(
        job.model,
        spec,
        fitted.adapter,
        recorded.prompts,
        stop,
        said=recorded.said,
        start=start,
        tenant=recorded.tenant,
    )


def _prompts(file: Path, job: TurboJob, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    from quickchange_training.examples import read_prompts
    from quickchange_training.turbo.turbo_data import encode_prompts

    examples = read_prompts(file)
    longest = job.recipe.max_length - job.recipe.max_new_tokens
    chat = uses_chat(examples, tokenizer, job.prompt_format)
    return encode_prompts(examples, tokenizer, chat=chat, longest=longest)


def save_heads(
    heads: TurboHeads,
    out: Path,
    base: BaseSpec,
    notes: Mapping[str, Any],
    *,
    beside: Path | None = None,
) -> None:
    """Write the heads' folder `out`, with a copy of the PEFT adapter in `beside`; by one rename.

    The layout is LoRAX's where it can hold the heads, with the notes in turbo_recipe.json, else
    Quickchange's own. Raises OutputError where `out` exists.
    """
    from quickchange_store.errors import UnsupportedFeatureError
    from quickchange_store.formats.turbo.medusa_write import check_lorax, write_lorax
    from quickchange_store.formats.turbo.turbo_directory import write_turbo_directory

    if out.exists():
        raise OutputError(f"{out} is there already; give another folder or remove it")
    scratch = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        if beside is not None:
            shutil.copytree(beside, scratch)
        scratch.mkdir(exist_ok=True)
        try:
            check_lorax(heads, base)
        except UnsupportedFeatureError:
            write_turbo_directory(heads, scratch, base.name, notes)
        else:
            write_lorax(heads, scratch, base.name)
            recorded = json.dumps(notes, indent=2, sort_keys=True)
            (scratch / "turbo_recipe.json").write_text(recorded + "\n")
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _notes(job: TurboJob, report: TurboReport) -> dict[str, Any]:
    """Notes recorded with the heads, without paths of this machine."""
    return {
        "command": "quickchange train turbo",
        "data": job.data.name if isinstance(job.data, Path) else "recorded requests",
        "adapter": job.on if job.adapter is None else job.adapter.name,
        "prompt_format": job.prompt_format,
        "turbo": job.recipe.as_dict(),
        "report": asdict(report),
    }
