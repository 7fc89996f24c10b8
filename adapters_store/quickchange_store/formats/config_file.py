"""`adapter_config.json`: reading it, and the checks that the format readers share.

A field is honoured, harmless or refused; an unknown one is refused where it is set, as it might
change the output. Knows nothing of tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError

CONFIG_FILE = "adapter_config.json"
BASE_NAME = "base_model_name_or_path"
MAX_CONFIG_BYTES = 4 * 1024**2


def read_config(directory: Path, file: str = CONFIG_FILE) -> dict[str, Any]:
    """The configuration as a dictionary. Raises InvalidAdapterError."""
    path = directory / file
    if not path.is_file():
        raise InvalidAdapterError(
            "the file is missing",
            file=file,
            remedy="give the whole folder, as PEFT's save_pretrained, AdapterHub's save_adapter or "
            "the training of Turbo heads wrote it",
        )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidAdapterError(
            f"not a JSON configuration ({error})", file=file, remedy="save the adapter again"
        ) from error
    return config


def refuse_fields(
    config: Mapping[str, Any],
    *,
    known: Collection[str],
    refused: Collection[str],
    remedies: Mapping[str, str],
    prefix: str = "",
) -> None:
    """Refuse, by name, every field that is set and that is not among the `known` ones."""
    for name in sorted(config):
        if name in known or not is_set(config[name]):
            continue
        if name in refused:
            problem = "this feature is not supported"
        else:
            problem = "this field is not known, and it may change the output"
        raise UnsupportedFeatureError(
            problem,
            file=CONFIG_FILE,
            key=prefix + name,
            remedy=remedies.get(name)
            or "train without it; remove the field only if it had no effect",
        )


def other_base(field: str, name: Any, base: BaseSpec, file: str = CONFIG_FILE) -> list[str]:
    """A warning where the adapter was made for a base model of another name."""
    if not name or _last_part(str(name)) == _last_part(base.name):
        return []
    return [
        f"{file}: {field}: made for {name!r}, while the base model is {base.name!r}; "
        "architecture and shapes fit"
    ]


def flag(config: Mapping[str, Any], name: str, file: str = CONFIG_FILE) -> bool:
    value = config.get(name, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise invalid(name, value, "use true or false", file)


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise invalid(name, value, "use a finite number")
    return float(value)


def is_set(value: Any) -> bool:
    """True if a field asks for something: null, false, zero and empty values do not."""
    return bool(value)


def invalid(name: str, value: Any, remedy: str, file: str = CONFIG_FILE) -> InvalidAdapterError:
    return InvalidAdapterError(f"{value!r} is not valid", file=file, key=name, remedy=remedy)


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()
