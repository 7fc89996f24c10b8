"""The demo model over HTTP: sixteen requests for eight adapters and the base, one batch, all right.

Everything is real here: `quickchange serve` in a process of its own, SmolLM2-135M, and PEFT to say
what each answer must be, token for token.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from quickchange_bench.models.random_adapters import AdapterSpec, write_adapters
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.importing import add_adapter
from quickchange_store.store import Store
from quickchange_training.demo import ensure_demo_base

NAMES = [f"lora-{index}" for index in range(8)]
BASE = "SmolLM2-135M-Instruct"
NEW_TOKENS = 24
READY_SECONDS = 300


@contextmanager
def served(model: Path, store: Path, log: Path) -> Iterator[str]:
    """A server on a free port; its address."""
    options = ["--model", str(model), "--store", str(store), "--port", "0"]
    code = "from quickchange_server.cli import main; main()"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", code, "serve", *options], stdout=out)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not (found := re.search(r"ready on (http://\S+)", log.read_text())):
            assert time.monotonic() < deadline, "the server did not get ready"
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        yield found.group(1)
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)


def prompts() -> list[str]:
    subjects = ("rivers", "bread", "a lighthouse", "winter", "trains", "honey", "the moon", "glass")
    return [f"Write two sentences about {subject}." for subject in subjects] + [
        f"Explain {subject} to a child." for subject in subjects
    ]


@torch.inference_mode()
def by_peft(model: Path, folder: Path, asked: list[tuple[str, str]]) -> list[str]:
    """Greedy answers of transformers and PEFT, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(base, folder / NAMES[0], adapter_name=NAMES[0])
        for name in NAMES[1:]:
            peft.load_adapter(folder / name, adapter_name=name)
    peft.eval()
    answers = []
    for name, prompt in asked:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        if name == BASE:
            with peft.disable_adapter():
                out = peft.generate(input_ids=ids, **options)
        else:
            peft.set_adapter(name)
            out = peft.generate(input_ids=ids, **options)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def ask(url: str, name: str, prompt: str) -> str:
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "min_tokens": NEW_TOKENS,
        "temperature": 0,
    }
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


@pytest.mark.slow
def test_sixteen_requests_for_eight_adapters_share_a_batch_and_equal_peft(tmp_path: Path) -> None:
    model = ensure_demo_base()
    folder, store = tmp_path / "adapters", tmp_path / "store"
    write_adapters(model, folder, NAMES, AdapterSpec())
    spec = base_spec(str(model))
    for name in NAMES:
        add_adapter(Store(store), name, folder / name, spec)
    names = [*NAMES, *NAMES[:6], BASE, BASE]
    asked = list(zip(names, prompts(), strict=True))
    with served(model, store, tmp_path / "log") as url, ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(url, *one), asked))
        metrics = httpx.get(f"{url}/metrics").text
    buckets = dict(
        re.findall(r'quickchange_batch_adapters_bucket\{le="([\d.]+)"\} ([\d.]+)', metrics)
    )
    total = float(re.search(r"quickchange_batch_adapters_count ([\d.]+)", metrics)[1])  # type: ignore[index]
    few = max(float(n) for le, n in buckets.items() if float(le) < 8)
    assert total - few >= NEW_TOKENS // 2, "few steps held more than four adapters"
    assert answers == by_peft(model, folder, asked)
