"""Training of the demo's Turbo heads: prompts from the tasks, recipes from here."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from quickchange_training.demo.chat_prompts import chat_prompts
from quickchange_training.demo.demo_base import BASE_MODEL_ID, ensure_demo_base
from quickchange_training.demo.tasks import TASKS
from quickchange_training.examples import Example
from quickchange_training.turbo.head_maker import GenerateFor, HeadsSource, TurboReport
from quickchange_training.turbo.turbo_recipe import TurboRecipe

_CHECKPOINT_EVERY = 200  # optimizer steps


@dataclass(frozen=True)
class DemoHeadsRecipe:
    """Demo heads' training: a task (None: general prompts), its number of prompts, the recipe."""

    task: str | None
    prompts: int
    turbo: TurboRecipe


DEMO_HEADS_RECIPES = {
    "order-json-heads": DemoHeadsRecipe("order-json", 2000, TurboRecipe()),
    "sql-heads": DemoHeadsRecipe("sql", 2000, TurboRecipe()),
    "docstring-heads": DemoHeadsRecipe("docstring", 1500, TurboRecipe()),
    "base-heads": DemoHeadsRecipe(
        None, 800, TurboRecipe(depth=6, vocabulary=4096, epochs=3, max_new_tokens=128)
    ),
}


def demo_prompts(recipe: DemoHeadsRecipe) -> list[Example]:
    """Prompts of the training split, as chats without an answer."""
    seed = recipe.turbo.seed
    if recipe.task is None:
        texts = chat_prompts(recipe.prompts, seed)
    else:
        texts = [e.prompt for e in TASKS[recipe.task].examples("train", recipe.prompts, seed)]
    subject = recipe.task or "chat"
    return [Example(text, "", f"{subject} prompt {i}") for i, text in enumerate(texts)]


def train_demo_heads(
    name: str, recipe: DemoHeadsRecipe, out: Path, generate_for: GenerateFor
) -> TurboReport:
    """Train the heads `name` by `recipe` into the directory `out`.

    Resumes an interrupted run from the folder `out`.training, if it is there.
    """
    import shutil

    from transformers import AutoTokenizer

    from quickchange_store.base_model.base_spec import base_spec
    from quickchange_store.importing import read_adapter
    from quickchange_training.adapters.adapter_job import work_folder
    from quickchange_training.demo import DEMO_ADAPTERS
    from quickchange_training.turbo.base_ends import stop_token_ids
    from quickchange_training.turbo.head_maker import make_heads
    from quickchange_training.turbo.turbo_data import encode_prompts
    from quickchange_training.turbo.turbo_job import save_heads

    base = str(ensure_demo_base())
    spec = base_spec(base, BASE_MODEL_ID)
    tokenizer = AutoTokenizer.from_pretrained(base)
    longest = recipe.turbo.max_length - recipe.turbo.max_new_tokens
    prompts = encode_prompts(demo_prompts(recipe), tokenizer, chat=True, longest=longest)
    adapter = None
    if recipe.task is not None:
        adapter = read_adapter(DEMO_ADAPTERS[recipe.task].path, spec).adapter
    source = HeadsSource(base, spec, adapter, tuple(prompts), stop_token_ids(base, tokenizer))
    work = work_folder(out)
    heads, report = make_heads(source, recipe.turbo, generate_for, work, _CHECKPOINT_EVERY)
    notes = {
        "command": f"quickchange train demo {name} --out DIR",
        "task": recipe.task,
        "prompts": recipe.prompts,
        "turbo": recipe.turbo.as_dict(),
        "python": platform.python_version(),
        "report": asdict(report),
    }
    save_heads(heads, out, spec, notes)
    shutil.rmtree(work)
    return report
