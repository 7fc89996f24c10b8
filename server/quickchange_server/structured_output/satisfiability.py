"""Schemas that no finite text satisfies: a property is required that is forbidden or needs itself.

The grammar library sees no such cycle, and a text of it would never end. What is found impossible
here is impossible; what is not found may still be, and is left to the library.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from quickchange_server.structured_output.errors import ImpossibleSchemaError
from quickchange_server.structured_output.subschemas import Path, parts, pointed, replaced

Node = tuple[str | int, ...]  # a subschema's path
Holding = list[tuple[Node, dict[str, Any]]]  # subschemas that hold together

_MOST_STEPS = 100_000  # looks at a keyword; a tenth of a second
# Keywords that leave a text of their own accord, each alone or with the others here.
_HARMLESS = frozenset(
    {"type", "properties", "patternProperties", "additionalProperties", "items", "prefixItems"}
    | {"pattern", "format", "minLength", "maxItems", "multipleOf", "$defs", "definitions"}
    | {"minimum", "exclusiveMinimum"}
)
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


@dataclass(frozen=True, slots=True)
class _Fault:
    """The reason why a subschema is impossible, and the subschema that it needs, if it is that."""

    place: Path
    reason: str
    needs: Node | None = None


def pruned(schema: Any) -> Any:
    """The schema with `false` in place of every subschema that no finite text satisfies.

    References must lead somewhere, and the schema be one that `check_keywords` accepts. Raises
    ImpossibleSchemaError if no text satisfies the whole.
    """
    found = _Possible(schema)
    if () not in found.nodes:
        raise ImpossibleSchemaError(*found.fault())
    for node in found.outermost_impossible():
        schema = replaced(schema, list(node), False)
    return schema


class _Possible:
    """The subschemas of a schema that some text satisfies: the least fixed point."""

    def __init__(self, schema: Any) -> None:
        self._steps = 0
        self._schemas: dict[Node, Any] = dict(_all_nodes(schema))
        self._targets: dict[str, Node | None] = {}  # of references
        self._together = {node: self._holding(schema, node) for node in self._schemas}
        self.nodes: set[Node] = set()
        self._lacking: set[Node] = set()  # what the last judgement found impossible so far
        blocked: dict[Node, set[Node]] = defaultdict(set)  # to be judged again once it is possible
        waiting = deque(reversed(self._schemas))  # inner ones first
        while waiting:
            node = waiting.popleft()
            if node in self.nodes:
                continue
            self._lacking = set()
            if self._fault(node) is None:
                self.nodes.add(node)
                waiting.extend(blocked.pop(node, ()))
            for lacking in self._lacking:
                blocked[lacking].add(node)

    def _has(self, node: Node) -> bool:
        if node not in self.nodes:
            self._lacking.add(node)
        return node in self.nodes

    def _step(self, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise ImpossibleSchemaError(
                [], "has too much that must hold together to be checked; use fewer references"
            )

    def outermost_impossible(self) -> Iterator[Node]:
        for node, schema in self._schemas.items():
            if node not in self.nodes and schema is not False:
                outer = (node[:end] for end in range(len(node)))
                if not any(one in self._schemas and one not in self.nodes for one in outer):
                    yield node

    def fault(self) -> tuple[Path, str]:
        """The place and the reason of the innermost fault of the whole."""
        node: Node = ()
        seen = {node}
        while True:
            fault = self._fault(node)
            if fault is None:
                raise RuntimeError(f"{node} is possible")
            if fault.needs is None:
                return fault.place, fault.reason
            if fault.needs in seen:
                return fault.place, (
                    "no text ends that satisfies it: it needs another of its own kind inside, "
                    "without end; leave it out of required, or allow null or an empty list"
                )
            node = fault.needs
            seen.add(node)

    def _holding(self, schema: Any, node: Node) -> list[Node]:
        """The subschemas that hold together at a node: itself, allOf's, and where $ref leads."""
        together: dict[Node, None] = {}
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if one in together or one not in self._schemas:
                continue
            together[one] = None
            self._step()
            inside = self._schemas[one]
            if isinstance(inside, dict):
                waiting += [(*one, "allOf", i) for i in range(len(inside.get("allOf", ())))]
                if (
                    "$ref" in inside
                    and (target := self._target(schema, inside["$ref"])) is not None
                ):
                    waiting.append(target)
        return list(together)

    def _target(self, schema: Any, reference: str) -> Node | None:
        if reference not in self._targets:
            path = pointed(schema, reference)
            self._targets[reference] = None if path is None else tuple(path)
        return self._targets[reference]

    def _fault(self, node: Node) -> _Fault | None:
        """The reason why a node is impossible as far as is known; None if it is possible."""
        holding: Holding = []
        for one in self._together[node]:
            inside = self._schemas[one]
            if inside is False:
                return _Fault(list(one), "false allows no text")
            if isinstance(inside, dict):
                holding.append((one, inside))
        self._step(len(holding))
        if len(holding) <= 1 and all(inside.keys() <= _HARMLESS for _, inside in holding):
            return None
        for one, inside in holding:
            for key in ("anyOf", "oneOf"):
                if key in inside and not any(
                    self._has((*one, key, index)) for index in range(len(inside[key]))
                ):
                    only = (*one, key, 0) if len(inside[key]) == 1 else None
                    return _Fault([*one, key], "no text satisfies any of its branches", only)
        values = _Values(holding)
        if values.given is not None:
            return values.fault()
        faults = [self._fault_of_type(kind, holding) for kind in values.types]
        if None in faults:
            return None
        return faults[0] if faults else _Fault([*node, "type"], "excludes every type")

    def _fault_of_type(self, kind: str, holding: Holding) -> _Fault | None:
        match kind:
            case "number" | "integer":
                return _fault_of_number(holding, whole=kind == "integer")
            case "string":
                return _crossed(holding, "minLength", "maxLength")
            case "array":
                return _crossed(holding, "minItems", "maxItems") or self._fault_of_array(holding)
            case "object":
                return self._fault_of_object(holding)
        return None

    def _fault_of_array(self, holding: Holding) -> _Fault | None:
        least = max((inside.get("minItems", 0) for _, inside in holding), default=0)
        for one, inside in holding:
            tuples = len(inside.get("prefixItems", ()))
            needed: list[Node] = [(*one, "prefixItems", i) for i in range(min(tuples, least))]
            if least > tuples and "items" in inside:
                needed.append((*one, "items"))
            for item in needed:
                if not self._has(item):
                    return self._needing(item, f"minItems asks for {least} items, and")
        return None

    def _fault_of_object(self, holding: Holding) -> _Fault | None:
        names: dict[str, Node] = {}
        for one, inside in holding:
            for name in inside.get("required", ()):
                names.setdefault(name, one)
        most = min((i["maxProperties"] for _, i in holding if "maxProperties" in i), default=None)
        least = max((i.get("minProperties", 0) for _, i in holding), default=0)
        for one, inside in holding:
            if most is not None and most < max(len(names), least) and "maxProperties" in inside:
                return _Fault(
                    [*one, "maxProperties"],
                    f"allows {most} of the {max(len(names), least)} properties that are required",
                )
            for name, asking in names.items():
                for value in _schemas_of(one, inside, name):
                    self._step()
                    if self._has(value):
                        continue
                    if value[-1] == "additionalProperties" and self._schemas[value] is False:
                        return _Fault(
                            [*asking, "required"],
                            f"{name!r} is required, and is no property that the schema allows; "
                            "list it under properties, or take it out of required",
                        )
                    return self._needing(value, f"{name!r} is required, and")
            if least > 0 and not names and not self._allows_any_name(one, inside):
                return _Fault(
                    [*one, "minProperties" if "minProperties" in inside else "properties"],
                    "a property is asked for, and none is allowed",
                )
        return None

    def _allows_any_name(self, one: Node, inside: dict[str, Any]) -> bool:
        open_end = "additionalProperties" not in inside
        listed = ((*one, key, name) for key in ("properties", "patternProperties")
                  for name in inside.get(key, ()))  # fmt: skip
        known = (*listed, (*one, "additionalProperties"))
        return open_end or any(self._has(node) for node in known)

    def _needing(self, node: Node, why: str) -> _Fault:
        if self._schemas[node] is False:
            return _Fault(list(node), f"{why} false allows no text")
        return _Fault(list(node), f"{why} no text satisfies it", node)


