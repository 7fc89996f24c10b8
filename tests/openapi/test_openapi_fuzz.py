"""Every operation of the OpenAPI document under schemathesis: valid and invalid requests.

No answer is a 5xx, and each has a status, a content type and a body that the document declares.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_support import Fuzzer, document, filled_server, schema_of
from schemathesis import Case

OPEN, KEYED = document(), document(api_keys=True)
EXAMPLES = 6  # random ones of an operation, beside those that its schema's bounds give


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with filled_server(tmp_path_factory.mktemp("open"), keyed=False) as live:
        yield Fuzzer(live, OPEN)


@schema_of(OPEN, examples=EXAMPLES).parametrize()
def test_answers_are_as_documented(case: Case, open_server: Fuzzer) -> None:
    open_server.check(case)
