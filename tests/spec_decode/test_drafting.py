"""Drafts on a tiny model equal the heads' formulas in float64, alone and in any company."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, make_model, save_model
from torch import Tensor, nn
from turbo_adapters import drafts_by_formula, make_turbo, turbo_adapter

from quickchange_kernels.linear.linear_int8 import dequantize_int8, quantize_int8
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_server.model.adapter_layers import PackedLinear
from quickchange_server.model.loading.model_loader import LoadedModel, load_model
from quickchange_server.model.quantized_linear import Quantization
from quickchange_server.spec_decode.draft_heads import (
    DraftItem,
    Drafts,
    HeadDrafter,
    VocabularyRows,
)
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import TurboHeads

CPU = torch.device("cpu")
EVEN = 112  # tokens whose LM head is served in panels, of which rows are copied out
HIDDEN = 48
FEW = (2, 3, 5, 8, 13, 21, 34, 55, 89)
OTHERS = (1, 4, 9, 16, 25, 36)
TURBOS = {
    "medusa": make_turbo(HIDDEN, 3),
    "two blocks a head": make_turbo(HIDDEN, 2, blocks_a_head=2, seed=1),
    "vocabulary": make_turbo(HIDDEN, 5, vocabulary=FEW, seed=2),
    "own LM heads": make_turbo(HIDDEN, 3, own_outputs=VOCABULARY, seed=3),
    "own LM heads, fewer tokens": make_turbo(HIDDEN, 2, own_outputs=VOCABULARY - 7, seed=4),
    "own LM heads over a vocabulary": make_turbo(
        HIDDEN, 2, own_outputs=len(FEW), vocabulary=FEW, seed=5
    ),
    "hydra": make_turbo(HIDDEN, 3, sequential=True, seed=6),
    "recurrent": make_turbo(HIDDEN, 5, sequential=True, shared=True, vocabulary=FEW, seed=7),
    "hydra of two blocks": make_turbo(
        HIDDEN, 3, sequential=True, blocks_a_head=2, vocabulary=OTHERS, seed=8
    ),
    "hydra with own LM heads": make_turbo(
        HIDDEN, 2, sequential=True, own_outputs=VOCABULARY, seed=9
    ),
}


def lm_update(rank: int, seed: int) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    return LowRankUpdate(
        a=torch.randn(rank, HIDDEN, generator=generator),
        b=torch.randn(VOCABULARY, rank, generator=generator),
        scale=0.1,
        bias=torch.randn(VOCABULARY, generator=generator),
    )


class Device:
    """A model with adapters on its device, and hidden states and tokens to draft from."""

    def __init__(
        self,
        folder: Path,
        family: str = "llama",
        *,
        quantization: Quantization = "none",
        dtype: torch.dtype = torch.float32,
        spare: int = 0,
        vocabulary: int = VOCABULARY,
    ) -> None:
        self.original = make_model(family, vocabulary=vocabulary)
        self.model: LoadedModel = load_model(
            str(save_model(family, folder, vocabulary=vocabulary)),
            dtype=torch.float32,
            device=CPU,
            adapters=True,
            quantization=quantization,
            extra_vocabulary=spare,
        )
        self.pool = DevicePool(self.model.groups, 16 << 20, dtype, CPU)
        self.drafter = HeadDrafter(self.model, CPU)
        generator = torch.Generator().manual_seed(11)
        self.hidden = torch.randn(4, HIDDEN, generator=generator)
        self.tokens = torch.tensor([7, 90, 13, 55])

    def load(self, adapter: CanonicalAdapter) -> int:
        shapes = page_shapes(self.model.groups, self.pool.dtype)
        image = build_image(adapter, shapes, self.pool.dtype)
        slot = self.pool.allocate(image)
        assert slot is not None
        self.pool.write(slot, image)
        self.pool.publish(slot)
        return slot

    def draft(self, items: Sequence[DraftItem]) -> Drafts:
        return self.drafter.draft(self.hidden, self.tokens, items, self.pool)

    def embed(self, token: int) -> Tensor:
        found: Tensor = self.original.get_input_embeddings()(torch.tensor(token)).detach()
        return found

    def logits(self, *updates: tuple[float, LowRankUpdate]) -> Callable[[Tensor], Tensor]:
        head = self.original.get_output_embeddings()

        def compute(state: Tensor) -> Tensor:
            y = head.weight.detach().double() @ state
            for weight, low in updates:
                y = y + weight * low.scale * (low.b.double() @ (low.a.double() @ state))
                y = y + weight * (0 if low.bias is None else low.bias.double())
            return y

        return compute

    def expected(
        self, turbo: TurboHeads, item: DraftItem, *updates: tuple[float, LowRankUpdate]
    ) -> list[Tensor]:
        row = item.row
        return drafts_by_formula(
            turbo,
            self.hidden[row],
            int(self.tokens[row]),
            item.depth,
            self.embed,
            self.logits(*updates),
        )


def check(drafts: Drafts, index: int, expected: Sequence[Tensor]) -> None:
    """That item `index` has the best tokens of `expected`, and nothing deeper."""
    for depth, chances in enumerate(expected):
        assert drafts.tokens[index, depth] == chances.argmax()
        torch.testing.assert_close(
            drafts.chances[index, depth].double(), chances.max(), rtol=1e-4, atol=1e-7
        )
    assert not drafts.tokens[index, len(expected) :].any()
    assert not drafts.chances[index, len(expected) :].any()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, EVEN])
@pytest.mark.parametrize("name", TURBOS)
def test_drafts_are_the_formulas(name: str, vocabulary: int, family: str, tmp_path: Path) -> None:
    device, turbo = Device(tmp_path, family, vocabulary=vocabulary), TURBOS[name]
    slot = device.load(turbo_adapter(turbo))
    items = [DraftItem(row, slot, turbo.depth, ()) for row in (2, 0)]
    drafts = device.draft(items)
    for index, item in enumerate(items):
        check(drafts, index, device.expected(turbo, item))


@pytest.mark.parametrize("name", ["medusa", "vocabulary", "recurrent", "own LM heads"])
def test_what_adapters_add_to_the_lm_head_counts(name: str, tmp_path: Path) -> None:
    device, turbo = Device(tmp_path), TURBOS[name]
    first, second = lm_update(3, 1), lm_update(12, 2)
    slot = device.load(turbo_adapter(turbo, lm_head=first))
    other = device.load(CanonicalAdapter("Tiny", "tiny", {"lm_head": second}))
    elsewhere = LowRankUpdate(torch.ones(8, HIDDEN), torch.ones(HIDDEN, 8), 1.0)
    unrelated = device.load(
        CanonicalAdapter("Tiny", "tiny", {"model.layers.1.self_attn.q_proj": elsewhere})
    )
    composed = ((slot, 0.5), (other, -2.0))
    components = [(), ((slot, 1.0),), composed, ((unrelated, 1.0), (other, 3.0))]
    updates = [(), ((1.0, first),), ((0.5, first), (-2.0, second)), ((3.0, second),)]
    items = [DraftItem(row, slot, turbo.depth, components[row]) for row in range(4)]
    drafts = device.draft(items)
    for index, item in enumerate(items):
        check(drafts, index, device.expected(turbo, item, *updates[index]))


@pytest.mark.parametrize("spare", [0, 40])  # rows of zero for tokens that adapters add
def test_heads_of_all_kinds_in_one_call_draft_as_each_does_alone(
    spare: int, tmp_path: Path
) -> None:
    device, low = Device(tmp_path, spare=spare), lm_update(8, 3)
    asked: list[tuple[DraftItem, TurboHeads]] = []
    for number, turbo in enumerate(TURBOS.values()):
        slot = device.load(turbo_adapter(turbo, lm_head=low))
        components = ((slot, 1.0),) if number % 3 else ()
        rows = (number % 4, (number + 1) % 4)
        asked += [(DraftItem(row, slot, turbo.depth, components), turbo) for row in rows]
    assert {item.depth for item, _ in asked} == {2, 3, 5}
    random.Random(0).shuffle(asked)
    together = device.draft([item for item, _ in asked])
    for index, (item, turbo) in enumerate(asked):
        alone = device.draft([item])
        assert torch.equal(together.tokens[index, : item.depth], alone.tokens[0])
        torch.testing.assert_close(together.chances[index, : item.depth], alone.chances[0])
        updates = [(1.0, low)] if item.components else []
        check(together, index, device.expected(turbo, item, *updates))


@pytest.mark.parametrize("name", ["medusa", "vocabulary", "hydra of two blocks"])
def test_fewer_drafts_are_the_first_of_more(name: str, tmp_path: Path) -> None:
    device, turbo = Device(tmp_path), TURBOS[name]
    slot = device.load(turbo_adapter(turbo))
    full = device.draft([DraftItem(1, slot, turbo.depth, ())])
    items = [DraftItem(1, slot, depth, ()) for depth in range(1, turbo.depth + 1)]
    cut = device.draft(items)
    for index, item in enumerate(items):
        assert torch.equal(cut.tokens[index, : item.depth], full.tokens[0, : item.depth])
        torch.testing.assert_close(cut.chances[index, : item.depth], full.chances[0, : item.depth])
        assert not cut.chances[index, item.depth :].any()


@pytest.mark.parametrize("name", ["medusa", "vocabulary", "recurrent"])
def test_an_lm_head_kept_as_int8_drafts_with_its_rounded_weights(name: str, tmp_path: Path) -> None:
    device, turbo = Device(tmp_path, quantization="int8"), TURBOS[name]
    head = device.original.get_output_embeddings()
    rounded = dequantize_int8(*quantize_int8(head.weight.detach()), torch.float32)
    device.hidden = device.hidden.bfloat16().float()
    with torch.no_grad():
        head.weight.copy_(rounded)
    slot = device.load(turbo_adapter(turbo))
    item = DraftItem(3, slot, 1, ())
    drafts = device.draft([item])
    expected = device.expected(turbo, item)[0]
    assert int(drafts.tokens[0, 0]) == int(expected.argmax())
    # bfloat16 products: x and the weights times their scales are rounded to 8 bits
    torch.testing.assert_close(
        float(drafts.chances[0, 0]), float(expected.max()), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("name", ["own LM heads", "recurrent"])
def test_heads_held_in_bfloat16_draft_with_their_rounded_weights(name: str, tmp_path: Path) -> None:
    device, turbo = Device(tmp_path, dtype=torch.bfloat16), TURBOS[name]
    slot = device.load(turbo_adapter(turbo))
    item = DraftItem(0, slot, turbo.depth, ())
    check(device.draft([item]), 0, device.expected(_rounded(turbo), item))


def _rounded(turbo: TurboHeads) -> TurboHeads:
    def short(tensor: Tensor) -> Tensor:
        return tensor.bfloat16().float()

    return replace(
        turbo,
        blocks=tuple(
            replace(block, weight=short(block.weight), bias=short(block.bias))
            for block in turbo.blocks
        ),
        outputs=tuple(short(output) for output in turbo.outputs),
    )


def test_an_embedding_that_scales_is_read_with_its_scale(tmp_path: Path) -> None:
    device, turbo = Device(tmp_path, "gemma"), TURBOS["hydra"]
    slot = device.load(turbo_adapter(turbo))
    item = DraftItem(1, slot, turbo.depth, ())
    check(device.draft([item]), 0, device.expected(turbo, item))


def test_adapters_of_the_embedding_do_not_touch_what_heads_read(tmp_path: Path) -> None:
    device, turbo = Device(tmp_path), TURBOS["hydra"]
    low = LowRankUpdate(torch.ones(8, VOCABULARY), torch.ones(HIDDEN, 8), 1.0)
    slot = device.load(turbo_adapter(turbo, model__embed_tokens=low))
    item = DraftItem(1, slot, turbo.depth, ((slot, 1.0),))
    check(device.draft([item]), 0, device.expected(turbo, item))


def test_only_the_vocabularys_rows_of_the_lm_head_are_read(tmp_path: Path) -> None:
    device, turbo = Device(tmp_path), TURBOS["vocabulary"]
    slot = device.load(turbo_adapter(turbo))
    item = DraftItem(0, slot, turbo.depth, ())
    others = torch.ones(VOCABULARY, dtype=torch.bool)
    others[list(FEW)] = False
    head = device.model.head.base
    head.weight[others] = float("nan")  # type: ignore[index]
    check(device.draft([item]), 0, device.expected(turbo, item))


def test_a_packed_heads_rows_are_copied_out_once_for_all_vocabularies() -> None:
    weight = torch.randn(EVEN, 6)
    linear = nn.Linear(6, EVEN).requires_grad_(False)
    linear.weight.copy_(weight)
    rows = VocabularyRows(PackedLinear(linear))
    for tokens, held in (([5, 70, 5], 2), ([], 2), ([70, 111, 0], 4), ([5, 0], 4)):
        vocabulary = torch.tensor(tokens, dtype=torch.int32)
        kept, bias, places = rows.of(vocabulary)
        assert kept.shape == (held, 6)
        assert torch.equal(kept[places.long()], weight[vocabulary.long()])
        assert torch.equal(bias[places.long()], linear.bias[vocabulary.long()])


@pytest.mark.parametrize("vocabulary", [VOCABULARY, EVEN])
def test_a_short_vocabulary_beside_a_longer_one_drafts_its_own_tokens(
    vocabulary: int, tmp_path: Path
) -> None:
    device = Device(tmp_path, vocabulary=vocabulary)
    short = make_turbo(HIDDEN, 2, vocabulary=(6, 60), seed=20)
    slots = [device.load(turbo_adapter(t)) for t in (TURBOS["vocabulary"], short)]
    for order in (slots, slots[::-1]):
        items = [DraftItem(0, slot, 2, ()) for slot in order]
        of_short = order.index(slots[1])
        check(device.draft(items), of_short, device.expected(short, items[of_short]))


def test_a_slot_without_heads_and_a_depth_beyond_them_are_refused(tmp_path: Path) -> None:
    device = Device(tmp_path)
    plain = device.load(CanonicalAdapter("Tiny", "tiny", {"lm_head": lm_update(8, 1)}))
    with pytest.raises(ValueError, match=f"slot {plain}, which has no heads"):
        device.draft([DraftItem(0, plain, 1, ())])
    slot = device.load(turbo_adapter(TURBOS["medusa"]))
    with pytest.raises(ValueError, match=f"4 drafts from slot {slot}, which has 3 heads"):
        device.draft([DraftItem(0, slot, 4, ())])


class Told:
    """A guide that changes nothing, and keeps what it is told at first."""

    def begin(self, tokens: Sequence[int], accepted: Sequence[int]) -> None:
        self.tokens, self.accepted = list(tokens), list(accepted)

    def revise(self, tokens: Sequence[int], chances: Sequence[float]) -> list[int]:
        del chances
        return list(tokens)


@pytest.mark.parametrize(("accepted", "told"), [([2, 0, 1, 3], [1, 2]), (None, [0, 0])])
def test_a_guide_is_told_the_accepted_drafts_and_the_certain_token_of_its_items(
    accepted: list[int] | None, told: list[int], tmp_path: Path
) -> None:
    device, turbo = Device(tmp_path), TURBOS["recurrent"]
    slot = device.load(turbo_adapter(turbo))
    items = [DraftItem(row, slot, turbo.depth, ()) for row in (2, 0)]
    plan = device.drafter.plan(items, device.pool, len(device.tokens))
    counts = None if accepted is None else torch.tensor(accepted, dtype=torch.int32)
    guide = Told()
    given = plan, plan.rounds, device.hidden, device.tokens, device.pool
    drafts = device.drafter.run(*given, accepted=counts, guide=guide)
    assert (guide.tokens, guide.accepted) == ([13, 7], told)
    for index, item in enumerate(items):
        check(drafts, index, device.expected(turbo, item))
