"""Training of adapters: a loop with AdamW, warm-up and cosine decay, and the saving.

The loss is on the answer's tokens alone, a mean over the tokens of a batch. Knows nothing of files
of examples, of stores or of command lines.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from quickchange_store.formats.tensors import save_tensors
from quickchange_training.adapters.adapter_recipes import AdapterRecipe, BottleneckRecipe
from quickchange_training.adapters.bottleneck_adapters import WEIGHTS as BOTTLENECKS
from quickchange_training.adapters.bottleneck_adapters import BottleneckedModel
from quickchange_training.adapters.peft_adapters import WEIGHTS as PEFT
from quickchange_training.adapters.peft_adapters import add_peft, peft_config, peft_tensors
from quickchange_training.checkpoint import unsaved
from quickchange_training.errors import OutputError
from quickchange_training.examples import IGNORED, Encoded, TrainingBatch, batches, collate

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel

    from quickchange_training.checkpoint import Checkpoints


@dataclass(frozen=True)
class TrainingReport:
    """Figures of a run. Losses in nats per answer token; None where nothing was held out."""

    examples: int  # learned from
    steps: int
    tokens: int  # that went through the model, padding not counted
    seconds: float
    train_loss: float  # mean over the last tenth of the steps
    held_out_loss: float | None
    parameters: int  # trained values


def train_adapter(
    model: PreTrainedModel,
    recipe: AdapterRecipe,
    train: Sequence[Encoded],
    held_out: Sequence[Encoded] = (),
    pad_id: int = 0,
    checkpoints: Checkpoints | None = None,
) -> tuple[torch.nn.Module, TrainingReport]:
    """Train an adapter on `model`, whose weights stay frozen.

    It goes on from the last checkpoint, where there is one. The same model, recipe and data on the
    same machine give the same adapter, interrupted or not.
    """
    from tqdm import tqdm

    torch.manual_seed(recipe.seed)
    adapted = attach(model, recipe)
    adapted.train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    total = total_steps(len(train), recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_share(step, total, recipe.warmup)
    )
    losses: list[float] = []
    tokens, started = 0, time.monotonic()
    saved = None if checkpoints is None else checkpoints.load()
    if saved is not None:
        losses, tokens = saved["losses"], saved["tokens"]
        _restore(saved, adapted, optimizer, schedule)

    def state() -> dict[str, Any]:
        return {**_state(adapted, optimizer, schedule), "losses": losses, "tokens": tokens}

    saving = nullcontext(unsaved) if checkpoints is None else checkpoints.saving()
    with (
        saving as stepped,
        tqdm(total=total, initial=len(losses), desc=f"train {recipe.kind}", unit="step") as bar,
    ):
        for group in islice(_endless(train, recipe), len(losses), total):
            loss = answer_loss(adapted, collate(group, pad_id))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            tokens += sum(len(e.tokens) for e in group)
            bar.update()
            bar.set_postfix(loss=f"{_tail_mean(losses):.3f}", refresh=False)
            stepped(len(losses), state)
    report = TrainingReport(
        examples=len(train),
        steps=total,
        tokens=tokens,
        seconds=time.monotonic() - started,
        train_loss=_tail_mean(losses),
        held_out_loss=held_out_loss(adapted, held_out, recipe.batch_size, pad_id)
        if held_out
        else None,
        parameters=sum(p.numel() for p in trained),
    )
    return adapted, report


def _state(adapted: torch.nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> dict[str, Any]:
    """State that the rest of a run depends on, the dropout's generator included."""
    trained = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    return {
        "adapter": trained,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
    }


def _restore(
    saved: dict[str, Any], adapted: torch.nn.Module, optimizer: Optimizer, schedule: LRScheduler
) -> None:
    adapted.load_state_dict(saved["adapter"], strict=False)  # the base's own stay as they are
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["random"])


def attach(model: PreTrainedModel, recipe: AdapterRecipe) -> torch.nn.Module:
    """`model` with a fresh adapter of the recipe's kind, its own weights frozen.

    Its outputs are still the model's, but for types of PEFT that begin otherwise. Raises
    RecipeError where the model or PEFT can't take what the recipe says.
    """
    adapted: torch.nn.Module
    if isinstance(recipe, BottleneckRecipe):
        adapted = BottleneckedModel(model, recipe)
    else:
        adapted = add_peft(model, recipe)
    return adapted


def total_steps(examples: int, recipe: AdapterRecipe) -> int:
    """Optimizer steps of a run over `examples` examples."""
    per_epoch = math.ceil(examples / recipe.batch_size)
    return recipe.steps if recipe.steps is not None else recipe.epochs * per_epoch


def lr_share(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate at `step`: linear up, then half a cosine to a tenth."""
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1.0, total - rising)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


def answer_loss(model: torch.nn.Module, batch: TrainingBatch) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, a float32 scalar."""
    return functional.cross_entropy(_logits(model, batch), batch.labels.flatten())


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, held_out: Sequence[Encoded], batch_size: int, pad_id: int
) -> float:
    """Mean loss over the answers of all examples, in nats per token."""
    model.eval()
    by_length = sorted(held_out, key=lambda e: len(e.tokens))
    total, count = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        batch = collate(by_length[start : start + batch_size], pad_id)
        labels = batch.labels.flatten()
        total += functional.cross_entropy(_logits(model, batch), labels, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return total / count


def _logits(model: torch.nn.Module, batch: TrainingBatch) -> torch.Tensor:
    kept = batch.tokens.shape[1] - batch.first
    output = model(
        input_ids=batch.tokens, attention_mask=batch.mask, logits_to_keep=kept, use_cache=False
    )
    logits: torch.Tensor = output.logits  # [B, kept, V]
    return logits.flatten(0, 1).float()


def _endless(train: Sequence[Encoded], recipe: AdapterRecipe) -> Iterator[list[Encoded]]:
    rng = random.Random(recipe.seed)
    while True:
        yield from batches(train, recipe.batch_size, rng)


def _tail_mean(losses: Sequence[float]) -> float:
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def save_adapter(
    adapted: torch.nn.Module, out: Path, base_name: str, notes: dict[str, Any]
) -> None:
    """Write the adapter's folder in bfloat16 with `notes` as recipe.json; it appears by one rename.

    The layout is PEFT's, of bottlenecks that of AdapterHub's `adapters`. `base_name` is the base's
    name in the adapter, where no path of this machine goes. Raises OutputError when `out` is there.
    """
    if out.exists():
        raise OutputError(f"{out} is there already; give another folder or remove it")
    scratch = out.parent / f".{out.name}.{os.getpid()}.partial"
    scratch.mkdir(parents=True)
    try:
        if isinstance(adapted, BottleneckedModel):
            file, tensors, config = BOTTLENECKS, adapted.tensors(), adapted.config(base_name)
        else:
            file, tensors, config = PEFT, peft_tensors(adapted), peft_config(adapted, base_name)
        save_tensors({name: _kept(tensor) for name, tensor in tensors.items()}, scratch / file)
        _write_json(scratch / "adapter_config.json", config)
        _write_json(scratch / "recipe.json", notes)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is saved: numbers in bfloat16, indices as they are."""
    made = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
    return made.contiguous()


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")
