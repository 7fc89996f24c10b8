"""One type of the sweep: a tiny random model of it served, and held against transformers and PEFT.

Two prompts of different length run as the base and under a LoRA on every linear, all in one batch
that has more rows than the model has positions; the last prompt is read in two chunks.
Transformers' eager attention, without a cache, says what is right, token for token.
"""

from __future__ import annotations

import random
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from quickchange_bench.architectures.tiny_configs import (
    CACHED,
    REFERENCE_ATTENTION,
    VOCABULARY,
    tiny_model,
)
from quickchange_server.config import Settings
from quickchange_server.entrypoints.in_process_engine import InProcessEngine
from quickchange_server.errors import QuickchangeError
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.errors import StoreError
from quickchange_store.importing import read_adapter

Outcome = Literal["equal", "refused", "wrong", "crash", "not built", "-"]

NEW_TOKENS = 12
PROMPT_LENGTHS = (6, 37)
_BATCH_ROWS = 80  # of 86 in all: the last prompt's end is left for the next step
_SEEDS = 6
_CLEAR = 1e-3  # least distance of the best logit from the second, of their largest: no near tie
_ADAPTER = "lora"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What became of one type: the base's outcome, a LoRA's, and what was said."""

    base: Outcome
    lora: Outcome = "-"
    says: str = ""  # a refusal, an error, or what differs


class NoClearCaseError(Exception):
    """No seed gives answers without near ties."""


def run_case(name: str) -> SweepResult:
    """Make, serve and judge one type or variant."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        try:
            case = _made(name, Path(folder))
        except Exception as error:
            return SweepResult("not built", says=_line(error))
        return case.judged()


@dataclass(frozen=True)
class _Case:
    """A saved model and its right answers, one for each prompt."""

    folder: Path
    attention: str  # the reference's
    cached: bool  # the reference keeps keys and values
    prompts: list[list[int]]
    answers: list[list[int]]

    def judged(self) -> SweepResult:
        adapter: CanonicalAdapter | None = None
        lora_answers: list[list[int]] = []
        without = SweepResult("-")
        try:
            adapter, lora_answers = self._adapter()
        except StoreError as error:
            without = SweepResult("-", "refused", _line(error))
        except Exception as error:  # PEFT's
            without = SweepResult("-", "not built", _line(error))
        served = self._served(adapter)
        if isinstance(served, SweepResult):
            return served
        base = _judged(served[: len(self.prompts)], self.answers)
        if adapter is None:
            return replace(without, base=base)
        lora = _judged(served[len(self.prompts) :], lora_answers)
        differing = "" if base == lora == "equal" else f"{served} for {self.answers, lora_answers}"
        return SweepResult(base, lora, differing)

    def _adapter(self) -> tuple[CanonicalAdapter, list[list[int]]]:
        """A LoRA as the store reads it, and PEFT's answers with it."""
        for seed in range(_SEEDS):
            torch.manual_seed(seed)
            tuned = self._tuned().eval()
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, std=0.25)
            answers = [_greedy(tuned, prompt, cached=self.cached) for prompt in self.prompts]
            if all(clear for _, clear in answers):
                break
        else:
            raise NoClearCaseError
        tuned.save_pretrained(self.folder / "adapter")
        spec = base_spec(str(self.folder / "base"))
        read = read_adapter(self.folder / "adapter", spec).adapter
        return read, [tokens for tokens, _ in answers]

    def _tuned(self) -> PeftModel:
        """The model with a LoRA on every linear that PEFT allows: not always on `out_proj`.

        Of a model that also sees or hears, on those of its language model.
        """
        try:
            return self._with_lora([])
        except ValueError as error:
            if "incompatible" not in str(error):
                raise
            return self._with_lora(["out_proj"])

    def _with_lora(self, excluded: list[str]) -> PeftModel:
        model = _reference(self.folder / "base", self.attention)
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules="all-linear",
            exclude_modules=[*excluded, *_outside_text(model)] or None,
        )
        return get_peft_model(model, config)

    def _served(self, adapter: CanonicalAdapter | None) -> list[list[int]] | SweepResult:
        settings = Settings.model_validate(
            {
                "model": str(self.folder / "base"),
                "store": str(self.folder / "store"),
                "dtype": "float32",
                "block_size": 4,
                "kv_cache_bytes": 4 << 20,
                "max_batch_tokens": _BATCH_ROWS,
                "max_sequences": 6,
                "adapter_device_bytes": 16 << 20,
                "adapter_host_bytes": 16 << 20,
                "turbo": False,
            }
        )
        under = [(), () if adapter is None else (Component(_ADAPTER, 1.0),)]
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
        requests = [
            Submit(f"{i}-{j}", tuple(prompt), params, components, seed=0)
            for i, components in enumerate(under)
            for j, prompt in enumerate(self.prompts)
        ]
        try:
            with InProcessEngine(settings, lambda _: adapter) as engine:  # type: ignore[arg-type, return-value]
                ran = engine.run(requests)
        except (QuickchangeError, StoreError) as error:
            return SweepResult("refused", says=_line(error))
        except Exception as error:
            return SweepResult("crash", says=_line(error))
        return [list(completion.token_ids) for completion in ran.completions]


def _outside_text(model: Any) -> list[str]:
    """Paths of the linears that text does not pass through."""
    if model.config.get_text_config() is model.config:
        return []
    text = {*model.get_decoder().modules(), model.get_output_embeddings()}
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and m not in text]


def _made(name: str, folder: Path) -> _Case:
    attention = REFERENCE_ATTENTION.get(name, "eager")
    generator = random.Random(0)
    prompts = [[generator.randrange(3, VOCABULARY) for _ in range(n)] for n in PROMPT_LENGTHS]
    for seed in range(_SEEDS):
        tiny_model(name, seed).save_pretrained(folder / "base")
        model = _reference(folder / "base", attention)
        answers = [_greedy(model, prompt, cached=name in CACHED) for prompt in prompts]
        if all(clear for _, clear in answers):
            return _Case(
                folder, attention, name in CACHED, prompts, [tokens for tokens, _ in answers]
            )
    raise NoClearCaseError


def _reference(folder: Path, attention: str) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


@torch.inference_mode()
def _greedy(model: nn.Module, prompt: list[int], *, cached: bool) -> tuple[list[int], bool]:
    """The next tokens, and True if none was a near tie.

    Each by a pass over all before it; cached: by passes over the new one alone, which is another
    thing only where positions are scaled by the length so far.
    """
    fresh: Any = deepcopy(model)  # some keep what an earlier prompt left
    tokens, clear, cache = list(prompt), True, None
    for _ in range(NEW_TOKENS):
        seen = tokens[-1:] if cache is not None else tokens
        output = fresh(
            input_ids=torch.tensor([seen]),
            use_cache=cached,
            **({"past_key_values": cache} if cached else {}),
        )
        cache = output.past_key_values if cached else None
        logits = output.logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        clear &= best - second > _CLEAR * float(logits.abs().max())
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], clear


def _judged(found: list[list[int]], right: list[list[int]]) -> Outcome:
    return "equal" if found == right else "wrong"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, QuickchangeError | StoreError)
    return text if known and text else f"{type(error).__name__}: {text}"
