"""Process that compiles clients' constraints, so that one which takes too long can be killed.

Each line of JSON on standard input gets one on standard output. The first line holds the
tokenizer, every other line a constraint.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.errors import ConstraintError, ImpossibleSchemaError
from quickchange_server.structured_output.fault_location import find_fault
from quickchange_server.structured_output.grammar import Tokens, compiled, read_tokenizer

_MEMORY = 4 << 30  # bytes of address space
_LONGEST = 2_000  # characters of an error


def main() -> None:
    """Answer lines until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    begin = json.loads(sys.stdin.readline())
    try:
        tokens = read_tokenizer(begin["tokenizer"], begin["vocabulary"], begin["ends"])
    except ConstraintError as error:
        _say({"error": str(error)})
        return
    _say({"error": None})
    for line in sys.stdin:
        _say(_judged(tokens, Constraint(**json.loads(line))))


def _judged(tokens: Tokens, constraint: Constraint) -> dict[str, Any]:
    path: list[str | int] = []
    try:
        compiled(tokens, constraint)
    except ImpossibleSchemaError as impossible:
        return {"error": str(impossible)[:_LONGEST], "path": impossible.path}
    except ConstraintError as found:
        error = str(found)
    else:
        return {"error": None}
    if constraint.kind == "json_schema":

        def fails(schema: object) -> str | None:
            return _error(tokens, Constraint("json_schema", json.dumps(schema)))

        path, error = find_fault(json.loads(constraint.source), error, fails)
    return {"error": error[:_LONGEST], "path": path}


def _error(tokens: Tokens, constraint: Constraint) -> str | None:
    try:
        compiled(tokens, constraint)
    except ConstraintError as error:
        return str(error)
    return None


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
