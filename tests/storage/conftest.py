"""Makes the support modules beside the tests importable, in processes of their own too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
