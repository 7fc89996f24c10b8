"""Widths of the loads on lines marked `# stream`.

A statement is marked where one of its lines ends in the comment. Triton's own IR says which marked
statements load anything in a configuration (others stand in branches that it leaves out); the
assembly's line table says which load instructions came of them, also where they were inlined or
pipelined into copies to shared memory.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quickchange_kernels.gpu_targets import Target

MARK = "# stream"
WIDE = 16  # bytes


@dataclass(frozen=True)
class Statement:
    """A marked statement of a source file."""

    path: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.first}"


@functools.cache
def marked_statements(path: str) -> tuple[Statement, ...]:
    """The statements of a file that the mark is on. Raises ValueError for a mark beside none."""
    source = Path(path).read_text()
    simple = [
        (node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and not hasattr(node, "body")
    ]
    found: dict[Statement, None] = {}  # each once, in order
    for line in _marked_lines(source):
        spans = [span for span in simple if span[0] <= line <= span[1]]
        if not spans:
            raise ValueError(f"{path}:{line}: '{MARK}' must end a line of a statement that loads")
        found[Statement(path, *min(spans, key=lambda span: span[1] - span[0]))] = None
    return tuple(found)


def _marked_lines(source: str) -> Iterator[int]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.string.endswith(MARK):
            yield token.start[0]


def loading_statements(ttir: str, folder: Path) -> list[Statement]:
    """The marked statements that load something in Triton's IR of one configuration.

    folder: that of the kernel's source. Only file names are compared: Triton's cache may return
    what was compiled from the same source in another place.
    """
    lines = {(Path(path).name, line) for path, line in _load_lines(ttir)}
    return [
        statement
        for name in sorted({name for name, _ in lines})
        if (folder / name).exists()
        for statement in marked_statements(str(folder / name))
        if any((name, line) in lines for line in range(statement.first, statement.last + 1))
    ]


def _load_lines(ttir: str) -> Iterator[tuple[str, int]]:
    named = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", ttir, re.MULTILINE))
    for where in re.findall(r"tt\.(?:descriptor_)?(?:load|gather) .*loc\((.*)\)$", ttir, re.M):
        place = _innermost(where, named)
        if place is not None:
            yield place


def _innermost(where: str, named: dict[str, str]) -> tuple[str, int] | None:
    """The file and line of a location, of the callee where a call was inlined."""
    if direct := re.match(r'"([^"]+)":(\d+):\d+', where):
        return direct[1], int(direct[2])
    # "name"(#loc3), callsite(#loc3 at #loc7), or #loc3: what matters is named first
    inner = re.search(r"#loc\w*", where)
    return _innermost(named[inner[0]], named) if inner else None


def load_widths(assembly: str, target: Target) -> dict[tuple[str, int], list[int]]:
    """Bytes that a thread loads by each global load, by file name and line."""
    read = _nvidia_width if target.backend == "cuda" else _amd_width
    files: dict[str, str] = {}
    at: tuple[str, int] = ("", 0)
    widths: dict[tuple[str, int], list[int]] = defaultdict(list)
    for line in assembly.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            at = (files.get(place[1], place[1]), int(place[2]))
        elif file := re.match(r'\s*\.file\s+(\d+)\s+"([^"]+)"(?:\s+"([^"]+)")?', line):
            files[file[1]] = Path(file[3] or file[2]).name
        elif width := read(line):
            widths[at].append(width)
    # PTX declares its files after the code
    return {(files.get(file, file), line): found for (file, line), found in widths.items()}


def _nvidia_width(line: str) -> int:
    if "cp.async.bulk" in line and ".global" in line:
        return WIDE  # a bulk copy moves 16 bytes or more
    if copied := re.search(
        r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*,\s*(0x[0-9a-f]+|\d+)", line
    ):
        return int(copied[1], 0)
    loaded = re.search(r"\bld\.global(?:\.[a-z_]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\s", line)
    return int(loaded[1] or 1) * int(loaded[2]) // 8 if loaded else 0


_AMD_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8}
_AMD_WIDTHS |= {"b96": 12, "b128": 16}


def _amd_width(line: str) -> int:
    loaded = re.search(r"\b(?:global|buffer|flat)_load_(?:lds_)?(\w+)", line)
    if loaded is None:
        return 0
    if loaded[1] in _AMD_WIDTHS:
        return _AMD_WIDTHS[loaded[1]]
    return 1 if "8" in loaded[1] or "byte" in loaded[1] else 2


def widths_of(statement: Statement, widths: dict[tuple[str, int], list[int]]) -> list[int]:
    """Widths of the loads that a marked statement became."""
    name = Path(statement.path).name
    lines = range(statement.first, statement.last + 1)
    return [width for line in lines for width in widths.get((name, line), [])]
