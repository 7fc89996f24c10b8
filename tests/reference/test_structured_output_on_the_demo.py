"""Answers of the demo under ten schemas: valid, and the same with Turbo as without, over HTTP."""

from __future__ import annotations

import pytest

from quickchange_bench.service.structured_bench import StructuredOptions, measure_structured
from quickchange_training.demo import ensure_demo_base


@pytest.mark.slow
def test_every_answer_is_valid_and_the_same_with_turbo() -> None:
    options = StructuredOptions(model=ensure_demo_base(), generations=40, concurrency=())
    result = measure_structured(options, print)
    assert result.invalid == ()
    assert result.different == 0
    assert result.accepted_share > 0
