"""The bytes of a canonical adapter: one safetensors file, named by its SHA-256.

They are written so that they are a pure function of what the adapter computes: the architecture,
the modules, their tensors (dtype included), scales and further parts. `base_name` and `source` only
say where an adapter came from. They are not in the bytes, so the same weights imported from two
paths or by two tools are one version and share every cache. Defaults are not written, so a plain
LoRA stays format 1; anything more makes it format 2, Turbo heads (`turbo_bytes`) format 3, a
classification head (`classifier_part`) format 4 and parts of other kinds (`stored_parts`) format 5,
which older readers refuse instead of dropping a part.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quickchange_store.canonical import classifier_part, stored_parts, turbo_bytes
from quickchange_store.canonical.canonical_adapter import (
    Activation,
    CanonicalAdapter,
    LowRankUpdate,
    Source,
)
from quickchange_store.canonical.classifier_part import ClassifierHead, Floats
from quickchange_store.canonical.tokenizer_part import TokenizerChanges
from quickchange_store.canonical.turbo_bytes import TurboLayout
from quickchange_store.errors import CorruptVersionError, InvalidAdapterError

if TYPE_CHECKING:  # imported where it is needed: digests are useful without torch
    import torch

PLAIN_FORMAT = 1  # A, B, scale and bias alone
FULL_FORMAT = 2
TURBO_FORMAT = 3
CLASSIFIER_FORMAT = 4
PARTS_FORMAT = 5
_FORMATS = (PLAIN_FORMAT, FULL_FORMAT, TURBO_FORMAT, CLASSIFIER_FORMAT, PARTS_FORMAT)
METADATA_KEY = "quickchange"  # one key only: a header's keys have no guaranteed order
DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
# The most that a number of an adapter may be, and by which an update may multiply its input. With
# inputs and a request's weights of 1,000 each the result is below 1e19, whose square (RMSNorm's)
# float32 holds.
LARGEST = 1e12
_OVERFLOW_REMEDY = "train again with a smaller learning rate, or take an earlier checkpoint"
_PIECE = 1 << 18  # bytes hashed at once
_STORED = {**DTYPES, "torch.int32": "I32"}


def write(adapter: CanonicalAdapter, stream: BinaryIO) -> str:
    """Write the adapter's bytes to `stream` and return their SHA-256, in hexadecimal.

    One tensor at a time, so that memory use stays at one tensor's. Raises InvalidAdapterError for
    a tensor of an unsupported dtype and for numbers that are not finite or beyond LARGEST.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(adapter):
        digest.update(chunk)
        stream.write(chunk)
    return digest.hexdigest()


def digest(adapter: CanonicalAdapter) -> str:
    """SHA-256 of the adapter's bytes, in hexadecimal. Raises as `write`."""
    total = hashlib.sha256()
    for chunk in _chunks(adapter):
        total.update(chunk)
    return total.hexdigest()


def load(
    path: Path, *, base_name: str = "", source: dict[str, Any] | None = None
) -> CanonicalAdapter:
    """Read an adapter's file; its tensors are memory-mapped, read from disk when first used.

    The header is checked, the tensors' content is not: compare `file_digest` for that. Raises
    CorruptVersionError for a file that is missing, damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = _parse_metadata(path, file.metadata())
            names = set(file.keys())
            updates = {
                module: LowRankUpdate(
                    a=file.get_tensor(f"{module}.a"),
                    b=file.get_tensor(f"{module}.b"),
                    scale=scale,
                    activation=header.activations.get(module, "identity"),
                    source=header.sources.get(module, "input"),
                    **{
                        part: file.get_tensor(f"{module}.{part}")
                        for part in ("bias", "shift", "gain")
                        if f"{module}.{part}" in names
                    },
                )
                for module, scale in header.scales.items()
            }
            layout = header.turbo
            turbo = None if layout is None else turbo_bytes.assemble(layout, file.get_tensor)
            classifier = _classifier(
                path, header, names, lambda name: file.get_tensor(name).numpy()
            )
            parts = stored_parts.assemble(header.parts, file.get_tensor)
    except (SafetensorError, OSError, InvalidAdapterError) as error:
        raise _corrupt(path, str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"the entry of one of its parts is damaged: {error!r}") from error
    return CanonicalAdapter(
        header.architecture, base_name, updates, source or {}, turbo, classifier, **parts
    )


def load_classifier(path: Path) -> ClassifierHead | None:
    """The classification head in an adapter's file, without torch; None where it has none.

    Raises as `load`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            header = _parse_metadata(path, file.metadata())
            return _classifier(path, header, set(file.keys()), file.get_tensor)
    except (SafetensorError, OSError, InvalidAdapterError) as error:
        raise _corrupt(path, str(error)) from error


