"""Makes the support modules importable: those here, in processes of their own too, and the live
server's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "server")]
