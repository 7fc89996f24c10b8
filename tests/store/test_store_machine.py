"""The store against a plain model of it, over random histories of every operation."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_support import file_system_of, look, remove_memory
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.errors import (
    AdapterNotFoundError,
    InUseError,
    InvalidAdapterError,
    NameConflictError,
)
from quickchange_store.store import Store

NAMES = ["a", "b", "org/c"]
ALIASES = ["prod", "next", "a"]  # one of them is also a name
CONTENTS = range(4)
WITH_HEADS = frozenset({2, 3})


def adapter(content: int) -> CanonicalAdapter:
    update = LowRankUpdate(torch.full((1, 2), float(content)), torch.ones(2, 1), 1.0)
    heads = TurboHeads((DraftBlock(torch.eye(2), torch.zeros(2)),), ((0,),))
    turbo = heads if content in WITH_HEADS else None
    return CanonicalAdapter("LlamaForCausalLM", "tiny", {"m.q": update}, turbo=turbo)


DIGESTS = [adapter_bytes.digest(adapter(content)) for content in CONTENTS]
DRAFTING = {DIGESTS[content] for content in WITH_HEADS}
Pointer = tuple[str, int | None]


@dataclass
class Named:
    versions: dict[int, str] = field(default_factory=dict)
    current: int = 0
    next_number: int = 1


class StoreMachine(RuleBasedStateMachine):
    """Over a store in a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = self.opened("store")
        self.other = self.opened("other")  # as another process would see it
        self.names: dict[str, Named] = {}
        self.aliases: dict[str, Pointer] = {}
        self.turbos: dict[str, Pointer] = {}  # by alias

    def opened(self, who: str) -> Store:  # noqa: ARG002
        return Store(self.root / "store")

    def kept(self) -> set[str]:
        """Digests of the versions that take space."""
        return {path.name for path in (self.root / "store" / "versions").glob("??/*")}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(name=st.sampled_from(NAMES), content=st.sampled_from(CONTENTS))
    def add(self, name: str, content: int) -> None:
        if name in self.aliases:
            with pytest.raises(NameConflictError):
                self.store.add(name, adapter(content))
            return
        if (name, None) in self.turbos.values() and content not in WITH_HEADS:
            with pytest.raises(InUseError):
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

    @rule(
        alias=st.sampled_from(ALIASES),
        name=st.sampled_from(NAMES),
        pick=st.integers(0, 3),
        turbo=st.none() | st.tuples(st.sampled_from(NAMES), st.integers(0, 3)),
    )
    def alias(self, alias: str, name: str, pick: int, turbo: tuple[str, int] | None) -> None:
        pointers: list[Pointer] = [(name, pick or None)]
        pointers += [] if turbo is None else [(turbo[0], turbo[1] or None)]
        target, bound = text(pointers[0]), text(pointers[1]) if turbo else None
        if alias in self.names or any(pointer[0] in self.aliases for pointer in pointers):
            # Whichever is looked at first; a target that is missing may come before an alias.
            with pytest.raises((NameConflictError, AdapterNotFoundError)):
                self.store.alias(alias, target, bound)
        elif any(self.pointed(pointer) is None for pointer in pointers):
            with pytest.raises(AdapterNotFoundError):
                self.store.alias(alias, target, bound)
        elif turbo is not None and self.pointed(pointers[1]) not in DRAFTING:
            with pytest.raises(InvalidAdapterError):
                self.store.alias(alias, target, bound)
        else:
            self.store.alias(alias, target, bound)
            self.aliases[alias] = pointers[0]
            self.turbos.pop(alias, None)
            if turbo is not None:
                self.turbos[alias] = pointers[1]

    def pointed(self, pointer: Pointer) -> str | None:
        """The digest that a pointer means, where there is one."""
        entry = self.names.get(pointer[0])
        return None if entry is None else entry.versions.get(pointer[1] or entry.current)

    @rule(alias=st.sampled_from(ALIASES))
    def unalias(self, alias: str) -> None:
        if alias in self.aliases:
            self.store.unalias(alias)
            del self.aliases[alias]
            self.turbos.pop(alias, None)
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
        elif (name, None) in self.turbos.values() and entry.versions[number] not in DRAFTING:
            with pytest.raises(InUseError):
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
        pointers = [*self.aliases.values(), *self.turbos.values()]
        held = any(n == name and (all_gone or v in gone) for n, v in pointers)
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
        assert self.kept() == {d for entry in self.names.values() for d in entry.versions.values()}

    @invariant()
    def every_reader_sees_the_same(self) -> None:
        look(self.other)
        for store in (self.store, self.other):
            assert store.names() == tuple(sorted(self.names))
            for name, entry in self.names.items():
                served = store.resolve(name)
                assert served.digest == entry.versions[entry.current]
                assert served.turbo == (served.digest if served.digest in DRAFTING else None)
                for number, digest in entry.versions.items():
                    assert store.resolve(f"{name}@{number}").digest == digest
                    assert store.resolve(f"{name}@{digest[:12]}").version == number
            assert {a: (t.name, t.number) for a, t in store.aliases().items()} == self.aliases
            for alias, (name, number) in self.aliases.items():
                entry = self.names[name]
                resolved = store.resolve(alias)
                assert resolved.version == (number or entry.current)
                own = resolved.digest if resolved.digest in DRAFTING else None
                bound = self.turbos.get(alias)
                assert resolved.turbo == (own if bound is None else self.pointed(bound))

    @invariant()
    def check_integrity(self) -> None:
        assert self.other.verify() == []


def text(pointer: Pointer) -> str:
    name, number = pointer
    return name if number is None else f"{name}@{number}"


class BucketMachine(StoreMachine):
    """Over a store in a bucket, whose two users have a cache each."""

    def opened(self, who: str) -> Store:
        return Store("memory://machine/store", self.root / who, 1 << 30)

    def kept(self) -> set[str]:
        found = file_system_of(self.store).find("/machine/store/versions")
        return {path.split("/")[5] for path in found}

    def teardown(self) -> None:
        super().teardown()
        remove_memory()


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
BucketMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStoreMachine = StoreMachine.TestCase
TestBucketMachine = BucketMachine.TestCase
