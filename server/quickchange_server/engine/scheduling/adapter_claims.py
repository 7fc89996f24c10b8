"""Claims of the engine's sequences on adapters that must be on the device.

A foreground sequence claims its adapters on arrival and holds them until it ends. A background
sequence is lent its adapters and gives them back when a foreground sequence waits. A sequence
without adapters is always ready. Knows nothing of rows or KV blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from quickchange_server.adapters.prompts.held_prompt import HeldPrompt
from quickchange_server.engine.scheduling.sequence import Sequence

_NONE: Mapping[str, int] = {}


class Claims(Protocol):
    """The part of adapter residency that holds a request's adapters on the device."""

    def claim(self, key: str, digests: list[str]) -> None: ...
    def ready(self, key: str) -> Mapping[str, int] | None: ...
    def failed(self, key: str) -> str | None: ...
    def prompt(self, digest: str) -> HeldPrompt | None: ...
    def release(self, key: str) -> None: ...


class Holdings:
    """The claims of all sequences, held or lent."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._lent: dict[str, Sequence] = {}
        self.changed = False  # True if something was lent or given back; the owner clears it

    @property
    def lent(self) -> list[Sequence]:
        """Background sequences with a claim."""
        return list(self._lent.values())

    def claim(self, sequence: Sequence) -> None:
        """Claim the adapters of a foreground sequence."""
        if sequence.digests:
            self._claims.claim(sequence.request_id, sequence.digests)

    def lend(self, sequences: Seq[Sequence]) -> None:
        """Claim the adapters of background sequences, as a loan."""
        for sequence in sequences:
            if sequence.request_id not in self._lent and sequence.digests:
                self._claims.claim(sequence.request_id, sequence.digests)
                self._lent[sequence.request_id] = sequence
                self.changed = True

    def take_back(self, sequence: Sequence) -> None:
        """Release the adapters lent to a sequence, which can't run without them."""
        self._claims.release(sequence.request_id)
        del self._lent[sequence.request_id]
        self.changed = True

    def release(self, sequence: Sequence) -> None:
        """Release the adapters of a sequence that has ended."""
        lent = self._lent.pop(sequence.request_id, None)
        if sequence.digests and (lent is not None or not sequence.request.background):
            self._claims.release(sequence.request_id)

    def is_ready(self, sequence: Sequence) -> bool:
        """True if all of the sequence's adapters are on the device."""
        return not sequence.digests or self._ready(sequence) is not None

    def slots(self, sequence: Sequence) -> Mapping[str, int]:
        """Device slots of a running sequence's adapters, by digest.

        Raises RuntimeError if one is not on the device.
        """
        if not sequence.digests:
            return _NONE
        slots = self._ready(sequence)
        if slots is None:
            raise RuntimeError(f"{sequence.request_id} runs without its adapters on the device")
        return slots

    def take_prompt(self, sequence: Sequence) -> str | None:
        """Give a ready sequence its virtual tokens; an error if it counts on others."""
        for component in sequence.request.adapters:
            prompt = self._claims.prompt(component.digest)
            found, counted = 0 if prompt is None else prompt.tokens, component.virtual_tokens
            if found != counted:
                return (
                    f"adapters: {component.digest[:12]} has {found} virtual tokens, and the "
                    f"request was made for {counted}; send it again"
                )
            sequence.prompt = prompt or sequence.prompt
        return None

    def failure(self, sequence: Sequence) -> str | None:
        """The error that keeps a claimed adapter from loading; None if there is none so far."""
        return self._claims.failed(sequence.request_id) if sequence.digests else None

    def check_integrity(self, sequences: Mapping[str, Sequence]) -> None:
        """Raises AssertionError if a foreground or ended sequence has a loan.

        sequences: all in the engine, by request id.
        """
        assert all(s.request.background for s in self._lent.values()), "lent to the foreground"
        assert set(self._lent) <= set(sequences), "lent to one that has ended"

    def _ready(self, sequence: Sequence) -> Mapping[str, int] | None:
        if sequence.request.background and sequence.request_id not in self._lent:
            return None
        return self._claims.ready(sequence.request_id)
