"""Files of an adapter's folder that hold its tensors: one, shards, or pickles.

State of the training that lies beside them (optimizer, scheduler, random numbers, a critic's value
head, earlier checkpoints) is no part of the adapter; draft heads have readers of their own. Knows
nothing of what the tensors are.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import read_config

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS = ".safetensors"
_INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_STATE = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state|random_states|recipe_state|value_head"
    r"|v_head|custom_checkpoint|sampler|dataloader|extra_state|optim_world_size).*"
    r"|.*optim_states\.pt|\d{5,}_adapters\.safetensors|(medusa_lm_head|turbo_heads)\..*"
)


def weight_files(directory: Path, expected: str, writer: str) -> list[Path]:
    """The files with the tensors that `writer` saves as `expected`, a safetensors file.

    Its shards, a pickle of that name, and the folder's only other file of weights stand for it.
    Raises StoreError where there is none.
    """
    found = candidates(directory, Path(expected).stem)
    if len(found) == 1 or (found and _SHARD.fullmatch(found[0].name)):
        return found
    if found:
        names = ", ".join(path.name for path in found)
        raise InvalidAdapterError(
            f"the folder has several files of weights: {names}",
            file=expected,
            remedy=f"keep the adapter's alone, or name it {expected}",
        )
    raise InvalidAdapterError(
        "the file is missing",
        file=expected,
        remedy=f"give the folder that {writer} wrote",
    )


def candidates(directory: Path, stem: str) -> list[Path]:
    """The files named `stem`, in one format; else all that may hold weights. Raises StoreError."""
    for suffix in (SAFETENSORS, *PICKLES):
        path = directory / f"{stem}{suffix}"
        if path.is_file():
            return [path]
        index = directory / f"{stem}{suffix}{_INDEX}"
        if index.is_file():
            return shards(directory, index)
    names = _names(directory)
    for suffixes in ((SAFETENSORS,), PICKLES):
        found = [n for n in names if n.endswith(suffixes) and not _STATE.fullmatch(n)]
        parts = [match for match in map(_SHARD.fullmatch, found) if match is not None]
        own = [match for match in parts if match["stem"] == stem] or parts
        if own:
            return _without_index(directory, own)
        if found:
            return [directory / name for name in found]
    return []


def _without_index(directory: Path, parts: Sequence[re.Match[str]]) -> list[Path]:
    """All shards of a set whose index is missing. Raises InvalidAdapterError for a missing one."""
    first, count = parts[0], int(parts[0]["count"])
    there = {match.string for match in parts}
    for number in range(1, min(count, len(parts) + 1) + 1):
        name = f"{first['stem']}-{number:05}-of-{first['count']}{first['suffix']}"
        if name not in there:
            raise InvalidAdapterError(
                f"the file is missing, one of {count} shards",
                file=name,
                remedy="copy the folder again, complete",
            )
    return [directory / name for name in sorted(there)]


def shards(directory: Path, index: Path) -> list[Path]:
    """The files of an index of shards. Raises InvalidAdapterError where one is missing."""
    mapping = read_config(index.parent, index.name).get("weight_map")
    listed = list(mapping.values()) if isinstance(mapping, dict) else []
    if not listed or not all(isinstance(name, str) for name in listed):
        raise InvalidAdapterError(
            "not an index of weight files",
            file=index.name,
            key="weight_map",
            remedy="copy or save it again",
        )
    names = sorted(set(listed))
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise InvalidAdapterError(
                f"it lists {name!r}, which is no file of this folder",
                file=index.name,
                key="weight_map",
                remedy="copy the folder again, complete",
            )
    return [directory / name for name in names]


def refuse_pickle(directory: Path, expected: str, apart_from: Sequence[str] = ()) -> None:
    """Refuse the first pickle in `directory`, with the command that makes it `expected`.

    Files whose names begin with one of `apart_from` hold something else.
    """
    for name in _names(directory):
        if name.endswith(PICKLES) and not name.startswith(tuple(apart_from)):
            raise UnsupportedFeatureError(
                "a pickle can run any code when it is opened, and is not read",
                file=name,
                remedy=f"convert it where you trust it: {conversion(name, expected)}",
            )


def conversion(name: str, expected: str) -> str:
    """The command that makes the pickle `name` the safetensors file `expected`."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f'save_file(torch.load({json.dumps(name)}, weights_only=True, map_location="cpu"), '
        f"{json.dumps(expected)})"
    )
    return f"python -c {shlex.quote(code)}"


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_file())
