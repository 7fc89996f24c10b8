"""Every kind of step sends its inputs up in one copy and its results down in one, and neither these
nor anything between them holds up the host.

Token masks are the one exception: made while the forward pass runs, they go up in a copy of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from far_device import META, FarDevice, there
from repeating_capture import RepeatingCapture
from tiny_models import make_model
from torch import Tensor, nn
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_kernels.sampling.token_mask import mask_words
from quickchange_server.adapters.adapter_loader import ImmediateCopies
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_server.engine import model_runner
from quickchange_server.engine.model_runner import Runner
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import Sequence as EngineSequence
from quickchange_server.engine.token_masks import NO_MASKS, TokenMasks
from quickchange_server.model import paged_attention
from quickchange_server.model.loading.model_loader import LoadedModel, prepare
from quickchange_server.protocol import Pooling, SamplingParams, Submit
from quickchange_server.spec_decode.draft_heads import Guide
from quickchange_store.canonical.canonical_adapter import LowRankUpdate

BLOCK, SLOT = 4, 0


def item(
    at: int,
    *,
    count: int = 1,
    computed: int = 5,
    pooling: Pooling | None = None,
    drafts: tuple[int, ...] = (),
    adapted: bool = True,
    **sampling: Any,
) -> Scheduled:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 50, **sampling})
    tokens = tuple(range(1, 1 + computed + count))
    sequence = EngineSequence(Submit(str(at), tokens, params, pooling=pooling, seed=at), 0.0)
    sequence.computed = computed
    sequence.blocks = [at * 8 + block for block in range(8)]
    components = ((SLOT, 1.0),) if adapted else ()
    return Scheduled(sequence, count, components, heads=SLOT, drafts=drafts)


KINDS: dict[str, Callable[[], list[Scheduled]]] = {
    "greedy": lambda: [item(0), item(1, adapted=False)],
    "drawn": lambda: [item(0, temperature=0.7), item(1)],
    "filtered": lambda: [item(0, temperature=0.7, top_p=0.5, top_k=4, min_p=0.1, typical_p=0.9)],
    "penalised": lambda: [item(0, frequency_penalty=1.0, repetition_penalty=1.1), item(1)],
    "biased": lambda: [item(0, logit_bias={3: 1.0}, temperature=1.0)],
    "with log-probabilities": lambda: [item(0, logprobs=3), item(1), item(2, logprobs=0)],
    "with drafts": lambda: [item(0, drafts=(3, 4)), item(1), item(2, drafts=(5,), temperature=1.0)],
    "a prompt's last chunk": lambda: [item(0, computed=0, count=9), item(1)],
    "a prompt's scores": lambda: [item(0, computed=0, count=6, prompt_logprobs=2), item(1)],
    "an embedding": lambda: [item(0, computed=0, count=6, pooling="mean"), item(1)],
    "all at once": lambda: [
        item(0, temperature=0.8, presence_penalty=0.5, logprobs=1, drafts=(3,)),
        item(1, computed=0, count=6, prompt_logprobs=1),
        item(2, computed=0, count=5, pooling="last"),
        item(3, logit_bias={1: -1.0}),
    ],
}


class Heads:
    """Drafts `depth` tokens of every sequence that samples."""

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def depths(self, plan: Sequence[Scheduled]) -> Mapping[str, int]:
        if not self._depth:
            return {}
        return {one.sequence.request_id: self._depth for one in plan if one.samples}

    def guide(self, items: Sequence[Scheduled]) -> Guide | None:
        del items
        return None


def masks_of(sampling: Sequence[Scheduled]) -> TokenMasks:
    """A mask for every row."""
    rows = sum(one.sampled_rows for one in sampling)
    bits = np.full((rows, mask_words(97)), -1, dtype=np.int32)
    return TokenMasks(torch.arange(rows), torch.from_numpy(bits), {}, 0.0)


class Tiers(DevicePool):
    served = True


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    paged_attention.register()
    model = make_model("llama")
    model.set_attn_implementation(paged_attention.NAME)
    found = prepare(model, adapters=True)
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        moved: Tensor = there(tensor)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=False)
        torch.utils.swap_tensors(tensor, moved)
    return found


@pytest.fixture(scope="module")
def tiers(loaded: LoadedModel) -> Tiers:
    pool = Tiers(loaded.groups, 1 << 20, torch.float32, META, ImmediateCopies())
    low = LowRankUpdate(torch.ones(8, loaded.hidden), torch.ones(loaded.vocabulary, 8), 1.0)
    turbo = make_turbo(loaded.hidden, 3, sequential=True, vocabulary=(1, 2, 3))
    image = build_image(
        turbo_adapter(turbo, lm_head=low), page_shapes(loaded.groups, torch.float32), torch.float32
    )
    assert pool.allocate(image) == SLOT
    pool.publish(SLOT)
    return pool


@pytest.fixture(params=[False, True], ids=["launched", "from graphs"])
def runner(
    request: pytest.FixtureRequest,
    loaded: LoadedModel,
    tiers: Tiers,
    monkeypatch: pytest.MonkeyPatch,
) -> Runner:
    if request.param:
        monkeypatch.setattr(model_runner, "capture_for", lambda _device: RepeatingCapture())
    with FarDevice():
        made = Runner(
            loaded,
            tiers,  # type: ignore[arg-type]
            lambda _: NO_MASKS,
            num_blocks=64,
            block_size=BLOCK,
            most_graph_rows=8,
            max_model_len=32,
            dtype=torch.float32,
            device=META,
            max_sequences=8,
            max_batch_tokens=32,
        )
        made.warm_up()
    return made


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_goes_up_in_one_copy_and_comes_down_in_one(
    kind: str, depth: int, runner: Runner
) -> None:
    plan = KINDS[kind]()
    with FarDevice() as device:
        flight = runner.launch(plan, Heads(depth))
        assert (device.uploads, device.downloads) == (1, 1)
        ran = flight.ran()
    assert (device.uploads, device.downloads) == (1, 1)
    assert not ran.faults
    assert len(ran.results) == sum(one.samples for one in plan)


def test_a_pending_token_is_fed_on_the_device(runner: Runner) -> None:
    one = item(0, temperature=0.5)
    with FarDevice() as device:
        runner.launch([one], Heads(0))
        one.sequence.computed += 1
        one.sequence.pending = 1
        runner.launch([Scheduled(one.sequence, 1, one.components)], Heads(0)).ran()
    assert (device.uploads, device.downloads) == (2, 2)


def test_masks_follow_in_a_copy_of_their_own(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_masks", masks_of)
    with FarDevice() as device:
        runner.launch([item(0, temperature=1.0), item(1)], Heads(0)).ran()
    assert (device.uploads, device.downloads) == (2, 1)


def test_a_chunk_that_samples_nothing_brings_nothing_down(runner: Runner) -> None:
    chunk = item(0, computed=0, count=9)
    part = Scheduled(chunk.sequence, 5, ())
    with FarDevice() as device:
        runner.launch([part], Heads(0)).ran()
    assert (device.uploads, device.downloads) == (1, 0)


def far(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


FAULTS: dict[str, Callable[[], object]] = {
    "a tensor made there of host values": lambda: torch.tensor([1, 2], device=META),
    "a blocking copy there": lambda: torch.ones(3).to(META),
    "a copy there of memory that is not pinned": lambda: torch.ones(3).to(META, non_blocking=True),
    "a blocking copy into it": lambda: far(3).copy_(torch.ones(3)),
    "a copy from there": lambda: far(3).cpu(),
    "a value": lambda: far(1).item(),
    "a list": lambda: far(3).tolist(),
    "places that hold": lambda: far(3).nonzero(),
    "rows by a mask": lambda: far(3)[far(3) > 0],
    "an index from the host": lambda: far(3)[torch.tensor([0, 1])],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("inference", [False, True])
def test_the_device_sees_what_it_is_for(fault: str, inference: bool) -> None:
    with (
        pytest.raises((RuntimeError, NotImplementedError)),
        torch.inference_mode(inference),
        FarDevice(),
    ):
        FAULTS[fault]()
