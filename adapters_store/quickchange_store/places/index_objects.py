"""The index as a sequence of objects, of which each is written once and the last one counts.

    index/000000000042.json    {"epoch": …, "writer": …, "index": the index's JSON}

A writer creates the next number where there is none; of several at once one succeeds, and the
others look again. So no lock is needed, and no commit is lost. Readers are answered from memory;
a thread looks for a next number all the while.

The epoch is raised by whoever removes versions: see `BucketPlace`.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

from quickchange_store.errors import (
    CorruptStoreError,
    StoreError,
    StoreLocationError,
    StoreUnavailableError,
)
from quickchange_store.index import Index, damaged, decode, encode
from quickchange_store.json_files import UnreadableFileError, read_object
from quickchange_store.places.objects import Objects

LOOK_SECONDS = 0.3  # between two looks: a change is seen by all after so long and a call's time
STALE_SECONDS = 3.0  # without a look that succeeded, until readers' index is said to be old
LIST_SECONDS = 30.0  # the last number is looked up so often, in case the next was removed already
KEPT_SECONDS = 3600.0  # replaced indexes are kept so long, for whoever lags behind

_FOLDER = "index"
_PROBE = "probe"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class State:
    """One object of the sequence; the number 0 stands for none."""

    number: int = 0
    epoch: int = 0
    index: Index = field(default_factory=Index)


class IndexObjects:
    """The sequence under one URL. `prepare` is given each index before readers see it."""

    def __init__(self, objects: Objects, prepare: Callable[[Index], None]) -> None:
        self._objects = objects
        self._prepare = prepare
        self._turn = threading.RLock()  # one look, or one commit, at a time
        self._known: State | None = None  # the newest that was read or written here
        self._listed = 0.0  # when the last number was looked up
        self._shown: State | None = None  # what readers see
        self._looked = 0.0  # when that was last known to be the newest
        self._failed = False  # at the last look
        self._proved = False  # the service creates exclusively

    # --- reading --------------------------------------------------------------------------------

    def seen(self) -> State:
        """What was the newest at the last look; only the first call waits for the service."""
        if self._shown is None:
            with self._turn:
                if self._shown is None:
                    self._show(self.newest())
                    threading.Thread(
                        target=_look_on, args=(weakref.ref(self),), name="store-index", daemon=True
                    ).start()
        assert self._shown is not None
        return self._shown

    @property
    def trouble(self) -> str | None:
        """The time for which readers have seen an index that may not be the newest, in words."""
        silent = time.monotonic() - self._looked
        if self._shown is None or silent < STALE_SECONDS:
            return None
        return f"the store was last read {silent:.0f} seconds ago"

    def newest(self) -> State:
        """The newest now. Raises CorruptStoreError, StoreUnavailableError, StoreLocationError."""
        with self._turn:
            state = self._known
            if state is None or time.monotonic() - self._listed > LIST_SECONDS:
                state = self._last(state)
            while (following := self._read(state.number + 1)) is not None:
                state = following
            self._known = state
            return state

    def _last(self, known: State | None) -> State:
        began = time.monotonic()
        while True:
            last = max((_number(key) for key in self._objects.under(_FOLDER)), default=0)
            if known is not None and last < known.number:
                raise StoreUnavailableError(
                    "the store's index was there and is gone",
                    file=self._objects.shown,
                    remedy="restore what was deleted from the bucket, or start servers anew",
                )
            state = known if known and last == known.number else self._read(last)
            if state is not None:  # not removed since it was listed
                self._listed = began
                return state

    def _read(self, number: int) -> State | None:
        if number == 0:
            return State()
        content = self._objects.read(_key(number))
        return None if content is None else self._decoded(content, number)

    def _decoded(self, content: bytes, number: int) -> State:
        place = self._objects.address(_key(number))
        try:
            tree = read_object(content)
            return State(
                number, int(tree["epoch"]), decode(json.dumps(tree["index"]).encode(), place)
            )
        except UnreadableFileError as error:
            raise damaged(place, error.problem, error.key) from error
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(place, f"it lacks {error}") from error

    def _show(self, state: State) -> None:
        if self._shown is None or state.index is not self._shown.index:
            self._prepare(state.index)
        self._shown = state
        self._looked = time.monotonic()

    def look(self) -> None:
        """Let readers see what is the newest now; a failure is logged once."""
        try:
            with self._turn:
                self._show(self.newest())
        except (StoreError, OSError) as error:
            if not self._failed:
                logger.warning("the store's index can't be read; the last one is used: %s", error)
            self._failed = True
        else:
            if self._failed:
                logger.warning("the store's index is read again")
            self._failed = False

    # --- writing --------------------------------------------------------------------------------

    def commit(self, base: State, index: Index, epoch: int | None = None) -> State | None:
        """Add the index that follows `base`, the newest; None where another writer was first.

        Raises StoreUnavailableError where it is not known to be written.
        """
        with self._turn:
            self._prove_exclusive()
            following = State(base.number + 1, base.epoch if epoch is None else epoch, index)
            key = _key(following.number)
            content = _encoded(following)
            if not self._created(key, content):
                return None
            if base.number and self._objects.stat(_key(base.number)) is None:
                raise StoreUnavailableError(
                    "the change took so long that the index before it was removed meanwhile",
                    file=self._objects.address(key),
                    remedy="see whether it was made, and make it again where not",
                )
            self._known = following
            if self._shown is not None:
                # Made it is, whatever hinders the reading of what readers may ask of it.
                with suppress(StoreError, OSError):
                    self._prepare(following.index)
                self._shown = following
            return following

    def _created(self, key: str, content: bytes) -> bool:
        """Whatever an error said, the object tells whose it is: its writer's name is in it."""
        try:
            self._objects.create(key, content)
        except StoreUnavailableError:
            there = self._objects.read(key)
            if there is None:
                raise
            return there == content
        return True

    def _prove_exclusive(self) -> None:
        """Raise StoreLocationError where the service lets two writers create one object."""
        if self._proved:
            return
        key = f"{_PROBE}/{secrets.token_hex(8)}"
        self._objects.create(key, b"first")
        with suppress(StoreUnavailableError):
            self._objects.create(key, b"second")
        self._proved = self._objects.read(key) == b"first"
        self._objects.remove([key])
        if not self._proved:
            raise StoreLocationError(
                "the service overwrites objects that were to be created only where there are none "
                "(If-None-Match on PUT), so several writers would undo each other's changes",
                file=self._objects.shown,
                remedy="use a service or a newer version of it that has conditional writes, or a "
                "shared folder",
            )

    # --- upkeep ---------------------------------------------------------------------------------

    def modified(self, state: State) -> float:
        """When a state was written, by the service's clock."""
        stored = self._objects.stat(_key(state.number))
        if stored is None:
            raise CorruptStoreError(
                "the index was removed while it was in use",
                file=self._objects.address(_key(state.number)),
                remedy="restore it from a backup; the versions beside it are untouched",
            )
        return stored.modified

    def trim(self, now: float) -> int:
        """Remove indexes that were replaced long ago, oldest first, and old probes; how many."""
        listed = self._objects.under(_FOLDER)
        keys = sorted(listed)
        old = [
            key
            for key, following in pairwise(keys)
            if listed[following].modified <= now - KEPT_SECONDS
        ]
        probes = self._objects.under(_PROBE)
        old += [key for key, probe in probes.items() if probe.modified <= now - KEPT_SECONDS]
        self._objects.remove(old)
        return len(old)


def _look_on(reference: weakref.ref[IndexObjects]) -> None:
    """Look until the sequence is used by nobody."""
    while True:
        time.sleep(LOOK_SECONDS)
        indexes = reference()
        if indexes is None:
            return
        indexes.look()
        del indexes


def _key(number: int) -> str:
    return f"{_FOLDER}/{number:012d}.json"


def _number(key: str) -> int:
    digits = key.removeprefix(f"{_FOLDER}/").removesuffix(".json")
    return int(digits) if digits.isdecimal() else 0


def _encoded(state: State) -> bytes:
    envelope = {"epoch": state.epoch, "writer": secrets.token_hex(16)}
    return json.dumps({**envelope, "index": json.loads(encode(state.index))}).encode()
