"""Training of the demo adapters: data from the tasks, recipes from here."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from quickchange_training.adapters.adapter_recipes import LoraRecipe
from quickchange_training.adapters.adapter_trainer import (
    TrainingReport,
    save_adapter,
    train_adapter,
)
from quickchange_training.demo.demo_base import BASE_MODEL_ID, ensure_demo_base
from quickchange_training.demo.tasks import TASKS, Split, Task
from quickchange_training.examples import Example, as_chat, encode

_HELD_OUT_FOR_LOSS = 64


@dataclass(frozen=True)
class DemoRecipe:
    """A demo adapter's training: the number of its task's examples, and the LoRA recipe."""

    examples: int
    lora: LoraRecipe


DEMO_RECIPES = {
    "order-json": DemoRecipe(
        640, LoraRecipe(rank=8, alpha=16, lr=2e-3, batch_size=4, dtype="bfloat16")
    ),
    "sql": DemoRecipe(480, LoraRecipe(rank=8, alpha=16, lr=2e-3, batch_size=8, dtype="bfloat16")),
    "docstring": DemoRecipe(
        640, LoraRecipe(rank=16, alpha=32, lr=1e-3, batch_size=8, dtype="bfloat16")
    ),
}


def demo_examples(task: Task, split: Split, count: int, seed: int) -> list[Example]:
    """A task's examples as chats, for training and for loss."""
    made = task.examples(split, count, seed)
    return as_chat(
        Example(e.prompt, e.completion, f"{task.name} {split} example {i}")
        for i, e in enumerate(made)
    )


def train_demo(name: str, recipe: DemoRecipe, out: Path) -> TrainingReport:
    """Train the adapter of the task `name` by `recipe` into the PEFT directory `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = TASKS[name]
    base = ensure_demo_base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, recipe.lora.dtype))
    seed, length = recipe.lora.seed, recipe.lora.max_length
    train = encode(demo_examples(task, "train", recipe.examples, seed), tokenizer, length)
    held_out = encode(demo_examples(task, "held-out", _HELD_OUT_FOR_LOSS, seed), tokenizer, length)
    adapted, report = train_adapter(model, recipe.lora, train, held_out, tokenizer.pad_token_id)
    notes = {
        "command": f"quickchange train demo {name} --out DIR",
        "task": name,
        "examples": recipe.examples,
        "lora": recipe.lora.as_dict(),
        "python": platform.python_version(),
        "report": asdict(report),
    }
    save_adapter(adapted, out, BASE_MODEL_ID, notes)
    return report
