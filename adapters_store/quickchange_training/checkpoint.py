"""Checkpoints of a training run: one file, replaced whole, read only by the same run.

The file holds a fingerprint of recipe and data, which decides what the same run is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_training.errors import OutputError

_FILE = "checkpoint.pt"


def fingerprint(*parts: object) -> str:
    """Short hash of parts that are JSON or convert to str; equal parts have equal hashes."""
    encoded = json.dumps(parts, sort_keys=True, default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]


@dataclass(frozen=True)
class Checkpoints:
    """Folder, interval and fingerprint of one run's checkpoints."""

    folder: Path
    run: str  # fingerprint
    every: int  # optimizer steps

    def due(self, step: int) -> bool:
        """True if a checkpoint is due after `step` steps."""
        return step % self.every == 0

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; a crash leaves the old one or the new one."""
        import torch

        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"{_FILE}.partial"
        with scratch.open("wb") as file:
            torch.save({"run": self.run, "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.folder / _FILE)

    def load(self) -> dict[str, Any] | None:
        """The state last saved, None where there is none.

        Raises OutputError where it is another run's.
        """
        import torch

        path = self.folder / _FILE
        if not path.exists():
            return None
        found = torch.load(path, weights_only=True)
        if found["run"] != self.run:
            raise OutputError(
                f"{path} is a checkpoint of another recipe or other data; remove the folder to "
                "start afresh"
            )
        state: dict[str, Any] = found["state"]
        return state
