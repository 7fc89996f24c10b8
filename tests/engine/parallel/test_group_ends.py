"""A rank that ends or hangs is replaced with its group, and streams go on; nothing is left over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import failing_rank
import pytest
from client_support import next_of, until
from parallel_adapters import stored
from rank_groups import SECONDS, answered, children_of, engine_group, lives, settings_of
from tiny_models import save_model

from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.entrypoints.engine_start import engine_main
from quickchange_server.errors import AdapterFailedError, EngineFailedError
from quickchange_server.protocol import Component, SamplingParams, Submit

LONG = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, list[Submit]]:
    """Settings of a group of two ranks, and streams with adapters that are drawn."""
    folder = tmp_path_factory.mktemp("served")
    model = save_model("llama", folder / "model")
    digests = stored(model, folder / "store")
    settings = settings_of(model, folder / "store", 2, engine_stall_seconds=3.0)
    sampling = SamplingParams(max_tokens=LONG, temperature=0.8, seed=1)
    compositions = [(), (Component(digests["rank-4"]),), (Component(digests["gains"], 0.5),)]
    wanted = [
        Submit(f"s{index}", tuple(range(2, 9 + index)), sampling, adapters, seed=index)
        for index, adapters in enumerate(compositions)
    ]
    return settings, wanted


async def _stream(client: EngineClient, wanted: Submit, seen: list[int]) -> list[int]:
    tokens: list[int] = []
    stream = client.generate([wanted], label="a")
    while True:
        delta = await next_of(stream)
        tokens += delta.token_ids
        seen.append(len(delta.token_ids))
        if delta.finish_reason is not None:
            return tokens


def _disturbed(
    settings: Settings, wanted: list[Submit], disturb: Callable[[int, int], None]
) -> tuple[list[list[int]], list[int]]:
    """Tokens of the streams when `disturb` was called with the ids of rank 0 and rank 1 on the way;
    and all processes that ever were ranks."""

    async def scenario() -> tuple[list[list[int]], list[int]]:
        seen: list[int] = []
        async with engine_group(settings) as client:
            streams = [asyncio.create_task(_stream(client, each, seen)) for each in wanted]
            await until(lambda: sum(seen) > len(wanted) * LONG // 4)
            first = client.pid
            assert first is not None
            (rank,) = children_of(first)
            disturb(first, rank)
            tokens = await asyncio.gather(*streams)
            second = client.pid
            assert second is not None
            assert second != first
            ranks = [first, rank, second, *children_of(second)]
        await until(lambda: not any(lives(pid) for pid in ranks))
        return tokens, ranks

    return asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_streams_go_on_whichever_rank_is_killed_or_hangs(
    served: tuple[Settings, list[Submit]],
) -> None:
    settings, wanted = served
    undisturbed = [
        [token for delta in deltas for token in delta.token_ids]
        for deltas in answered(settings, wanted)
    ]
    assert [len(tokens) for tokens in undisturbed] == [LONG] * len(wanted)
    for disturb in (
        lambda _first, rank: os.kill(rank, signal.SIGKILL),
        lambda first, _rank: os.kill(first, signal.SIGKILL),
        lambda _first, rank: os.kill(rank, signal.SIGSTOP),
    ):
        tokens, _ranks = _disturbed(settings, wanted, disturb)
        assert tokens == undisturbed


def test_an_adapter_that_one_rank_can_not_read_fails_its_requests_alone(
    served: tuple[Settings, list[Submit]],
) -> None:
    settings, wanted = served
    digest = wanted[1].adapters[0].digest
    main = partial(failing_rank.unreadable_adapter, unreadable=digest)

    async def scenario() -> None:
        async with engine_group(settings, main) as client:
            with pytest.raises(AdapterFailedError, match="its bytes are not there"):
                await _stream(client, wanted[1], [])
            assert len(await _stream(client, wanted[2], [])) == LONG
            assert len(await _stream(client, wanted[0], [])) == LONG

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


@pytest.mark.parametrize("case", ["no plan", "second rank"])
def test_a_start_that_fails_says_why_and_leaves_nothing(
    case: str, served: tuple[Settings, list[Submit]], tmp_path: Path
) -> None:
    settings, _ = served
    main, said = failing_rank.no_memory_at_start, "rank 1: no memory for this rank's part"
    if case == "no plan":
        main, said = engine_main, "no plan to cut StableLmForCausalLM"
        model = save_model("stablelm", tmp_path / "model")
        settings = settings_of(model, tmp_path / "store", 2)
    before = _all_processes()

    async def scenario() -> None:
        with pytest.raises(EngineFailedError, match=said):
            async with engine_group(settings, main):
                pass
        await until(lambda: not _all_processes() - before)

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def _all_processes() -> set[int]:
    """This process's descendants but the one that forks engines."""
    found: set[int] = set()
    forkers = children_of(os.getpid())
    new = {child for forker in forkers for child in children_of(forker)}
    while new:
        found |= new
        new = {child for pid in new for child in children_of(pid)}
    return {pid for pid in found if lives(pid)}
