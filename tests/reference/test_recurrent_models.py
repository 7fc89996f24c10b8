"""Models with recurrent layers give transformers' and PEFT's tokens, whatever shares the batch.

Prompts of different length, read in chunks, the base and a LoRA in one batch, with fewer state rows
than requests, drafts that are verified and mostly rejected, and sequences that are put back.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from bought_drafts import every_draft_bought
from engine_driver import Driver, make_engine, request
from peft import LoraConfig, PeftModel, get_peft_model
from recurrent_models import RECURRENT, generated, make_recurrent, save_recurrent
from torch import nn

from quickchange_server.engine.engine import Engine
from quickchange_server.engine.scheduling.kv_cache_manager import StateRows
from quickchange_server.protocol import Drafting
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.importing import read_adapter

TOKENS = 12
PROMPTS = {
    "long": [7 * i % 89 + 3 for i in range(37)],
    "short": [5, 6],
    "one": [3],
    "repeating": [11, 12, 13, 14] * 5,
    "chunk": [9 + i for i in range(16)],
}
# PEFT refuses a LoRA on these where transformers' kernels would read their weights past it.
_PAST_PEFT = ("out_proj",)


@dataclass(frozen=True)
class Served:
    """A model, a LoRA of it, and the answers of both to each prompt."""

    path: Path
    adapter: CanonicalAdapter
    base: dict[str, list[int]]
    lora: dict[str, list[int]]

    def engine(self, **options: object) -> Engine:
        return make_engine(
            self.path,
            lambda _: self.adapter,
            **{"max_model_len": 96, "kv_cache_bytes": 2 << 20, **options},
        )


@pytest.fixture(scope="module", params=sorted(RECURRENT))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    path = save_recurrent(kind, folder / "base")
    model = make_recurrent(kind)
    base = {name: generated(model, prompt, TOKENS) for name, prompt in PROMPTS.items()}
    torch.manual_seed(1)
    tuned = _with_lora(make_recurrent(kind), without=())
    if tuned is None:
        tuned = _with_lora(make_recurrent(kind), without=_PAST_PEFT)
    assert tuned is not None
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    tuned.eval().save_pretrained(folder / "lora")
    lora = {name: generated(tuned, prompt, TOKENS) for name, prompt in PROMPTS.items()}
    assert all(lora[name] != base[name] for name in PROMPTS)
    adapter = read_adapter(folder / "lora", base_spec(str(path))).adapter
    return Served(path, adapter, base, lora)


def _with_lora(model: nn.Module, without: tuple[str, ...]) -> PeftModel | None:
    """A LoRA on the linears of mixers and attention but those named; None if PEFT won't."""
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and "experts" not in name
        and ".mlp." not in name  # where experts are, PEFT makes its own of them
        and name.rpartition(".")[2] not in (*without, "lm_head")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        except ValueError:
            return None


def test_base_and_lora_in_one_batch_in_chunks_give_the_reference(served: Served) -> None:
    assert _answers(served.engine(max_sequences=10), None) == _expected(served)


def test_verified_drafts_and_too_few_state_rows_change_nothing(served: Served) -> None:
    engine = served.engine()
    engine.scheduler.states = StateRows(5)  # of the more that there is room for
    with every_draft_bought():
        assert _answers(engine, Drafting(lookup=True)) == _expected(served)


def _answers(engine: Engine, drafting: Drafting | None) -> dict[str, list[int]]:
    drive = Driver(engine)
    for name, prompt in PROMPTS.items():
        for key, adapters in {f"base/{name}": [], f"lora/{name}": [("lora", 1.0)]}.items():
            asked = request(key, prompt, adapters, max_tokens=TOKENS)
            engine.submit(replace(asked, drafting=drafting))
            drive.step()
    drive.finish(*(f"{who}/{name}" for who in ("base", "lora") for name in PROMPTS))
    engine.close()
    if drafting is not None:
        assert sum(drive.drafted.values()) > sum(drive.accepted.values()), "nothing rolled back"
    return drive.tokens


def _expected(served: Served) -> dict[str, list[int]]:
    answers = {"base": served.base, "lora": served.lora}
    return {f"{who}/{name}": said[name] for who, said in answers.items() for name in PROMPTS}
