"""Virtual tokens through the engine equal PEFT's generation token for token: every kind of prompt,
alone and with a LoRA, beside LoRA and plain rows in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_driver import Driver, make_engine
from prompt_adapters import KINDS, Prompts, learn

FAMILIES = ["llama", "qwen3", "gpt2", "gemma2", "mistral"]


def answered(made: Prompts, **options: object) -> Driver:
    engine = make_engine(
        made.path,
        made.adapters.__getitem__,
        **{"max_sequences": 30, "max_batch_tokens": 48, **options},
    )
    drive = Driver(engine)
    submits = made.submits()
    for submit in submits:
        engine.submit(submit)
    drive.finish(*(submit.request_id for submit in submits))
    engine.close()
    return drive


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_answer_as_in_peft_alone_and_with_a_lora(family: str, tmp_path: Path) -> None:
    made = learn(family, tmp_path)
    got = answered(made)
    assert {d.error for d in got.last.values()} == {None}
    for name, answer in made.answers.items():
        assert got.tokens[name] == answer, name
    if family != "gemma2":  # whose caps leave its random model one answer
        # Where Mistral's window has left them behind, they may change nothing any more.
        changed = [name for name in KINDS if made.alone[name] != made.plain[name]]
        assert len(changed) > len(KINDS) // 2
