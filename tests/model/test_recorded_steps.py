"""Passes recorded on a CPU and run again give the bits that the pass itself gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCABULARY, save_model
from torch import Tensor

from quickchange_kernels import native
from quickchange_kernels.elementwise.rms_norm import rms_norm
from quickchange_kernels.elementwise.silu_mul import silu_mul
from quickchange_kernels.linear.linear_float import linear
from quickchange_server.engine import model_runner
from quickchange_server.model.graphs.recorded_steps import NativeCapture, capture_for

CPU = torch.device("cpu")
WIDTH = 16
WEIGHT = torch.randn(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
COUNTS = torch.zeros(4)

assert native.ensure()


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:].mul_(2).add_(x[:1])
    return y


def made_from_numbers(x: Tensor) -> Tensor:
    return x + torch.tensor([float(i) for i in range(WIDTH)])


def chosen(x: Tensor) -> Tensor:
    values, places = x.topk(3)
    return x.scatter(1, places, values.exp())


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "native": lambda x: silu_mul(linear(x, WEIGHT)),
    "norm": lambda x: rms_norm(x, torch.ones(WIDTH), 1e-6, 0.0),
    "views": lambda x: x.view(2, 2, WIDTH).transpose(0, 1).reshape(4, WIDTH),
    "in place": in_place,
    "numbers": made_from_numbers,
    "lists": lambda x: torch.cat([part.flip(1) for part in x.split(WIDTH // 4, 1)], 1),
    "indices": lambda x: x[torch.arange(3, -1, -1)] / (1 + x.abs().amax()),
    "chosen": chosen,
}


@settings(deadline=None)
@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=12), seed=st.integers())
def test_a_recorded_pass_gives_the_bits_of_the_pass_on_other_inputs(
    names: list[str], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(4, WIDTH, generator=generator)

    @torch.inference_mode()
    def compute() -> tuple[Tensor, ...]:
        hidden = x
        for name in names:
            hidden = STEPS[name](hidden)
        return hidden.clone(), hidden.argmax(-1)

    replay, outputs = NativeCapture()(compute)
    for _ in range(3):
        x.copy_(torch.randn(4, WIDTH, generator=generator))
        expected = [output.clone() for output in compute()]
        replay()
        for output, right in zip(outputs, expected, strict=True):
            assert output.numpy().tobytes() == right.numpy().tobytes()


def test_what_a_pass_lets_go_of_is_used_again() -> None:
    x = torch.randn(64, 1024)

    @torch.inference_mode()
    def compute() -> tuple[Tensor, ...]:
        hidden = x
        for _ in range(50):
            hidden = hidden + 1
        return (hidden,)

    capture = NativeCapture()
    held = [capture(compute)[0] for _ in range(4)]
    assert len(held) == 4
    assert capture.bytes < 8 * x.nbytes  # and not 4 · 50


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda x: x * x.sum().item(), id="a number"),
        pytest.param(lambda x: torch.zeros_like(x) + x[x > 0].sum(), id="a mask"),
        pytest.param(lambda x: x if bool((x > 0).all()) else -x, id="a condition"),
    ],
)
def test_a_pass_that_reads_values_is_computed_anew(
    read: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.ones(2, 3)

    @torch.inference_mode()
    def compute() -> tuple[Tensor, ...]:
        return (read(x),)

    with caplog.at_level(logging.INFO):
        replay, (output,) = NativeCapture()(compute)
    assert "reads values" in caplog.text
    x.copy_(torch.tensor([[1.0, -2.0, 3.0]] * 2))
    replay()
    assert torch.equal(output, read(x))


def test_a_pass_that_fails_leaves_nothing_recorded() -> None:
    capture = NativeCapture()
    with pytest.raises(ValueError, match="in the middle"):
        capture(broken)
    x = torch.ones(3)
    replay, (output,) = capture(lambda: (x * 2,))
    x.fill_(4)
    replay()
    assert output.tolist() == [8.0] * 3


def broken() -> tuple[Tensor, ...]:
    torch.ones(2).mul(2)
    raise ValueError("in the middle")


def answers(
    model: Path, prompts: Sequence[list[int]], patch: pytest.MonkeyPatch, *, recorded: bool
) -> dict[str, list[int]]:
    with patch.context() as during:
        if not recorded:
            during.setattr(model_runner, "capture_for", lambda _device: None)
        engine = make_engine(model, max_sequences=6)
    drive = Driver(engine)
    for key, prompt in enumerate(prompts):
        sampling = {"temperature": 1.0} if key % 2 else {}
        engine.submit(request(str(key), prompt, seed=key, max_tokens=12 + key, **sampling))
    drive.finish(*[str(key) for key in range(len(prompts))])
    engine.close()
    return drive.tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_engine_says_the_same_with_recorded_steps(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(family, tmp_path)
    prompts = [[(7 * i + j) % VOCABULARY for j in range(3 + 4 * i)] for i in range(5)]
    plain = answers(model, prompts, monkeypatch, recorded=False)
    assert answers(model, prompts, monkeypatch, recorded=True) == plain


def test_a_cpu_records_its_steps() -> None:
    assert isinstance(capture_for(CPU), NativeCapture)
