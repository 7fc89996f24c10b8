"""What a test does where a program that it needs is not installed."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

REQUIRED = "QUICKCHANGE_REQUIRE_SERVICES"


def not_installed(what: str) -> NoReturn:
    """Skip the test with the reason; fail it where the environment says that all must be there."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{what}; {REQUIRED}=1 says that it must be", pytrace=False)
    pytest.skip(what)
