"""Reads the PTX that Triton writes: one kernel's instructions, labels, registers and parameters.

Follows NVIDIA's PTX ISA, as far as Triton uses it for sm_80.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.global.b32 %r1, [%rd2 + 4];` in its parts."""

    predicate: str  # "p1"; empty: always runs
    negated: bool
    opcode: tuple[str, ...]  # ("ld", "global", "b32")
    operands: tuple[str, ...]  # ("%r1", "[%rd2 + 4]")
    text: str

    @property
    def type(self) -> str:
        """The last part of the opcode, which names what it computes with."""
        return self.opcode[-1]


@dataclass(frozen=True)
class Program:
    """One kernel."""

    name: str
    parameters: tuple[str, ...]  # in order
    threads: int  # of a block
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]  # the instruction that follows
    widths: Mapping[str, int]  # bits of a register, by the letters of its name; 1: predicate


def parse(ptx: str) -> Program:
    """The kernel of a PTX file that has one."""
    source = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{", source, re.S)
    if entry is None:
        raise ValueError("no .entry in the PTX: is it a whole file?")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    if threads is None:
        raise ValueError(f"{entry[1]}: no .reqntid, so the size of a block is unknown")
    body = source[entry.end() :]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(body):
        while label := re.match(r"(\$\w+)\s*:", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :].strip()
        if statement and not _is_directive(statement):
            instructions.append(_instruction(statement))
    return Program(
        entry[1],
        tuple(parameter.split()[-1] for parameter in split_operands(entry[2])),
        int(threads[1]),
        tuple(instructions),
        labels,
        dict(_register_widths(body)),
    )


def split_operands(text: str) -> tuple[str, ...]:
    """Cut at commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    rest = text[start:].strip()
    return (*parts, rest) if rest else tuple(parts)


def registers_of(operand: str) -> list[str]:
    """The registers of a vector operand `{%r1, %r2}`, or the operand itself."""
    if not operand.startswith("{"):
        return [operand]
    return [part.strip() for part in operand[1:-1].split(",")]


def _statements(body: str) -> Iterator[str]:
    joined = re.sub(r",\s*\n", ", ", body)  # operands over several lines
    for line in re.split(r"[;\n]", joined):
        statement = line.strip()
        if statement.startswith("{"):  # opens a scope of inline assembly
            statement = statement[1:].strip()
        if statement.count("}") > statement.count("{"):  # closes one
            statement = statement.rstrip("}").strip()
        if statement:
            yield statement


def _is_directive(statement: str) -> bool:
    return statement[0] in "." or statement[0].isdigit()


def _instruction(statement: str) -> Instruction:
    predicate, negated = "", False
    text = statement
    if statement.startswith("@"):
        guard, statement = statement.split(None, 1)
        predicate, negated = guard.lstrip("@!%"), "!" in guard
    opcode, *operands = statement.split(None, 1)
    return Instruction(
        predicate,
        negated,
        tuple(opcode.split(".")),
        split_operands(operands[0]) if operands else (),
        text,
    )


def _register_widths(body: str) -> Iterator[tuple[str, int]]:
    for kind, letters in re.findall(r"\.reg\s+\.(\w+)\s+%(\w+)<\d+>", body):
        yield letters, 1 if kind == "pred" else int(kind[1:])
