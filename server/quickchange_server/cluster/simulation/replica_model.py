"""Model of one engine replica: what its steps and loads cost, and what it has room for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quickchange_server.errors import SettingError
from quickchange_server.protocol import Prices, Ready
from quickchange_server.spec_decode.cost_model import StepCost

_LINK = 20e9  # bytes/s from host to device: PCIe 4.0 x16 in practice
_STORE = 1e9  # bytes/s from the store to the host: a local disk, or a fast network
_STORE_SECONDS = 0.02  # a load's time besides its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaModel:
    """Prices and budgets of a replica. All adapters are of one size."""

    prices: Prices  # (rows, seconds) of steps without adapters, of two row counts at least
    adapter_bytes: int  # of one adapter
    adapter_device_bytes: int  # budgets of the tiers
    adapter_host_bytes: int
    kv_tokens: int  # room in the KV cache
    max_sequences: int = 64  # of a step
    max_batch_tokens: int = 192  # rows of a step
    adapter_seconds: float = 0.0  # what each distinct adapter adds to a step
    context_seconds: float = 0.0  # what each token of context of a decoding sequence adds
    store_seconds: float | None = None  # to load an adapter from the store; None: by its bytes
    copy_seconds: float | None = None  # from the host to the device; None: by its bytes

    @property
    def device_room(self) -> int:
        """Adapters that the device tier holds."""
        return max(self.adapter_device_bytes // self.adapter_bytes, 1)

    @property
    def host_room(self) -> int:
        return max(self.adapter_host_bytes // self.adapter_bytes, 1)

    @property
    def load_seconds(self) -> tuple[float, float]:
        """Seconds from the store to the host, and from there to the device."""
        store, copy = self.store_seconds, self.copy_seconds
        return (
            _STORE_SECONDS + self.adapter_bytes / _STORE if store is None else store,
            self.adapter_bytes / _LINK if copy is None else copy,
        )

    def price_table(self) -> list[float]:
        """Seconds of steps of 0, 1, … rows, as the engine itself reads its prices."""
        return [float(each) for each in StepCost(self.prices).table(self.max_batch_tokens)]


def of_ready(ready: Ready, *, adapter_bytes: int, **more: Any) -> ReplicaModel:
    """The model of a replica that told this at its start. more: other fields."""
    return ReplicaModel(
        prices=ready.prices,
        adapter_bytes=adapter_bytes,
        adapter_device_bytes=ready.adapter_device_bytes,
        adapter_host_bytes=ready.adapter_host_bytes,
        kv_tokens=ready.kv_blocks * ready.block_size,
        **more,
    )


def read_model(path: Path) -> ReplicaModel:
    """The model in a JSON file: an object with the fields of `ReplicaModel`, or of `Ready` with
    `adapter_bytes`. Raises SettingError that names the field."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _wrong(path, f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _wrong(path, "is not a JSON object")
    values = dict(found)
    if "kv_blocks" in values:
        blocks = _checked(path, values, "kv_blocks"), _checked(path, values, "block_size")
        values.setdefault("kv_tokens", blocks[0] * blocks[1])
        for other in {field.name for field in fields(Ready)} - {"prices"}:
            if not other.startswith("adapter_") or other == "adapter_dtype":
                values.pop(other, None)
    known = [field.name for field in fields(ReplicaModel)]
    for name in values:
        if name not in known:
            raise _wrong(path, f"{name}: is none of {', '.join(known)}")
    for name in known[:5]:
        if name not in values:
            raise _wrong(path, f"{name}: is missing")
    prices = _prices(path, values.pop("prices"))
    return ReplicaModel(prices=prices, **{name: _checked(path, values, name) for name in values})


def _checked(path: Path, values: Mapping[str, Any], name: str) -> Any:
    value = values.get(name)
    if value is None and name in ("store_seconds", "copy_seconds"):
        return None
    seconds = name.endswith("_seconds")
    kind = int | float if seconds else int
    if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
        what = "a number" if seconds else "a whole number"
        raise _wrong(path, f"{name}: {value!r} is not {what}; correct it")
    if value < 0 or (value == 0 and not seconds):
        raise _wrong(path, f"{name}: {value!r} is too small; raise it")
    return value


def _prices(path: Path, found: Any) -> Prices:
    try:
        prices = tuple((int(rows), float(seconds)) for rows, seconds in found)
        StepCost(prices)
    except (TypeError, ValueError):
        raise _wrong(
            path, "prices: give [rows, seconds] of two row counts at least, all above 0"
        ) from None
    return prices


def _wrong(path: Path, what: str) -> SettingError:
    return SettingError(f"--measured {path}: {what}", param="measured")
