"""What the store knows of a version without reading its tensors: the file `info.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.errors import CorruptVersionError, InvalidAdapterError

if TYPE_CHECKING:
    from quickchange_store.canonical import CanonicalAdapter


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A version in figures. `base_name` and `source` are as given when it was first added."""

    digest: str
    architecture: str
    base_name: str
    ranks: tuple[int, ...]  # the distinct ranks, ascending
    targets: tuple[str, ...]  # the last parts of the module paths, e.g. "q_proj"
    modules: int
    parameters: int  # stored values
    dtypes: tuple[str, ...]  # e.g. "bfloat16"
    size: int  # bytes of the version's file
    created: float  # seconds since 1970
    source: Mapping[str, Any]

    @property
    def max_rank(self) -> int:
        return max(self.ranks, default=0)

    def encode(self) -> bytes:
        """As JSON. Raises InvalidAdapterError where `source` is not plain data."""
        try:
            return json.dumps(asdict(self), sort_keys=True, indent=1, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InvalidAdapterError(
                f"it can't be written as JSON ({error})",
                key="source",
                remedy="describe the adapter's source with strings, finite numbers and lists",
            ) from error

    @classmethod
    def read(cls, path: Path) -> AdapterInfo:
        """From `info.json`. Raises CorruptVersionError."""
        try:
            tree = json.loads(path.read_bytes())
            for name in ("ranks", "targets", "dtypes"):
                tree[name] = tuple(tree[name])
            return cls(**tree)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CorruptVersionError(
                f"it can't be read ({error!r})",
                file=str(path),
                remedy="add the adapter again: the same content repairs the version",
            ) from error


def describe(adapter: CanonicalAdapter, digest: str, *, size: int, created: float) -> AdapterInfo:
    """The figures of `adapter`, whose file has `size` bytes."""
    updates = adapter.updates
    return AdapterInfo(
        digest=digest,
        architecture=adapter.architecture,
        base_name=adapter.base_name,
        ranks=tuple(sorted({update.rank for update in updates.values()})),
        targets=tuple(sorted({path.rpartition(".")[2] for path in updates})),
        modules=len(updates),
        parameters=adapter.parameters,
        dtypes=tuple(sorted({str(u.a.dtype).removeprefix("torch.") for u in updates.values()})),
        size=size,
        created=created,
        source=dict(adapter.source),
    )
