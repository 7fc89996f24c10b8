"""docs/settings.md and docs/cluster.md have every setting, with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from quickchange_server.cluster.cluster_settings import ClusterSettings
from quickchange_server.config import Settings

DOCS = Path(__file__).parents[2] / "docs"
FILES: dict[type[BaseSettings], str] = {Settings: "settings.md", ClusterSettings: "cluster.md"}


def documented(kind: type[BaseSettings]) -> dict[str, str]:
    """What the tables of settings say of each default."""
    text = (DOCS / FILES[kind]).read_text()
    tables = re.findall(r"^\| setting \| default \|(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r"^\| `([a-z_]+)` \| (.+?) \|", "\n".join(tables), re.MULTILINE))


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
def test_the_settings_are_the_documented_ones(kind: type[BaseSettings]) -> None:
    assert set(documented(kind)) == set(kind.model_fields)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in FILES for name in sorted(kind.model_fields)],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_the_default_is_the_documented_one(kind: type[BaseSettings], name: str) -> None:
    field = kind.model_fields[name]
    said = documented(kind)[name]
    if field.is_required() or field.default is None:
        assert not re.fullmatch(r"`[^`]*`", said), "what happens without it is said in words"
    else:
        assert said == f"`{field.default}`"
