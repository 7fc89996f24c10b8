"""Adapters that a command line names (`--lora-modules`): imported before the server starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quickchange_server.errors import SettingError
from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import StoreError
from quickchange_store.importing import add_adapter
from quickchange_store.store import Store

_FIELDS = {"name", "path", "base_model_name", "is_3d_lora_weight"}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter's name, and the folder that it lies in."""

    name: str
    path: str


def lora_modules(given: Iterable[str]) -> tuple[LoraModule, ...]:
    """The modules of `name=path` or JSON texts, a later one of a name in an earlier one's place.

    Raises SettingError.
    """
    return tuple({module.name: module for module in map(_module, given)}.values())


def _module(text: str) -> LoraModule:
    plain = text.strip()
    if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "'\"":
        plain = plain[1:-1]  # KServe quotes them for a shell that may not be there
    if not plain.startswith("{"):
        name, equals, path = plain.partition("=")
        if not (name and equals and path):
            raise _wrong(f'{text!r} is neither NAME=PATH nor {{"name": …, "path": …}}')
        return LoraModule(name, path)
    try:
        read = json.loads(plain)
    except ValueError as error:
        raise _wrong(f"{text!r} is not valid JSON: {error}") from error
    if unknown := sorted(read.keys() - _FIELDS):
        raise _wrong(f"{text!r}: unknown field {unknown[0]!r}; give name and path")
    name, path = read.get("name"), read.get("path")
    if not (isinstance(name, str) and name and isinstance(path, str) and path):
        raise _wrong(f"{text!r}: name and path are required, both text")
    return LoraModule(name, path)


def add_modules(
    modules: Sequence[LoraModule], store: Store, base: BaseSpec, base_names: Sequence[str]
) -> None:
    """Publish each module under its name; one whose content is there already stays as it is.

    Raises SettingError that names the module.
    """
    for module in modules:
        if module.name in base_names:
            raise _wrong(f"{module.name!r} is the base model's name; choose another")
        if not Path(module.path).is_dir():
            raise _wrong(
                f"{module.name!r}: {module.path} is not a folder of this machine; fetch the "
                "adapter first, and give its folder"
            )
        try:
            add_adapter(store, module.name, Path(module.path), base)
        except (StoreError, OSError) as error:
            raise _wrong(f"{module.name!r} can't be added: {error}") from error


def _wrong(what: str) -> SettingError:
    return SettingError(f"lora_modules: {what}", param="lora_modules")
