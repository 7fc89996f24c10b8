"""An engine on models with recurrent layers: prefixes, graphs, restarts, readings and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from recurrent_models import generated, make_recurrent, save_recurrent
from repeating_capture import RepeatingCapture

from quickchange_server.engine import model_runner
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.scheduling.kv_cache_manager import KVBlocks

KINDS = ("qwen3_5_text", "lfm2", "mamba", "mamba2", "falcon_h1")
PROMPT = [7 * i % 89 + 3 for i in range(41)]
TOKENS = 8


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_recurrent(kind, tmp_path_factory.mktemp(kind))


def engine_on(model: Path, **options: object) -> Engine:
    return make_engine(model, **{"max_model_len": 96, "kv_cache_bytes": 1 << 20, **options})


def answer(drive: Driver, key: str, prompt: list[int], **options: object) -> list[int]:
    drive.engine.submit(request(key, prompt, **{"max_tokens": TOKENS, **options}))
    drive.finish(key)
    return drive.tokens[key]


def test_a_prefix_with_a_kept_state_is_found_again_and_changes_nothing(
    kind: str, model: Path
) -> None:
    drive = Driver(engine_on(model))
    reference = make_recurrent(kind)
    prompts = {"first": PROMPT, "again": PROMPT, "other end": [*PROMPT[:34], 5, 6, 7, 8, 9]}
    cached = {}
    for key, prompt in prompts.items():
        assert answer(drive, key, prompt) == generated(reference, prompt, TOKENS)
        cached[key] = drive.first[key].cached_tokens
    # Chunks of 16 rows leave states behind 16, 32 and 40 tokens.
    assert cached == {"first": 0, "again": 40, "other end": 32}


def test_without_a_prefix_cache_no_state_is_kept(model: Path) -> None:
    drive = Driver(engine_on(model, prefix_cache=False))
    first, again = (answer(drive, key, PROMPT) for key in ("first", "again"))
    assert first == again
    assert drive.first["again"].cached_tokens == 0


def test_decode_steps_from_graphs_give_the_same_tokens(
    kind: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = RepeatingCapture()
    monkeypatch.setattr(model_runner, "capture_for", lambda _device: capture)
    drive = Driver(engine_on(model))
    warmed = capture.replayed
    prompts = {str(i): PROMPT[i : 3 * i + 2] for i in range(5)}
    for key, prompt in prompts.items():
        drive.engine.submit(request(key, prompt, max_tokens=TOKENS))
    drive.finish(*prompts)
    assert capture.replayed > warmed, "no step was replayed"
    reference = make_recurrent(kind)
    assert drive.tokens == {k: generated(reference, p, TOKENS) for k, p in prompts.items()}


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_sequences_put_back_begin_anew_with_the_same_tokens(
    prefix_cache: bool, kind: str, model: Path
) -> None:
    engine = engine_on(model)
    engine.scheduler.blocks = KVBlocks(13, 4, prefix_cache=prefix_cache)  # of the more that fit
    drive = Driver(engine)
    prompts = {str(i): PROMPT[i : 4 * i + 3] for i in range(6)}
    for key, prompt in prompts.items():
        engine.submit(request(key, prompt, max_tokens=TOKENS))
    drive.finish(*prompts)
    assert engine.scheduler.preemptions
    reference = make_recurrent(kind)
    assert drive.tokens == {k: generated(reference, p, TOKENS) for k, p in prompts.items()}


def test_a_request_sent_again_with_its_output_goes_on_where_it_stood(
    kind: str, model: Path
) -> None:
    expected = generated(make_recurrent(kind), PROMPT, TOKENS)
    drive = Driver(engine_on(model))
    rest = answer(drive, "again", PROMPT, output=expected[:5])
    assert rest == expected[5:]


def test_a_prompt_is_read_in_chunks_as_at_once(kind: str, model: Path) -> None:
    drive = Driver(engine_on(model))
    answer(drive, "before", PROMPT)  # leaves a prefix, which a reading must not skip
    answer(drive, "read", PROMPT, prompt_logprobs=0, max_tokens=1)
    with torch.inference_mode():
        logits = make_recurrent(kind)(torch.tensor([PROMPT]), use_cache=False).logits[0]
    scores = logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
    found = torch.tensor([score.logprob for score in drive.first["read"].prompt_logprobs])
    torch.testing.assert_close(found, scores, atol=2e-4, rtol=2e-4)


def test_too_little_memory_for_one_state_is_refused_with_what_is_needed(model: Path) -> None:
    with pytest.raises(ValueError, match=r"kv_cache_bytes \(\d+\) has no room for the states"):
        engine_on(model, kv_cache_bytes=2048)


def test_states_take_half_of_the_budget_at_most_beside_keys_and_values(tmp_path: Path) -> None:
    model = save_recurrent("lfm2", tmp_path)
    scheduler = engine_on(model, kv_cache_bytes=1 << 16, max_model_len=64).scheduler
    states = scheduler.states
    assert states is not None
    row = 32 * 3 * 4  # one convolution's window: 32 channels of 3 columns
    assert states.model_rows * row <= 1 << 15
    block = 2 * 2 * 4 * 8 * 4  # keys and values of two heads of 8, in four slots
    used = states.model_rows * row + scheduler.blocks.num_blocks * block
    assert (1 << 16) - block < used <= 1 << 16
