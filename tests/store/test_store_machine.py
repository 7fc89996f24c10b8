"""The store against a plain model of it, over random histories of every operation."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quickchange_store import canonical
from quickchange_store.canonical import CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import AdapterNotFoundError, InUseError, NameConflictError
from quickchange_store.store import Store

NAMES = ["a", "b", "org/c"]
ALIASES = ["prod", "next", "a"]  # one of them is also a name
CONTENTS = range(4)


def adapter(content: int) -> CanonicalAdapter:
    update = LowRankUpdate(torch.full((1, 2), float(content)), torch.ones(2, 1), 1.0)
    return CanonicalAdapter("LlamaForCausalLM", "tiny", {"m.q": update})


DIGESTS = [canonical.digest(adapter(content)) for content in CONTENTS]


@dataclass
class Named:
    versions: dict[int, str] = field(default_factory=dict)
    current: int = 0
    next_number: int = 1


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = Store(self.root / "store")
        self.other = Store(self.root / "store")  # as another process would see it
        self.names: dict[str, Named] = {}
        self.aliases: dict[str, tuple[str, int | None]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(name=st.sampled_from(NAMES), content=st.sampled_from(CONTENTS))
    def add(self, name: str, content: int) -> None:
        if name in self.aliases:
            with pytest.raises(NameConflictError):
                self.store.add(name, adapter(content))
            return
        version = self.store.add(name, adapter(content))
        entry = self.names.setdefault(name, Named())
        known = [n for n, digest in entry.versions.items() if digest == DIGESTS[content]]
        if not known:
            known = [entry.next_number]
            entry.versions[entry.next_number] = DIGESTS[content]
            entry.next_number += 1
        entry.current = known[0]
        assert (version.number, version.digest) == (known[0], DIGESTS[content])

    @rule(alias=st.sampled_from(ALIASES), name=st.sampled_from(NAMES), pick=st.integers(0, 3))
    def alias(self, alias: str, name: str, pick: int) -> None:
        number = pick or None
        target = name if number is None else f"{name}@{number}"
        if alias in self.names or name in self.aliases:
            with pytest.raises(NameConflictError):
                self.store.alias(alias, target)
        elif name not in self.names or (number and number not in self.names[name].versions):
            with pytest.raises(AdapterNotFoundError):
                self.store.alias(alias, target)
        else:
            self.store.alias(alias, target)
            self.aliases[alias] = (name, number)

    @rule(alias=st.sampled_from(ALIASES))
    def unalias(self, alias: str) -> None:
        if alias in self.aliases:
            self.store.unalias(alias)
            del self.aliases[alias]
        else:
            with pytest.raises(AdapterNotFoundError):
                self.store.unalias(alias)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def rollback(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        entry = self.names[name]
        wanted = data.draw(st.sampled_from([None, *range(1, entry.next_number + 1)]))
        earlier = [number for number in entry.versions if number < entry.current]
        number = max(earlier, default=None) if wanted is None else wanted
        if number is None or number not in entry.versions:
            with pytest.raises(AdapterNotFoundError):
                self.store.rollback(name, wanted)
        else:
            assert self.store.rollback(name, wanted).number == number
            entry.current = number

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        entry = self.names[name]
        number = data.draw(st.sampled_from([None, *entry.versions]))
        gone = set(entry.versions) if number is None else {number}
        all_gone = gone == set(entry.versions)
        held = any(n == name and (all_gone or v in gone) for n, v in self.aliases.values())
        reference = name if number is None else f"{name}@{number}"
        if held or (not all_gone and entry.current in gone):
            with pytest.raises(InUseError):
                self.store.remove(reference)
            return
        assert {version.number for version in self.store.remove(reference)} == gone
        if all_gone:
            del self.names[name]
        else:
            del entry.versions[number]

    @rule()
    def collect(self) -> None:
        self.store.gc(min_age=0)
        on_disk = {path.name for path in (self.store.root / "versions").glob("??/*")}
        assert on_disk == {d for entry in self.names.values() for d in entry.versions.values()}

    @invariant()
    def every_reader_sees_the_same(self) -> None:
        for store in (self.store, self.other):
            assert store.names() == tuple(sorted(self.names))
            for name, entry in self.names.items():
                assert store.resolve(name).digest == entry.versions[entry.current]
                for number, digest in entry.versions.items():
                    assert store.resolve(f"{name}@{number}").digest == digest
                    assert store.resolve(f"{name}@{digest[:12]}").version == number
            assert {a: (t.name, t.number) for a, t in store.aliases().items()} == self.aliases
            for alias, (name, number) in self.aliases.items():
                entry = self.names[name]
                assert store.resolve(alias).version == (number or entry.current)

    @invariant()
    def check_integrity(self) -> None:
        assert self.other.verify() == []


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStoreMachine = StoreMachine.TestCase
