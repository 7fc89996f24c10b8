"""A salt parts requests: they share no cached prefix, and admission is fair over salts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_driver import Driver, make_engine, request
from tiny_models import save_model

from quickchange_server.engine.engine import Engine
from quickchange_server.engine.scheduling.fair_queue import FairQueue
from quickchange_server.engine.scheduling.sequence import Sequence, composition_key
from quickchange_server.protocol import Component

PROMPT = list(range(1, 22))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("salted") / "base")


def cached_tokens(engine: Engine, salts: list[str]) -> list[int | None]:
    """What each of the same prompt's requests found, one after the other."""
    drive = Driver(engine)
    for index, salt in enumerate(salts):
        engine.submit(request(str(index), PROMPT, salt=salt))
        drive.finish(str(index))
    return [drive.first[str(index)].cached_tokens for index in range(len(salts))]


def test_a_prefix_is_found_again_under_the_same_salt_alone(path: Path) -> None:
    found = cached_tokens(make_engine(path), ["one", "two", "", "one", "two", ""])
    assert found == [0, 0, 0, 20, 20, 20]


def test_a_requests_own_salt_parts_its_prefix_and_nothing_else(path: Path) -> None:
    engine = make_engine(path)
    drive = Driver(engine)
    for index, (salt, own) in enumerate([("", "a"), ("", "b"), ("t", "a"), ("", ""), ("", "a")]):
        engine.submit(replace(request(str(index), PROMPT, salt=salt), cache_salt=own))
        drive.finish(str(index))
    found = [drive.first[str(index)].cached_tokens for index in range(5)]
    assert found == [0, 0, 0, 0, 20]
    assert len({tuple(drive.tokens[str(index)]) for index in range(5)}) == 1
    keys = {Sequence(replace(request("x", PROMPT), cache_salt=own), 0.0).key for own in "ab"}
    assert len(keys) == 1


def test_salts_do_not_change_what_is_generated(path: Path) -> None:
    engine = make_engine(path)
    drive = Driver(engine)
    for salt in ("", "one"):
        engine.submit(request(salt or "none", PROMPT, salt=salt))
    drive.finish("none", "one")
    assert drive.tokens["none"] == drive.tokens["one"]


def test_no_salt_leaves_the_key_as_it_was() -> None:
    adapters = [Component("a" * 64, 0.5), Component("b" * 64, 2.0)]
    assert composition_key(adapters, "") == composition_key(adapters)
    assert composition_key(adapters).hex() == "91f0be77d37ef5f7c026a73a0f61fa06"


def test_a_salts_text_cannot_stand_for_another_composition() -> None:
    keys = {
        composition_key(adapters, salt)
        for adapters in ([], [Component("x", 1.0)], [Component("y", 1.0)])
        for salt in ("", "x", "y", "x\0y")
    }
    assert len(keys) == 12


def test_salted_tenants_share_a_popular_adapter_evenly() -> None:
    queue = FairQueue()
    for salt, count in (("busy", 50), ("quiet", 3)):
        for index in range(count):
            submit = request(f"{salt}-{index}", PROMPT, [("popular", 1.0)], salt=salt)
            queue.add(Sequence(submit, arrival=0.0))
    served = []
    for _ in range(53):
        sequence = queue.next(lambda _: True)
        assert sequence is not None
        queue.take(sequence)
        served.append(sequence.request_id)
    assert {"quiet-0", "quiet-1", "quiet-2"} <= set(served[:20])
