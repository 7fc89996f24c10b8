"""Property tests draw a few examples in `make test`, and many in `make slow`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import settings

THOROUGH = os.environ.get("QUICKCHANGE_THOROUGH") == "1"
Test = TypeVar("Test", bound=Callable[..., Any])


def drawn(few: int, many: int, **options: Any) -> Callable[[Test], Test]:
    """Decorate a property test: `few` examples each, or `many` where it runs as a slow one."""

    def decorate(test: Test) -> Test:
        chosen = settings(max_examples=many if THOROUGH else few, deadline=None, **options)
        marked: Test = pytest.mark.thorough(chosen(test))
        return marked

    return decorate
