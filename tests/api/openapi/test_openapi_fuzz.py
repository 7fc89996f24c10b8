"""Every operation of the OpenAPI document under schemathesis: valid and invalid requests.

No answer is a 5xx, and each has a status, a content type and a body that the document declares.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz_support import Fuzzer, document, filled_server, schema_of
from schemathesis import Case

OPEN, KEYED = document(), document(api_keys=True)
EXAMPLES = 3  # random ones of an operation, beside those that its schema's bounds give
MANY = 60


def told(fuzzer: Fuzzer) -> Iterator[Fuzzer]:
    """The fuzzer; at the end its counts, to be seen with `pytest -s`."""
    yield fuzzer
    print(f"\n{fuzzer.table()}")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with filled_server(tmp_path_factory.mktemp("open"), keyed=False) as live:
        yield from told(Fuzzer(live))


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with filled_server(tmp_path_factory.mktemp("keyed"), keyed=True) as live:
        yield from told(Fuzzer(live))


@schema_of(KEYED, examples=EXAMPLES).parametrize()
def test_answers_are_as_documented_with_api_keys(case: Case, keyed_server: Fuzzer) -> None:
    keyed_server.check(case)


@pytest.mark.slow
@schema_of(OPEN, examples=MANY).parametrize()
def test_answers_are_as_documented_without_api_keys(case: Case, open_server: Fuzzer) -> None:
    open_server.check(case)


@pytest.mark.slow
@schema_of(KEYED, examples=MANY).parametrize()
def test_answers_are_as_documented_with_api_keys_at_length(
    case: Case, keyed_server: Fuzzer
) -> None:
    keyed_server.check(case)
