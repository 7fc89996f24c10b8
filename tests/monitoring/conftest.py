"""Makes the server tests' helpers importable by name, in spawned engine processes too."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "server"):
    sys.path.insert(0, str(folder))
