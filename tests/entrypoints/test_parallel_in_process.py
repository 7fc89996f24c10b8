"""An engine in the caller's own process has no ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from quickchange_server.config import Settings
from quickchange_server.entrypoints.in_process_engine import InProcessEngine
from quickchange_server.errors import SettingError


def test_an_engine_in_this_process_refuses_ranks(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"tensor_parallel: .* use 1 here") as refusal:
        InProcessEngine(Settings(model="any", store=tmp_path, tensor_parallel=2))
    assert refusal.value.param == "tensor_parallel"