class _Values:
    """The types that subschemas leave together, and the values that const and enum give."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self.types = [kind for kind in _TYPES if all(_takes(inside, kind) for _, inside in holding)]
        self.given: list[Any] | None = None
        self._place: Path = []
        for one, inside in holding:
            for key in ("const", "enum"):
                if key in inside and self.given is None:
                    self.given = [inside[key]] if key == "const" else inside[key]
                    self._place = [*one, key]
        self._listed = [  # texts of the values that each const and enum allows
            set(map(_canonical, [inside[key]] if key == "const" else inside[key]))
            for _, inside in holding
            for key in ("const", "enum")
            if key in inside
        ]

    def fault(self) -> _Fault | None:
        if any(self._fits(value) for value in self.given or ()):
            return None
        return _Fault(self._place, "the keywords beside it allow none of its values")

    def _fits(self, value: Any) -> bool:
        written = _canonical(value)
        listed = all(written in texts for texts in self._listed)
        return listed and all(_fits(value, inside) for _, inside in self._holding)


def _all_nodes(schema: Any) -> Iterator[tuple[Node, Any]]:
    waiting: list[tuple[Node, Any]] = [((), schema)]
    while waiting:
        node, inside = waiting.pop()
        yield node, inside
        if isinstance(inside, dict):
            waiting += [((*node, *path), part) for path, part in parts(inside)]


def _takes(inside: dict[str, Any], kind: str) -> bool:
    named = inside.get("type", kind)
    kinds = [named] if isinstance(named, str) else named
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if _exact(value).denominator == 1 else "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _canonical(value: Any) -> str:
    """A text that JSON values have in common exactly if they are equal: 1 is 1.0, not true."""
    if isinstance(value, dict):
        inside = (f"{json.dumps(key)}:{_canonical(value[key])}" for key in sorted(value))
        return "{" + ",".join(inside) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)


def _fits(value: Any, inside: dict[str, Any]) -> bool:
    """False if a value breaks a keyword of the schema itself, whatever its parts say."""
    kind = _kind(value)
    if not _takes(inside, kind):
        return False
    match kind:
        case "integer" | "number":
            at = {"minimum": value, "maximum": value}
            return _fault_of_number([((), inside), ((), at)], whole=False) is None
        case "string":
            size, ends = len(value), ("minLength", "maxLength")
        case "array":
            size, ends = len(value), ("minItems", "maxItems")
        case "object":
            size, ends = len(value), ("minProperties", "maxProperties")
            if not all(name in value for name in inside.get("required", ())):
                return False
        case _:
            return True
    return bool(inside.get(ends[0], 0) <= size <= inside.get(ends[1], size))


def _crossed(holding: Holding, lower: str, upper: str) -> _Fault | None:
    """A fault at the lower bound if it is above the upper one."""
    lows = [(inside[lower], one) for one, inside in holding if lower in inside]
    highs = [inside[upper] for _, inside in holding if upper in inside]
    if lows and highs:
        low, one = max(lows)
        if low > min(highs):
            return _Fault([*one, lower], f"{low} is over {upper}, {min(highs)}")
    return None


def _exact(value: Any) -> Fraction:
    """The number as it is written, not as a binary fraction."""
    return Fraction(Decimal(str(value)))


def _fault_of_number(holding: Holding, *, whole: bool) -> _Fault | None:
    lows = [
        (_exact(inside[key]), key.startswith("ex"), [*one, key])
        for one, inside in holding
        for key in ("minimum", "exclusiveMinimum")
        if key in inside
    ]
    highs = [
        (_exact(inside[key]), not key.startswith("ex"))
        for _, inside in holding
        for key in ("maximum", "exclusiveMaximum")
        if key in inside
    ]
    if not lows or not highs:
        return None
    low, above, place = max(lows)
    high, up_to = min(highs)
    if low > high or (low == high and (above or not up_to)):
        return _Fault(place, "lies above the upper bound: no number is between them")
    steps = [_exact(i["multipleOf"]) for _, i in holding if "multipleOf" in i]
    for step in [*steps, Fraction(1)] if whole else steps:
        first = math.floor(low / step) + 1 if above else math.ceil(low / step)
        last = math.floor(high / step) if up_to else math.ceil(high / step) - 1
        if first > last:
            kind = "integer" if step == 1 else f"multiple of {float(step):g}"
            return _Fault(place, f"no {kind} lies between it and the upper bound")
    return None


def _schemas_of(one: Node, inside: dict[str, Any], name: str) -> list[Node]:
    """The subschemas that a property's value must satisfy, as far as is known."""
    if name in inside.get("properties", {}):
        return [(*one, "properties", name)]
    # A pattern may take long to match, and its dialect is the library's.
    if "additionalProperties" in inside and not inside.get("patternProperties"):
        return [(*one, "additionalProperties")]
    return []
