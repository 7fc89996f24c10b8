"""`adapter_config.json`: reading it, and the checks that the format readers share.

A field is honoured, harmless or refused; an unknown one is refused where it is set, as it might
change the output. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.json_files import UnreadableFileError, read_file, read_object

CONFIG_FILE = "adapter_config.json"
BASE_NAME = "base_model_name_or_path"
MAX_CONFIG_BYTES = 4 * 1024**2
MAX_FACTOR = 1e9
MAX_NAMES = 10_000  # modules or patterns in one field


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
        return read_object(read_file(path, MAX_CONFIG_BYTES))
    except UnreadableFileError as error:
        raise InvalidAdapterError(
            error.problem if error.key else f"not a JSON configuration ({error.problem})",
            file=file,
            key=error.key,
            remedy="correct it, or save the adapter again",
        ) from error


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
    if name is not None and not isinstance(name, str):
        raise invalid(field, name, "give the base model's name as text, or leave it out", file)
    if not name or _last_part(name) == _last_part(base.name):
        return []
    return [
        f"{file}: {field}: made for {name[:200]!r}, while the base model is {base.name!r}; "
        "architecture and shapes fit"
    ]


def flag(config: Mapping[str, Any], name: str, file: str = CONFIG_FILE) -> bool:
    value = config.get(name, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise invalid(name, value, "use true or false", file)


def number(name: str, value: Any) -> float:
    """A factor that an output is scaled by: more than MAX_FACTOR leaves no output finite."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not abs(value) <= MAX_FACTOR:
        raise invalid(name, value, f"use a number from -{MAX_FACTOR:g} to {MAX_FACTOR:g}")
    return float(value)


def texts(name: str, value: Any) -> None:
    """Raise InvalidAdapterError unless `value` is null, a text or a list of texts."""
    listed = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(entry, str) for entry in listed):
        raise invalid(name, value, "use a name, or a list of names")
    if len(listed) > MAX_NAMES:
        raise invalid(name, f"{len(listed)} names", f"give at most {MAX_NAMES}")


def is_set(value: Any) -> bool:
    """True if a field asks for something: null, false, zero and empty values do not."""
    return bool(value)


def invalid(name: str, value: Any, remedy: str, file: str = CONFIG_FILE) -> InvalidAdapterError:
    return InvalidAdapterError(f"{value!r} is not valid", file=file, key=name, remedy=remedy)


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()
