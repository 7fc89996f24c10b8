"""The canonical bytes of Turbo heads: equal heads, however put together, give equal bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical_bytes import to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.errors import CorruptVersionError, InvalidAdapterError
from quickchange_store.info import AdapterInfo, TurboInfo
from quickchange_store.store import INFO_FILE, Store

H = 4
PINNED = "0de4cec7449a3efbcafab51adeab9620ad4f54186cf5821b684aac8add6b2b5a"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def block(seed: int, dtype: torch.dtype = torch.float32, width: int = H) -> DraftBlock:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(H, width, generator=generator)
    return DraftBlock(weight.to(dtype), torch.randn(H, generator=generator).to(dtype))


@st.composite
def turbo_heads(draw: st.DrawFn) -> TurboHeads:
    sequential = draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    first = [block(draw(st.integers(0, 2)), dtype, 2 * H if sequential else H) for _ in range(2)]
    later = [block(draw(st.integers(10, 12)), dtype) for _ in range(2)]
    head = st.builds(
        lambda start, rest: (start, *rest),
        st.integers(0, 1),
        st.lists(st.integers(2, 3), max_size=2),
    )
    heads = draw(st.lists(head, min_size=1, max_size=5))
    tokens = draw(st.none() | st.sets(st.integers(0, 9), min_size=1, max_size=5))
    rows = 10 if tokens is None else len(tokens)
    own = draw(st.booleans())
    return TurboHeads(
        blocks=(*first, *later),
        heads=tuple(heads),
        sequential=sequential,
        vocabulary=None if tokens is None else torch.tensor(sorted(tokens), dtype=torch.int32),
        outputs=tuple(torch.full((rows, H), float(draw(st.integers(0, 1)))) for _ in heads if own),
        tenant=draw(st.sampled_from((None, "acme", "globex"))),
    )


def adapter(heads: TurboHeads, lora: bool = False) -> CanonicalAdapter:
    update = LowRankUpdate(torch.ones(2, 5), torch.ones(3, 2), 0.5)
    return CanonicalAdapter("L", "base", {"m.q": update} if lora else {}, {}, heads)


def equal_blocks(left: DraftBlock, right: DraftBlock) -> bool:
    pairs = ((left.weight, right.weight), (left.bias, right.bias))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def same(left: TurboHeads, right: TurboHeads) -> bool:
    """True if two sets of heads compute the same, head by head and block by block, and for the same
    requests."""
    chains = [
        [[turbo.blocks[index] for index in head] for head in turbo.heads] for turbo in (left, right)
    ]
    vocabularies = [None if t.vocabulary is None else t.vocabulary.tolist() for t in (left, right)]
    return (
        left.sequential == right.sequential
        and left.tenant == right.tenant
        and vocabularies[0] == vocabularies[1]
        and len(left.outputs) == len(right.outputs)
        and all(map(torch.equal, left.outputs, right.outputs))
        and [len(chain) for chain in chains[0]] == [len(chain) for chain in chains[1]]
        and all(
            equal_blocks(x, y)
            for one, other in zip(*chains, strict=True)
            for x, y in zip(one, other, strict=True)
        )
    )


@settings(max_examples=60, deadline=None)
@given(heads=turbo_heads(), lora=st.booleans())
def test_what_is_written_is_read_back(
    heads: TurboHeads, lora: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = adapter(heads, lora)
    path = tmp_path_factory.mktemp("bytes") / "adapter.safetensors"
    with path.open("wb") as file:
        digest = adapter_bytes.write(made, file)
    loaded = adapter_bytes.load(path)
    assert loaded.turbo is not None
    assert same(loaded.turbo, heads)
    assert loaded.updates.keys() == made.updates.keys()
    assert digest == adapter_bytes.digest(loaded) == adapter_bytes.file_digest(path)
    assert path.read_bytes() == to_bytes(made)
    assert loaded.parameters == made.parameters


@settings(max_examples=60, deadline=None)
@given(heads=turbo_heads(), order=st.permutations(range(4)), twice=st.booleans())
def test_how_blocks_are_numbered_and_shared_does_not_matter(
    heads: TurboHeads, order: list[int], twice: bool
) -> None:
    blocks = [heads.blocks[index] for index in order]
    place = {index: number for number, index in enumerate(order)}
    if twice:  # every head after the first has copies of its own
        blocks += [DraftBlock(b.weight.clone(), b.bias.clone()) for b in blocks]
    numbers = tuple(
        tuple(place[index] + (4 if twice and i else 0) for index in head)
        for i, head in enumerate(heads.heads)
    )
    other = dataclasses.replace(heads, blocks=tuple(blocks), heads=numbers)
    assert to_bytes(adapter(other)) == to_bytes(adapter(heads))


@settings(max_examples=60, deadline=None)
@given(left=turbo_heads(), right=turbo_heads())
def test_only_equal_heads_have_equal_bytes(left: TurboHeads, right: TurboHeads) -> None:
    digests = [adapter_bytes.digest(adapter(turbo)) for turbo in (left, right)]
    assert (digests[0] == digests[1]) == same(left, right)


@settings(max_examples=20, deadline=None)
@given(heads=turbo_heads())
def test_heads_change_the_digest_of_a_lora(heads: TurboHeads) -> None:
    both = adapter(heads, lora=True)
    alone = dataclasses.replace(both, turbo=None)
    assert adapter_bytes.digest(both) != adapter_bytes.digest(alone)
    assert b"turbo" not in to_bytes(alone)


def test_the_bytes_stay_the_same_over_releases() -> None:
    vocabulary = torch.tensor([1, 4, 6], dtype=torch.int32)
    blocks = (
        DraftBlock(torch.arange(8.0).reshape(2, 4), torch.ones(2)),
        DraftBlock(torch.arange(4.0).reshape(2, 2).bfloat16(), torch.zeros(2)),
    )
    outputs = (torch.arange(6.0).reshape(3, 2),) * 2
    heads = TurboHeads(blocks, ((0,), (0, 1)), True, vocabulary, outputs)
    assert adapter_bytes.digest(adapter(heads, lora=True)) == PINNED


def test_what_heads_share_counts_once() -> None:
    heads = TurboHeads((block(1), block(1)), ((0,), (1,)), outputs=(torch.ones(10, H),) * 2)
    assert adapter(heads).parameters == H * H + H + 10 * H


def test_a_module_named_as_a_tensor_of_the_heads_is_refused() -> None:
    update = LowRankUpdate(torch.ones(1, 2), torch.ones(3, 1), 1.0, torch.ones(3))
    heads = TurboHeads((block(1),), ((0,),))
    clash = CanonicalAdapter("L", "base", {"turbo.block.0": update}, {}, heads)
    with pytest.raises(InvalidAdapterError, match=r"turbo\.block\.0\.bias"):
        to_bytes(clash)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"heads\\":[[0]]', b'\\"heads\\":[[1]]'),
        (b'\\"heads\\":[[0]]', b'\\"heads\\":[[]] '),
        (b'\\"heads\\":[[0]]', b'\\"heads\\":\\"a\\"'),
        (b'\\"sequential\\":false', b'\\"sequential\\":true '),
        (b'\\"vocabulary\\":false', b'\\"vocabulary\\":true '),
        (b'\\"turbo\\":', b'\\"trubo\\":'),
        (b'\\"format\\":3', b'\\"format\\":4'),
        (b"turbo.block.0.bias", b"turbo.block.1.bias"),
    ],
)
def test_a_damaged_header_is_refused(old: bytes, new: bytes, tmp_path: Path) -> None:
    content = to_bytes(adapter(TurboHeads((block(1),), ((0,),))))
    assert content.count(old) == 1
    assert len(old) == len(new)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content.replace(old, new))
    with pytest.raises(CorruptVersionError, match=r"adapter\.safetensors"):
        adapter_bytes.load(path)


def test_a_dtype_that_can_not_be_stored_is_refused() -> None:
    heads = TurboHeads((block(1, torch.float64),), ((0,),))
    with pytest.raises(InvalidAdapterError, match=r"turbo\.block\.0\.weight"):
        adapter_bytes.digest(adapter(heads))


@pytest.mark.parametrize(
    "vocabulary",
    [
        torch.tensor([3, 1], dtype=torch.int32),
        torch.tensor([1, 1], dtype=torch.int32),
        torch.tensor([-1, 1], dtype=torch.int32),
        torch.tensor([], dtype=torch.int32),
        torch.tensor([1, 2]),
        torch.tensor([[1, 2]], dtype=torch.int32),
    ],
)
def test_a_vocabulary_that_is_no_ascending_list_is_refused(vocabulary: torch.Tensor) -> None:
    with pytest.raises(InvalidAdapterError, match="vocabulary"):
        TurboHeads((block(1),), ((0,),), vocabulary=vocabulary)


@pytest.mark.parametrize(
    "shapes", [[(10, H + 1)], [(10, H)], [(3, H), (4, H)], [(3,), (3,)], [(3, H, 1)] * 2]
)
def test_own_lm_heads_that_do_not_fit_are_refused(shapes: list[tuple[int, ...]]) -> None:
    outputs = tuple(torch.zeros(shape) for shape in shapes)
    with pytest.raises(InvalidAdapterError, match="LM heads"):
        TurboHeads((block(1),), ((0,), (0,)), outputs=outputs)


def test_an_info_of_an_earlier_release_is_readable(tmp_path: Path, small_adapter: Any) -> None:
    store = Store(tmp_path)
    digest = store.add("a", small_adapter(1)).digest
    path = store.path(digest).parent / INFO_FILE
    tree = json.loads(path.read_bytes())
    for name in ("kind", "turbo", "base_hidden", "base_vocabulary", "checksum"):
        del tree[name]
    path.write_text(json.dumps(tree))
    info = AdapterInfo.read(path)
    assert (info.kind, info.turbo, info.base_hidden) == ("", None, None)


def test_an_info_tells_of_the_heads(tmp_path: Path, turbo_adapter: Any) -> None:
    store = Store(tmp_path)
    info = store.info(store.add("a", turbo_adapter(1)).digest)
    assert info.turbo is not None
    assert (info.kind, info.ranks, info.dtypes) == ("Turbo", (), ("float32",))
    assert (info.turbo.depth, info.turbo.sequential, info.turbo.vocabulary) == (2, False, None)
    assert info.turbo.parameters == info.parameters == 2 * (16 + 4)


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "ratio"), [(576, 49152, 86), (4096, 32000, 8.8), (4096, 128256, 32)]
)
def test_medusas_parameters_are_what_the_formula_says(
    hidden: int, vocabulary: int, ratio: float
) -> None:
    with torch.device("meta"):
        weight, bias = torch.empty(hidden, hidden), torch.empty(hidden)
    info = TurboInfo(3, hidden, False, None, False, 3 * (weight.numel() + bias.numel()))
    assert info.medusa_parameters(vocabulary) / info.parameters == pytest.approx(ratio, rel=0.02)
