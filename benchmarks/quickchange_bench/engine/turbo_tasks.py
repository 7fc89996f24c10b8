"""Tasks of the Turbo benchmark: the demo tasks' held-out prompts, and free chat.

Prompts are token ids, so that a completion gets exactly what a chat's template makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

from quickchange_bench.load.workload import Request
from quickchange_training.demo.tasks import TASKS
from quickchange_training.examples import encode_prompt

CHAT = "chat"
TASK_NAMES = (*TASKS, CHAT)
CHAT_TOKENS = 96
_CHAT_FORMS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "What should I know about {}?",
    "Give me an opinion on {}, with reasons.",
)
_CHAT_SUBJECTS = (
    "rivers", "bread", "lighthouses", "winter", "trains", "honey", "the moon", "glass", "old maps",
    "bicycles", "tea", "volcanoes", "chess", "paper", "wolves", "bridges", "salt", "clocks",
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A task for one served model."""

    task: str
    model: str  # name on the server
    turbo: str  # the request's field with drafts on; "off" is the other side
    prompts: Mapping[str, tuple[int, ...]]  # token ids by the user's message
    max_tokens: int

    def requests(self, count: int) -> list[Request]:
        """The prompts in turn, repeated from the first where they do not suffice."""
        messages = islice(cycle(self.prompts), count)
        return [Request(k, message, self.max_tokens, None) for k, message in enumerate(messages)]


def demo_asks(
    tasks: Sequence[str], model: Path, served: Sequence[str], base: str, base_heads: str, count: int
) -> Iterator[Ask]:
    """Each task with `count` prompts at most. `served`: names of models; the first fits best.

    A demo task asks the alias TASK-turbo where the server has that, else the adapter TASK with the
    heads TASK-heads. Chat asks `base` with the heads `base_heads`.

    Raises:
        ValueError: an unknown task, or a name that is not served.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for task in tasks:
        if task not in TASK_NAMES:
            raise ValueError(f"--tasks {task!r} is none of {', '.join(TASK_NAMES)}")
        name, turbo = _drafting(task, served, base, base_heads)
        limit = CHAT_TOKENS if task == CHAT else TASKS[task].answer_tokens
        prompts = {text: _encoded(text, tokenizer) for text in _texts(task, count)}
        yield Ask(task, name, turbo, prompts, limit)


def _drafting(task: str, served: Sequence[str], base: str, base_heads: str) -> tuple[str, str]:
    """The model to ask and the value of the `turbo` field."""
    alias = f"{task}-turbo"
    if alias in served:
        return alias, "auto"
    model, heads = (base, base_heads) if task == CHAT else (task, f"{task}-heads")
    for name in (model, heads):
        if name not in served:
            raise ValueError(
                f"the store has neither {alias} nor {name}, only {', '.join(served)}: add it, or "
                "leave its task out of --tasks"
            )
    return model, heads


def _texts(task: str, count: int) -> list[str]:
    if task == CHAT:
        return [form.format(what) for what, form in product(_CHAT_SUBJECTS, _CHAT_FORMS)][:count]
    return [example.prompt for example in TASKS[task].examples("held-out", count, seed=0)]


def _encoded(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(encode_prompt([{"role": "user", "content": text}], tokenizer))
