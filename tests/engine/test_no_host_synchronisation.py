"""A decode step on a device whose values can't be looked at: nothing is asked for on the host and
nothing comes from there meanwhile, which is what capturing it in a graph takes.

The device is torch's "meta": tensors with shapes and dtypes, without values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from recurrent_models import RECURRENT, make_recurrent
from scaled_models import SCALED, make_scaled
from tiny_models import make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_kernels.sampling.token_mask import mask_words, plain_token_mask_
from quickchange_server.adapters.adapter_loader import ImmediateCopies
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_server.engine.inputs.state_inputs import state_parts
from quickchange_server.engine.inputs.step_shapes import StepBuckets
from quickchange_server.engine.model_inputs import empty_inputs
from quickchange_server.model import paged_attention
from quickchange_server.model.input_buffers import layout_of, rebuilt
from quickchange_server.model.loading.model_loader import LoadedModel, forward, prepare
from quickchange_server.spec_decode.draft_head_plan import DraftItem, Planner
from quickchange_server.spec_decode.draft_heads import DraftCall, HeadDrafter
from quickchange_store.canonical.canonical_adapter import LowRankUpdate

META = torch.device("meta")
ROWS, BLOCKS, BLOCK_SIZE = 4, 8, 4


SCALED_ON_DEVICE = ("phi3", "llama-longrope", "llama-dynamic", "gemma3-dynamic")
# One of each kind of recurrent layer; experts need host values of their own.
RECURRENT_ON_DEVICE = (
    "qwen3_5_text",
    "olmo_hybrid",
    "lfm2",
    "bamba",
    "falcon_h1",
    "mamba",
    "zamba",
)


class OnDeviceOnly(TorchDispatchMode):
    """Refuses every operation that reads or makes a tensor elsewhere."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device != META:
                raise RuntimeError(f"{func} with a tensor on {leaf.device}")
        return out


def there(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device=META)


def move(module: nn.Module) -> None:
    """Its parameters and buffers, wherever else they are referred to."""
    for tensor in {id(t): t for t in [*module.parameters(), *module.buffers()]}.values():
        moved = there(tensor)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=False)
        torch.utils.swap_tensors(tensor, moved)


def make_step(family: str, *, adapters: bool) -> tuple[LoadedModel, tuple[Tensor, Tensor, Tensor]]:
    """A model on the device with a padded decode step set, and ids, positions, rows to sample.

    With adapters it has spare tokens, which only some adapters have.
    """
    paged_attention.register()
    made = (
        make_recurrent if family in RECURRENT else make_scaled if family in SCALED else make_model
    )
    model = made(family)
    model.set_attn_implementation(paged_attention.NAME)
    loaded = prepare(model, adapters=adapters, extra_vocabulary=64 if adapters else 0)
    move(loaded.module)
    loaded.install_caches(
        num_blocks=BLOCKS, block_size=BLOCK_SIZE, state_rows=ROWS, dtype=torch.float32, device=META
    )
    extent = StepBuckets(ROWS, BLOCKS).extents(adapters=adapters)[0]
    states = state_parts((), extent.rows, META) if loaded.recurrent else ()
    on_host = empty_inputs(extent, scaled=loaded.scaling is not None, states=states)
    layout, tensors = layout_of(on_host)
    inputs = rebuilt(layout, [there(tensor) for tensor in tensors])
    tables = None
    if adapters:
        pool = DevicePool(loaded.groups, 1 << 20, torch.float32, META, ImmediateCopies())
        tables = pool.tables
    loaded.holder.step = inputs.step(tables)
    return loaded, (inputs.ids, inputs.positions, inputs.sample_rows)


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen3",
        "gemma2",
        "phi",
        "mixtral",
        "gpt_oss",
        *SCALED_ON_DEVICE,
        *RECURRENT_ON_DEVICE,
    ],
)
def test_a_decode_step_stays_on_the_device(family: str, adapters: bool) -> None:
    loaded, inputs = make_step(family, adapters=adapters)
    with OnDeviceOnly():
        logits, hidden = forward(loaded, *inputs)
    assert logits.shape == (ROWS, loaded.vocabulary)
    assert hidden.shape == (ROWS, loaded.hidden)


@pytest.mark.parametrize("adapted", [True, False])
def test_drafting_stays_on_the_device(adapted: bool) -> None:
    loaded, _ = make_step("llama", adapters=True)
    pool = DevicePool(loaded.groups, 1 << 20, torch.float32, META, ImmediateCopies())
    kinds: list[dict[str, Any]] = [
        {"blocks_a_head": 2},
        {"sequential": True, "vocabulary": (1, 2, 3)},
        {"own_outputs": 9},
    ]
    low = LowRankUpdate(torch.ones(8, loaded.hidden), torch.ones(loaded.own_vocabulary, 8), 1.0)
    shapes = page_shapes(loaded.groups, torch.float32)
    items: list[DraftItem] = []
    for kind in kinds:
        adapter = turbo_adapter(make_turbo(loaded.hidden, 3, **kind), lm_head=low)
        slot = pool.allocate(build_image(adapter, shapes, torch.float32))
        assert slot is not None
        pool.publish(slot)
        items.append(DraftItem(0, slot, 3, ((slot, 1.0),) if adapted else ()))
    drafter = HeadDrafter(loaded, META)
    planner = Planner(items, pool, drafter.facts, ROWS, META)
    on_host = planner.rounds()
    layout, tensors = layout_of(on_host)
    rounds = rebuilt(layout, [there(tensor) for tensor in tensors])
    hidden = torch.empty(ROWS, loaded.hidden, device=META)
    certain = torch.empty(ROWS, dtype=torch.int64, device=META)
    with OnDeviceOnly(), torch.inference_mode():
        call = DraftCall(planner.vocabularies, pool, certain, (len(items), 3, 2))
        drafts = drafter.compute(rounds, hidden, call)
    assert drafts.tokens.shape == (3, 3, 2)


def test_masking_tokens_stays_on_the_device() -> None:
    """By the plain version, which leans on torch alone: its masks have gone up before."""
    vocabulary = 97
    logits = torch.empty(ROWS, vocabulary, device=META)
    rows = torch.empty(2, dtype=torch.int64, device=META)
    bits = torch.empty(2, mask_words(vocabulary), dtype=torch.int32, device=META)
    with OnDeviceOnly(), torch.inference_mode():
        plain_token_mask_(logits, rows, bits)


class Faulty(nn.Module):
    """What a model must not do in a step."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "a value on the host":
            return x * x.sum().item()
        if self.fault == "a tensor from the host":
            return x + torch.ones(x.shape).to(x.device)
        return x[x > 0]


@pytest.mark.parametrize(
    "fault", ["a value on the host", "a tensor from the host", "a shape by value"]
)
def test_the_check_sees_what_it_is_for(fault: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)), OnDeviceOnly():
        Faulty(fault)(torch.ones(3, device=META))
