"""The documents' Python is run as it stands, on a tiny model in the places that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from llm_models import make_llm_models

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "python.md")


@pytest.fixture
def named_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`path/to/model` and `path/to/peft-folder`, from where the code is run."""
    models = make_llm_models(tmp_path / "made")
    places = tmp_path / "path" / "to"
    places.mkdir(parents=True)
    (places / "model").symlink_to(models.path)
    (places / "peft-folder").symlink_to(models.adapters["sql"])
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("named_places")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_python_blocks_run(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:  # in one namespace, as in a notebook
        exec(compile(block, str(document), "exec"), names)
    assert capsys.readouterr().out
