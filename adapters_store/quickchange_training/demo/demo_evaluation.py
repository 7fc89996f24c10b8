"""Held-out scores of the demo adapters: greedy answers by transformers and PEFT, float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quickchange_training.adapters.peft_adapters import without_peft_noise
from quickchange_training.demo.demo_base import ensure_demo_base
from quickchange_training.demo.tasks import Task, TaskExample
from quickchange_training.examples import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DemoComparison:
    """One task's held-out measures and answers, without and with the adapter."""

    task: str
    examples: tuple[TaskExample, ...]
    base: dict[str, float]
    adapter: dict[str, float]
    base_answers: tuple[str, ...]
    adapter_answers: tuple[str, ...]

    def answers(self) -> list[dict[str, str]]:
        """One record an example: prompt, expected answer, both answers."""
        rows = zip(self.examples, self.base_answers, self.adapter_answers, strict=True)
        return [
            {
                "task": self.task,
                "prompt": example.prompt,
                "expected": example.completion,
                "base": base,
                "adapter": adapter,
            }
            for example, base, adapter in rows
        ]


def compare(task: Task, adapter: Path, count: int, seed: int, batch_size: int) -> DemoComparison:
    """Answer `count` held-out examples of `task` with the demo base alone and with `adapter`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    examples = task.examples("held-out", count, seed)
    folder = ensure_demo_base()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    limit = task.answer_tokens
    plain = greedy_answers(model, tokenizer, examples, limit, batch_size, f"{task.name}: base")
    with without_peft_noise():
        adapted = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    tuned = greedy_answers(adapted, tokenizer, examples, limit, batch_size, f"{task.name}: adapter")
    return DemoComparison(
        task=task.name,
        examples=tuple(examples),
        base=task.score(examples, plain),
        adapter=task.score(examples, tuned),
        base_answers=tuple(plain),
        adapter_answers=tuple(tuned),
    )


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TaskExample],
    new_tokens: int,
    batch_size: int,
    label: str,
) -> list[str]:
    """The answer to each prompt as a chat, in order. `tokenizer` must pad on the left."""
    from tqdm import tqdm

    prompts = [encode_prompt([{"role": "user", "content": e.prompt}], tokenizer) for e in examples]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(prompts), batch_size), desc=label, unit="batch"):
        rows = by_length[start : start + batch_size]
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, return_tensors="pt")
        output = model.generate(**padded, max_new_tokens=new_tokens, do_sample=False)
        new = output[:, padded["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    return answers


def as_table(comparisons: Sequence[DemoComparison]) -> str:
    """A Markdown table: a line for each task and measure."""
    lines = ["| task | measure | held-out examples | base | adapter |", "|---|---|---|---|---|"]
    for c in comparisons:
        lines += [
            f"| {c.task} | {measure} | {len(c.examples)} | {c.base[measure]:.3f} | {value:.3f} |"
            for measure, value in c.adapter.items()
        ]
    return "\n".join(lines)
