"""docs/settings.md has every setting, with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quickchange_server.config import Settings

DOCS = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
ROWS = dict(re.findall(r"^\| `([a-z_]+)` \| (.+?) \|", DOCS, re.MULTILINE))


def test_the_settings_are_the_documented_ones() -> None:
    assert set(ROWS) == set(Settings.model_fields)


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_the_default_is_the_documented_one(name: str) -> None:
    default = Settings.model_fields[name].default
    if Settings.model_fields[name].is_required() or default is None:
        assert not ROWS[name].startswith("`"), "what happens without it is said in words"
    else:
        assert ROWS[name] == f"`{default}`"