def load_tokenizer(path: Path) -> TokenizerChanges | None:
    """What an adapter's file says of its tokenizer, without torch; None where it is the base's.

    Raises as `load`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            entry = _parse_metadata(path, file.metadata()).parts.get("tokenizer")
        return None if entry is None else TokenizerChanges.decode(entry)
    except (SafetensorError, OSError, InvalidAdapterError) as error:
        raise _corrupt(path, str(error)) from error
    except (KeyError, TypeError) as error:
        raise _corrupt(path, f"the tokenizer's entry is damaged: {error!r}") from error


def _classifier(
    path: Path, header: _Header, names: set[str], tensor: Callable[[str], Floats]
) -> ClassifierHead | None:
    if header.classifier is None:
        return None
    try:
        return classifier_part.assemble(header.classifier, names, tensor)
    except (KeyError, TypeError) as error:
        raise _corrupt(path, f"the classification head's entry is damaged: {error!r}") from error


def file_digest(path: Path, pause: Callable[[], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal. Raises CorruptVersionError where it can't be read.

    pause: called between pieces of the work, of about a quarter of a millisecond each.
    """
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                total.update(piece)
                if pause is not None:
                    pause()
    except OSError as error:
        raise _corrupt(path, str(error)) from error
    return total.hexdigest()


def _chunks(adapter: CanonicalAdapter) -> Iterator[bytes]:
    """The file in pieces: length and header, then the tensors in the header's order."""
    import torch

    layout, heads = (None, {}) if adapter.turbo is None else turbo_bytes.parts(adapter.turbo)
    if adapter.classifier is not None:
        heads |= {n: torch.from_numpy(t) for n, t in adapter.classifier.tensors.items()}
    for part in adapter.parts.values():
        heads |= part.tensors
    tensors = _ordered(adapter, heads)
    _check_numbers(adapter, tensors)
    yield _header(adapter, layout, tensors)
    for _, tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes()


