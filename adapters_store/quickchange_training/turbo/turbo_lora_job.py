"""A Turbo LoRA from examples: the LoRA first, then heads on its outputs, in one folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_training.adapters import adapter_job
from quickchange_training.adapters.adapter_job import PromptFormat, Publication
from quickchange_training.adapters.adapter_recipes import LoraRecipe
from quickchange_training.turbo import turbo_job
from quickchange_training.turbo.head_maker import GenerateFor, TurboReport
from quickchange_training.turbo.turbo_recipe import TurboRecipe

if TYPE_CHECKING:
    from quickchange_store.importing import Added


@dataclass(frozen=True)
class TurboLoraJob:
    """Options of `quickchange train turbo-lora`, with the fields of the two jobs."""

    model: str
    base_name: str
    data: Path
    held_out: Path | None
    out: Path
    prompt_format: PromptFormat
    lora: LoraRecipe
    turbo: TurboRecipe
    publication: Publication | None
    resume: bool
    checkpoint_every: int

    @property
    def lora_out(self) -> Path:
        """Folder of the LoRA until it is copied beside its heads."""
        return adapter_job.work_folder(self.out) / "lora"

    def of_lora(self) -> adapter_job.AdapterJob:
        """The job that trains the LoRA."""
        return adapter_job.AdapterJob(
            model=self.model,
            base_name=self.base_name,
            data=self.data,
            held_out=self.held_out,
            out=self.lora_out,
            prompt_format=self.prompt_format,
            recipe=self.lora,
            publication=None,
            resume=self.resume,
            checkpoint_every=self.checkpoint_every,
        )

    def of_heads(self) -> turbo_job.TurboJob:
        """The job that trains the heads, in the folder of the first."""
        return turbo_job.TurboJob(
            model=self.model,
            base_name=self.base_name,
            data=self.data,
            adapter=self.lora_out,
            out=self.out,
            prompt_format=self.prompt_format,
            recipe=self.turbo,
            publication=self.publication,
            resume=True,
            checkpoint_every=self.checkpoint_every,
        )


def run(
    job: TurboLoraJob, generate_for: GenerateFor
) -> tuple[dict[str, Any], TurboReport, Added | None]:
    """Train both, save and publish; the LoRA's report is read from its recipe.json.

    Raises TrainingError, and StoreError where the adapter can't be published.
    """
    adapter_job.check_folders(job.out, resume=job.resume)
    if job.publication is not None:
        from quickchange_store.names import check_name

        check_name(job.publication.name)
    if not job.lora_out.exists():
        adapter_job.run(job.of_lora())
    said = json.loads((job.lora_out / "recipe.json").read_text())["report"]
    report, added = turbo_job.run(job.of_heads(), generate_for)
    return said, report, added
