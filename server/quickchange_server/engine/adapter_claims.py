"""Which sequences hold their adapters on the device, and which have them lent only.

A sequence of the foreground claims its adapters when it comes and holds them until it ends. Those
of the background are lent theirs, and give them back where somebody in the foreground waits. One
without adapters is always ready. Knows nothing of rows or blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from quickchange_server.engine.sequence import Sequence

_NONE: Mapping[str, int] = {}


class Claims(Protocol):
    """What is needed of adapter residency: hold a request's adapters on the device."""

    def claim(self, key: str, digests: list[str]) -> None: ...
    def ready(self, key: str) -> Mapping[str, int] | None: ...
    def failed(self, key: str) -> str | None: ...
    def release(self, key: str) -> None: ...


class Holdings:
    """Owner of the sequences' claims."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._lent: dict[str, Sequence] = {}
        self.changed = False  # whether something was lent or given back; for the owner to clear

    @property
    def lent(self) -> list[Sequence]:
        """The background sequences with a claim."""
        return list(self._lent.values())

    def claim(self, sequence: Sequence) -> None:
        """What a sequence of the foreground needs."""
        if sequence.digests:
            self._claims.claim(sequence.request_id, sequence.digests)

    def lend(self, sequences: Seq[Sequence]) -> None:
        """Let these of the background claim what they need."""
        for sequence in sequences:
            if sequence.request_id not in self._lent and sequence.digests:
                self._claims.claim(sequence.request_id, sequence.digests)
                self._lent[sequence.request_id] = sequence
                self.changed = True

    def take_back(self, sequence: Sequence) -> None:
        """Release what was lent to this one, which can't run on without."""
        self._claims.release(sequence.request_id)
        del self._lent[sequence.request_id]
        self.changed = True

    def release(self, sequence: Sequence) -> None:
        """It has ended."""
        lent = self._lent.pop(sequence.request_id, None)
        if sequence.digests and (lent is not None or not sequence.request.background):
            self._claims.release(sequence.request_id)

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether all that it needs is on the device."""
        return not sequence.digests or self._ready(sequence) is not None

    def slots(self, sequence: Sequence) -> Mapping[str, int]:
        """The device slot of each adapter of a sequence that runs."""
        if not sequence.digests:
            return _NONE
        slots = self._ready(sequence)
        if slots is None:
            raise RuntimeError(f"{sequence.request_id} runs without its adapters on the device")
        return slots

    def failure(self, sequence: Sequence) -> str | None:
        """Why what a sequence with a claim waits for can't be loaded; None: it can, as yet."""
        return self._claims.failed(sequence.request_id) if sequence.digests else None

    def check_integrity(self, sequences: Mapping[str, Sequence]) -> None:
        """Raises AssertionError where lent to one who may not borrow. sequences: all there are."""
        assert all(s.request.background for s in self._lent.values()), "lent to the foreground"
        assert set(self._lent) <= set(sequences), "lent to one that has ended"

    def _ready(self, sequence: Sequence) -> Mapping[str, int] | None:
        if sequence.request.background and sequence.request_id not in self._lent:
            return None
        return self._claims.ready(sequence.request_id)
