"""A request's choices as pieces of text, over the client with a fake engine in a real process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from client_support import client_of, generation, run, until
from fake_engine import Behaviour, entries, token_at
from text_support import byte_text

from quickchange_server.engine_client.client import EngineClient
from quickchange_server.errors import AdapterFailedError, QueueFullError
from quickchange_server.frontend.caller import ANYONE
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.output_processor import Transcript
from quickchange_server.frontend.request_observers import Account, Completed, Opened
from quickchange_server.protocol import Component, Submit

LONG = 100_000


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.completed_: list[Completed] = []

    def opened(self, opened: Opened) -> None:
        pass

    def completed(self, completed: Completed) -> None:
        self.completed_.append(completed)

    @property
    def endings(self) -> list[str]:
        return [completed.ending for completed in self.completed_]


async def generation_of(
    client: EngineClient, submits: Sequence[Submit], notes: Notes, stop: tuple[str, ...] = ()
) -> Generation:
    text = byte_text(eos=frozenset())
    opened = Opened("r", ANYONE, "base", "base", 3, 5, len(submits), time.time())
    account = await Account.open(opened, [notes])
    transcripts = [Transcript(text, replace(s.sampling, stop=stop)) for s in submits]
    return Generation(client.generate(submits), transcripts, account)


async def texts_of(made: Generation) -> list[str]:
    texts = [""] * len(made.choices)
    async with aclosing(made.pieces()) as pieces:
        async for index, piece in pieces:
            texts[index] += piece.text
    return texts


def text_of(submit: Submit, count: int) -> str:
    start = len(submit.prompt)
    return bytes(token_at(submit.seed, start + i, ()) for i in range(count)).decode()


def test_choices_share_one_stream_and_end_each_at_its_length() -> None:
    async def scenario() -> None:
        notes = Notes()
        async with client_of() as client:
            submits = [generation(f"r-{i}", 10 + i) for i in range(5)]
            made = await generation_of(client, submits, notes)
            assert await texts_of(made) == [text_of(s, 10 + i) for i, s in enumerate(submits)]
            made.close()
        assert made.completion_tokens == 60
        assert notes.endings == ["length"]

    run(scenario())


def test_a_stop_string_ends_its_choice_alone(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        notes = Notes()
        async with client_of(Behaviour(step_seconds=0.005, journal=journal)) as client:
            submits = [generation("r-0", LONG), generation("r-1", 30)]
            stop = text_of(submits[0], 8)[4:]
            assert stop not in text_of(submits[1], 30)
            made = await generation_of(client, submits, notes, stop=(stop,))
            expected = [text_of(submits[0], 4), text_of(submits[1], 30)]
            assert await texts_of(made) == expected
            assert client.in_flight == 0
            await until(lambda: len(entries(journal, "Cancel")) == 1)
        assert entries(journal, "Cancel")[0]["request_id"] == "r-0"
        assert notes.endings == ["length"]

    run(scenario())


@pytest.mark.parametrize("way", ["cancelled", "closed", "never read"])
def test_who_leaves_frees_the_engine_of_every_choice(way: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        notes = Notes()
        async with client_of(Behaviour(step_seconds=0.005, journal=journal)) as client:
            submits = [generation(f"r-{i}", LONG) for i in range(3)]
            made = await generation_of(client, submits, notes)
            if way == "cancelled":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(texts_of(made), 0.05)
            elif way == "closed":
                async with aclosing(made.pieces()) as pieces:
                    await anext(pieces)
            made.close()
            assert client.in_flight == 0
            await until(lambda: len(entries(journal, "Cancel")) == 3)
        assert notes.endings == ["cancelled"]

    run(scenario())


def test_the_first_error_ends_all_choices(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        notes = Notes()
        behaviour = Behaviour(step_seconds=0.005, missing=frozenset({"gone"}), journal=journal)
        async with client_of(behaviour) as client:
            broken = generation("r-1", adapters=(Component("gone"),))
            made = await generation_of(client, [generation("r-0", LONG), broken], notes)
            with pytest.raises(AdapterFailedError):
                await texts_of(made)
            assert client.in_flight == 0
            await until(lambda: len(entries(journal, "Cancel")) == 1)
        assert entries(journal, "Cancel")[0]["request_id"] == "r-0"
        assert notes.endings == ["failed"]

    run(scenario())


def test_a_request_is_admitted_whole_or_not_at_all(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with client_of(Behaviour(journal=journal), max_queue=4) as client:
            others = [client.generate([generation(f"o-{i}", LONG)]) for i in range(3)]
            with pytest.raises(QueueFullError):
                client.generate([generation(f"r-{i}") for i in range(2)])
            assert client.in_flight == 3
            for other in others:
                other.close()
            await until(lambda: len(entries(journal, "Cancel")) == 3)
            taken = client.generate([generation("a", LONG)])
            with pytest.raises(ValueError, match="already in flight"):
                client.generate([generation("b"), generation("a")])
            assert client.in_flight == 1
            taken.close()
            await until(lambda: len(entries(journal, "Cancel")) == 4)
        submitted = [entry["request_id"] for entry in entries(journal, "Submit")]
        assert submitted == ["o-0", "o-1", "o-2", "a"]

    run(scenario())
