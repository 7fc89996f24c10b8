"""Heads refreshed from what a live server recorded: from requests to a promoted variant."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bought_drafts import buying_main
from http_support import Live
from keys_support import bearer, created, keyed_server
from letter_model import save_letter_model
from typer.testing import CliRunner, Result

from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.entrypoints.engine_start import engine_main
from quickchange_server.frontend.tokenizer import Text
from quickchange_store.base_model.base_spec import base_spec
from quickchange_training.cli import app

ALPHABET = string.ascii_lowercase
PROMPTS = [a + b for a in ALPHABET[:12] for b in ALPHABET[:6]]


def trained(command: str, *options: object) -> Result:
    result = CliRunner().invoke(app, [command, *map(str, options)])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with the LoRA `orders`, heads `drafts` of the base, and the alias `live` of both."""
    folder = tmp_path_factory.mktemp("refresh")
    model, store = save_letter_model(folder / "model"), folder / "store"
    prompts, examples = folder / "prompts.jsonl", folder / "examples.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    said = [(p + ALPHABET * 2)[2:40] for p in PROMPTS]
    pairs = [{"prompt": p, "completion": s} for p, s in zip(PROMPTS, said, strict=True)]
    examples.write_text("\n".join(map(json.dumps, pairs)))
    given = ("--model", model, "--store", store)
    small = ("--vocabulary", 0, "--max-new-tokens", 20, "--max-length", 48)
    heads = ("--data", prompts, "--out", folder / "drafts", "--name", "drafts")
    trained("turbo", *given, *heads, *small, "--depth", 3, "--steps", 20)
    lora = ("--data", examples, "--out", folder / "lora", "--name", "orders", "--rank", 16)
    trained("lora", *given, *lora, "--steps", 60, "--lr", 1e-2)
    with keyed_server(
        store,
        model=str(model),
        text=Text.load(str(model)),
        engines=partial(LocalEngines, main=partial(buying_main, engine_main)),
        base=lambda: base_spec(str(model)),
        threads=1,
        kv_cache_bytes=4 << 20,
        prompt_lookup=False,
        recording_seconds=0,
    ) as live:
        live.store.alias("live", "orders", turbo="drafts")
        yield live


def asked(live: Live, key: dict[str, str], model: str, prompt: str) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 20, "temperature": 0}
    answer = live.http.post("/v1/completions", json=body, headers=key)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_heads_refreshed_from_recorded_requests_accept_more_and_are_promoted(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {t: created(live, tenant=t, scope="admin")[1] for t in ("acme", "globex")}
    acme, globex = bearer(keys["acme"]), bearer(keys["globex"])
    assert live.http.put("/v1/recordings/live", headers=acme).status_code == 200
    for prompt in PROMPTS:
        asked(live, acme, "live", prompt)
    asked(live, globex, "live", "zz")
    monkeypatch.setenv("QUICKCHANGE_API_KEY", keys["acme"])
    model = live.services.settings.model
    options = ("--model", model, "--store", live.store.location, "--max-length", 48)
    result = trained(
        "turbo",
        *options,
        *("--on", "live", "--recorded", "--server", live.url, "--out", tmp_path / "heads"),
        *("--name", "refreshed", "--depth", 3, "--steps", 150, "--held-out", 0.2),
    )
    report = json.loads(result.stdout[: result.stdout.rindex("}") + 1])
    assert report["prompts"] + report["held_out_prompts"] == len(PROMPTS)
    assert report["held_out"]["tokens_a_step"] > report["before"]["tokens_a_step"]
    heads = live.store.load(live.store.resolve("refreshed").digest).turbo
    assert heads is not None
    assert heads.tenant == "acme"

    variants = [
        {"name": "now", "model": "orders", "turbo": "drafts"},
        {"name": "refreshed", "model": "orders", "turbo": "refreshed"},
    ]
    body = {"name": "heads", "variants": variants, "sticky": {"by": "random"}, "minimum": 20}
    made = live.http.post("/v1/experiments", json={**body, "alias": "live"}, headers=acme)
    assert made.status_code == 201, made.text
    texts: dict[str, set[str]] = {}
    for _ in range(3):
        for prompt in PROMPTS:
            said = asked(live, acme, "heads", prompt)["choices"][0]["text"]
            texts.setdefault(prompt, set()).add(said)
    assert all(len(said) == 1 for said in texts.values())
    results = live.http.get("/v1/experiments/heads/results", headers=acme).json()
    (measured,) = (o for o in results["automatic"] if o["name"] == "accepted_per_step")
    means = {v["variant"]: v["mean"] for v in measured["variants"]}
    assert means["refreshed"] > means["now"]
    (compared,) = measured["comparisons"]
    assert compared["interval"][0] > 0  # how many units a decision takes is left to chance
    promoted = live.http.post(
        "/v1/experiments/heads/promote", json={"variant": "refreshed"}, headers=acme
    )
    assert promoted.status_code == 200, promoted.text
    assert live.store.aliases()["live"].turbo == "refreshed"
    # whose requests did not go into the heads is answered the same, without them
    for prompt in PROMPTS[:3]:
        mine, theirs = (asked(live, key, "live", prompt) for key in (acme, globex))
        assert mine["choices"][0]["text"] == theirs["choices"][0]["text"]
        assert "completion_tokens_details" in mine["usage"]
        assert "completion_tokens_details" not in theirs["usage"]


def test_recorded_requests_are_refused_to_keys_that_may_not_read_them(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", live.services.settings.model, "--store", live.store.location)
    out = ("--on", "orders", "--recorded", "--server", live.url, "--out", tmp_path / "heads")
    for scope, status in (("manage", 403), ("admin", 404), (None, 401)):
        monkeypatch.delenv("QUICKCHANGE_API_KEY", raising=False)
        if scope is not None:
            secret = created(live, tenant="initech", scope=scope)[1]
            monkeypatch.setenv("QUICKCHANGE_API_KEY", secret)
        result = CliRunner().invoke(app, ["turbo", *map(str, (*options, *out))])
        assert result.exit_code == 1
        assert f"answers {status}" in " ".join(result.stderr.split())
