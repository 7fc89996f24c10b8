"""An adapter's training from files to a folder and, where wanted, into a store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quickchange_store.base_model.base_weights import load_base
from quickchange_store.errors import BaseModelError
from quickchange_training.adapters.adapter_recipes import AdapterRecipe, AloraRecipe
from quickchange_training.checkpoint import Checkpoints, fingerprint
from quickchange_training.errors import DataError, OutputError, model_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quickchange_store.importing import Added
    from quickchange_training.adapters.adapter_trainer import TrainingReport
    from quickchange_training.examples import Encoded, Example

PromptFormat = Literal["auto", "chat", "plain"]


@dataclass(frozen=True)
class Publication:
    """Store and name under which the trained adapter is published."""

    store: str  # folder or URL
    name: str


@dataclass(frozen=True)
class AdapterJob:
    """Options of `quickchange train KIND`."""

    model: str  # a folder or a hub id
    base_name: str  # the base's name in the adapter
    data: Path
    held_out: Path | None
    out: Path
    prompt_format: PromptFormat
    recipe: AdapterRecipe
    publication: Publication | None
    resume: bool
    checkpoint_every: int  # optimizer steps


def run(job: AdapterJob) -> tuple[TrainingReport, Added | None]:
    """Train, save and publish. What can be refused is refused before the training.

    Until the end checkpoints are kept in a folder beside `out`, for --resume. Raises TrainingError,
    and StoreError where the adapter can't be published.
    """
    from quickchange_store.names import check_name
    from quickchange_training.adapters.adapter_trainer import save_adapter, train_adapter
    from quickchange_training.examples import read_examples, split

    check_folders(job.out, resume=job.resume)
    if job.publication is not None:
        check_name(job.publication.name)
    train_examples = read_examples(job.data)
    if job.held_out is not None:
        held_out_examples = read_examples(job.held_out)
    else:
        share, seed = job.recipe.held_out, job.recipe.seed
        train_examples, held_out_examples = split(train_examples, share, seed)
    model, tokenizer = _load(job)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    recipe = job.recipe
    if isinstance(recipe, AloraRecipe):
        recipe = _tokenised(recipe, tokenizer)
        pad_id = padding_apart_from(recipe, pad_id)
    train = _encode(train_examples, tokenizer, job)
    held_out = _encode(held_out_examples, tokenizer, job)
    if isinstance(recipe, AloraRecipe):
        check_invocations([*train_examples, *held_out_examples], [*train, *held_out], recipe)
    run_key = fingerprint(job.base_name, recipe.kind, recipe.as_dict(), [e.tokens for e in train])
    checkpoints = Checkpoints(work_folder(job.out), run_key, job.checkpoint_every)
    adapted, report = train_adapter(model, recipe, train, held_out, pad_id, checkpoints)
    save_adapter(adapted, job.out, job.base_name, _notes(job, recipe, len(train), report))
    shutil.rmtree(work_folder(job.out), ignore_errors=True)  # absent after a very short run
    return report, _publish(job)


def work_folder(out: Path) -> Path:
    """Folder of checkpoints beside `out`, kept until `out` is written."""
    return out.parent / f"{out.name}.training"


def check_folders(out: Path, *, resume: bool) -> None:
    """Raise OutputError where `out` exists, or an interrupted run's folder without --resume."""
    if out.exists():
        raise OutputError(f"--out {out} is there already; give another folder or remove it")
    if work_folder(out).exists() and not resume:
        raise OutputError(
            f"{work_folder(out)} holds what an interrupted run has done; go on from it with "
            "--resume, or remove it"
        )


def _load(job: AdapterJob) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    tokenizer = load_tokenizer(job.model)
    try:
        model = load_base(job.model, dtype=getattr(torch, job.recipe.dtype))
    except (OSError, ValueError, BaseModelError) as error:
        raise model_error(job.model, error) from error
    return model, tokenizer


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise model_error(model, error) from error
    return tokenizer


def uses_chat(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> bool:
    """True if bare prompts become user messages.

    Raises DataError for a conversation that the tokenizer has no template for.
    """
    has_template = tokenizer.chat_template is not None
    chat = prompt_format == "chat" or (prompt_format == "auto" and has_template)
    conversation = next((e for e in examples if chat or not isinstance(e.prompt, str)), None)
    if conversation is not None and not has_template:
        raise DataError(
            f"{conversation.origin}: a conversation, but the base's tokenizer has no chat "
            'template; give "prompt" and "completion" with --prompt-format plain'
        )
    return chat


def _encode(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, job: AdapterJob
) -> list[Encoded]:
    from quickchange_training.examples import as_chat, encode

    chat = uses_chat(examples, tokenizer, job.prompt_format)
    return encode(as_chat(examples) if chat else examples, tokenizer, job.recipe.max_length)


def _tokenised(recipe: AloraRecipe, tokenizer: PreTrainedTokenizerBase) -> AloraRecipe:
    """The recipe with its invocation as token ids. Raises RecipeError for a text without any."""
    if not isinstance(recipe.invocation, str):
        return recipe
    ids = tokenizer(recipe.invocation, add_special_tokens=False)["input_ids"]
    return replace(recipe, invocation=tuple(ids))


def padding_apart_from(recipe: AloraRecipe, pad_id: int) -> int:
    """A token id for padding that is not in the invocation, which PEFT looks for in padding too."""
    free = set(range(len(recipe.invocation) + 1)) - set(recipe.invocation)
    return min(free) if pad_id in recipe.invocation else pad_id


def check_invocations(
    examples: Sequence[Example], encoded: Sequence[Encoded], recipe: AloraRecipe
) -> None:
    """Raise DataError for a prompt without the invocation, or an answer with it.

    PEFT's aLoRA acts from the last place on that has the tokens: without one it would learn
    nothing, and one in the answer would move it behind what is to be learned.
    """
    wanted = recipe.invocation
    for example, e in zip(examples, encoded, strict=True):
        places = [i for i in range(len(e.tokens)) if e.tokens[i : i + len(wanted)] == wanted]
        if not places or places[-1] + len(wanted) > e.prompt_length:
            where = "is in the answer" if places else "is not in the prompt"
            raise DataError(
                f"{example.origin}: the invocation {list(wanted)} {where}, as tokens; end every "
                "prompt with --invocation, or give the token ids that prompts have: "
                "--invocation [1, 2]"
            )


def _notes(
    job: AdapterJob, recipe: AdapterRecipe, examples: int, report: TrainingReport
) -> dict[str, Any]:
    """Content of recipe.json, without paths of this machine."""
    return {
        "command": f"quickchange train {recipe.kind}",
        "base": job.base_name,
        "data": job.data.name,
        "held_out_data": job.held_out.name if job.held_out is not None else None,
        "examples": examples,
        "prompt_format": job.prompt_format,
        recipe.kind: recipe.as_dict(),
        "report": asdict(report),
    }


def _publish(job: AdapterJob) -> Added | None:
    if job.publication is None:
        return None
    from quickchange_store.base_model.base_spec import base_spec
    from quickchange_store.importing import add_adapter
    from quickchange_store.store import Store

    spec = base_spec(job.model, job.base_name)
    return add_adapter(Store(job.publication.store), job.publication.name, job.out, spec)
