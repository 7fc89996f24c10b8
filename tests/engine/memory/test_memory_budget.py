"""Division of a device's memory: the sum fits, and a refusal names settings that work."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from quickchange_server.engine.memory.budget import (
    GIB,
    MemoryLine,
    Parts,
    Wish,
    kv_bytes,
    memory_table,
)
from quickchange_server.errors import SettingError

sizes = st.integers(0, 40 * GIB)
parts_of = st.builds(
    Parts,
    total=st.integers(1 * GIB, 200 * GIB),
    share=st.floats(0.3, 1.0),
    base=sizes,
    adapters=sizes,
    graphs=sizes,
    scratch=sizes,
)


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    block, tokens = draw(st.integers(1, 1 << 22)), draw(st.sampled_from([1, 4, 16, 256]))
    length = draw(st.integers(16, 1 << 17))
    return Wish(
        draw(st.none() | st.integers(1024, 40 * GIB)),
        needed=-(-length // tokens) * block,
        tokens=length,
        block_bytes=block,
        block_tokens=tokens,
        least_arena=draw(st.integers(1, 1 << 20)),
        half_weights=draw(st.just(0) | sizes),
    )


@given(parts_of, wishes())
def test_what_is_given_fits_and_holds_the_least_that_is_useful(parts: Parts, wish: Wish) -> None:
    try:
        given_bytes = kv_bytes(parts, wish)
    except SettingError:
        assert parts.left < max(wish.needed, wish.kv_cache_bytes or 0) or (
            wish.kv_cache_bytes is not None and wish.kv_cache_bytes < wish.needed
        )
        return
    taken = parts.base + parts.adapters + parts.graphs + parts.scratch
    assert wish.needed <= given_bytes <= parts.limit - taken
    assert wish.kv_cache_bytes in (None, given_bytes)
    assert taken + given_bytes <= parts.total


@given(parts_of, wishes())
def test_every_setting_that_a_refusal_proposes_with_a_number_works(
    parts: Parts, wish: Wish
) -> None:
    assume(not wish.needed <= (wish.kv_cache_bytes or parts.left) <= parts.left)
    with pytest.raises(SettingError) as caught:
        kv_bytes(parts, wish)
    said = caught.value.message
    proposed = dict(re.findall(r"--([a-z-]+) ([\d.]+)(?=;|$)", said))
    for name, value in proposed.items():
        number = float(value) if "." in value else int(value)
        kv_bytes(*_with(parts, wish, name, number))
    if "--no-adapters" in said:
        kv_bytes(dataclasses.replace(parts, adapters=0), wish)
    if "--dtype bfloat16" in said:
        kv_bytes(dataclasses.replace(parts, base=parts.base - wish.half_weights), wish)


def _with(parts: Parts, wish: Wish, name: str, value: float) -> tuple[Parts, Wish]:
    match name:
        case "kv-cache-bytes":
            return parts, dataclasses.replace(wish, kv_cache_bytes=int(value))
        case "max-model-len":
            needed = -(-int(value) // wish.block_tokens) * wish.block_bytes
            return parts, dataclasses.replace(wish, tokens=int(value), needed=needed)
        case "adapter-device-bytes":
            return dataclasses.replace(parts, adapters=int(value)), wish
        case "gpu-memory-utilization":
            return dataclasses.replace(parts, share=value), wish
    raise AssertionError(name)


def test_a_card_that_is_too_small_is_refused_with_all_that_would_help() -> None:
    parts = Parts(24 * GIB, 0.9, 15 * GIB, 4 * GIB, 1 * GIB, 1 * GIB)
    wish = Wish(None, GIB, 8192, 2 << 20, 16, least_arena=1 << 20, half_weights=8 * GIB)
    with pytest.raises(SettingError) as caught:
        kv_bytes(parts, wish)
    assert caught.value.message == (
        "gpu_memory_utilization (0.9): the device has 644245094 bytes left for keys and values, "
        "and one sequence of 8192 tokens needs 1073741824. Taken: base 15.00 GiB, adapters 4.00 "
        "GiB, graphs 1.00 GiB, scratch 1.00 GiB of 21.60 GiB. What would fit: --max-model-len "
        "4912; --adapter-device-bytes 3865470566; --gpu-memory-utilization 0.917; "
        "--dtype bfloat16; fewer --max-sequences, for which there are fewer graphs; fewer "
        "--max-batch-tokens; a base that is stored quantised, a smaller one, or a larger device"
    )


def test_the_table_has_a_line_each_and_their_sum() -> None:
    lines = [
        MemoryLine("base", 3 << 29, "weights"),
        MemoryLine("graphs", None, "a CPU's recorded steps: half a MiB each"),
        MemoryLine("KV cache", 1 << 29, "10 tokens"),
    ]
    assert memory_table(lines, "of 4.00 GiB") == (
        "  base        1.50 GiB  weights\n"
        "  graphs             -  a CPU's recorded steps: half a MiB each\n"
        "  KV cache   512.0 MiB  10 tokens\n"
        "  sum         2.00 GiB  of 4.00 GiB"
    )
