"""Chat templates as files: the forms of many models, written anew with their marks."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "chat_templates"


def chat_template(name: str) -> str:
    return (_FOLDER / f"{name}.jinja").read_text()