def _check_numbers(adapter: CanonicalAdapter, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Raise InvalidAdapterError for numbers that no request could be served with."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not (largest := _largest(tensor)) <= LARGEST:
            raise InvalidAdapterError(
                f"its largest number is {largest:g}, where {LARGEST:g} is the most that can be "
                "served",
                key=name,
                remedy=_OVERFLOW_REMEDY,
            )
    for module, update in adapter.updates.items():
        if not abs(update.scale) <= LARGEST:
            raise InvalidAdapterError(
                f"the scale of its update (lora_alpha / r in a LoRA) is {update.scale:g}, where "
                f"{LARGEST:g} is the most that can be served",
                key=module,
                remedy="give a smaller lora_alpha",
            )
        gain = abs(update.scale) * _row_sum(update.a) * _row_sum(update.b)
        if not gain <= LARGEST:
            raise InvalidAdapterError(
                f"scale · B · A may multiply its input by {gain:g}, where {LARGEST:g} is the most "
                "that can be served",
                key=module,
                remedy=_OVERFLOW_REMEDY,
            )


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _row_sum(matrix: torch.Tensor) -> float:
    """The largest sum of a row's absolute values, by which a product with it grows at most."""
    return float(matrix.float().abs().sum(1).max()) if matrix.numel() else 0.0


def _ordered(
    adapter: CanonicalAdapter, heads: Mapping[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor), widest dtype first so that every tensor is aligned, then by name."""
    updates = {
        f"{module}.{part}": tensor
        for module, update in adapter.updates.items()
        for part, tensor in update.tensors.items()
    }
    clash = updates.keys() & heads.keys()
    if clash:
        raise InvalidAdapterError(
            "a module and the adapter's heads have a tensor of this name",
            key=min(clash),
            remedy="rename the module: no path of the base model may begin with turbo., or be "
            "classifier or the name of another part",
        )
    named = {**updates, **heads}
    for name, tensor in named.items():
        known = DTYPES if name != turbo_bytes.VOCABULARY else _STORED
        if str(tensor.dtype) not in known:
            raise InvalidAdapterError(
                f"dtype {tensor.dtype} can't be stored",
                key=name,
                remedy="convert it to float32, bfloat16 or float16",
            )
    return sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(
    adapter: CanonicalAdapter,
    layout: TurboLayout | None,
    tensors: list[tuple[str, torch.Tensor]],
) -> bytes:
    """The safetensors header. Written here because the library promises no stable bytes."""
    updates = adapter.updates
    plain = all(update.plain for update in updates.values())
    content: dict[str, Any] = {
        "architecture": adapter.architecture,
        "format": PLAIN_FORMAT if plain else FULL_FORMAT,
        "scales": {module: float(update.scale) for module, update in updates.items()},
    }
    if not plain:
        content["activations"] = {
            module: u.activation for module, u in updates.items() if u.activation != "identity"
        }
        content["sources"] = {
            module: update.source for module, update in updates.items() if update.source != "input"
        }
    if layout is not None:
        content["format"] = TURBO_FORMAT
        content["turbo"] = layout.encode()
    if adapter.classifier is not None:
        content["format"] = CLASSIFIER_FORMAT
        content["classifier"] = adapter.classifier.encode()
    if adapter.parts or (layout is not None and layout.tenant is not None):
        content["format"] = PARTS_FORMAT  # readers that don't know of tenants refuse it
        content["parts"] = {name: part.encode() for name, part in adapter.parts.items()}
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: _json(content)}}
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _STORED[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = _json(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class _Header:
    architecture: str
    scales: dict[str, float]
    activations: dict[str, Activation]
    sources: dict[str, Source]
    turbo: TurboLayout | None
    classifier: Mapping[str, Any] | None  # its entry, not yet checked
    parts: Mapping[str, Any]  # entries by name, not yet checked


def _parse_metadata(path: Path, metadata: dict[str, str] | None) -> _Header:
    """The parsed header; LowRankUpdate checks its activations and sources."""
    try:
        header = json.loads((metadata or {})[METADATA_KEY])
        format_ = header["format"]
        if format_ not in _FORMATS:
            raise _corrupt(path, f"format {format_}, known are {list(_FORMATS)}")
        # what a later format brought is no part of a file of an earlier one
        has_heads = format_ == TURBO_FORMAT or (format_ > TURBO_FORMAT and "turbo" in header)
        classifies = format_ == CLASSIFIER_FORMAT or (
            format_ > CLASSIFIER_FORMAT and "classifier" in header
        )
        return _Header(
            architecture=str(header["architecture"]),
            scales={str(module): float(scale) for module, scale in header["scales"].items()},
            activations=dict(header.get("activations", {})),
            sources=dict(header.get("sources", {})),
            turbo=TurboLayout.decode(header["turbo"]) if has_heads else None,
            classifier=dict(header["classifier"]) if classifies else None,
            parts=dict(header["parts"]) if format_ == PARTS_FORMAT else {},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _corrupt(path, f"the header lacks {METADATA_KEY!r}: {error!r}") from error


def _corrupt(path: Path, problem: str) -> CorruptVersionError:
    return CorruptVersionError(
        problem,
        file=str(path),
        remedy="add the adapter again: the same content repairs the version",
    )
