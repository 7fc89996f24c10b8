"""The folder that holds an adapter, within the one that a trainer wrote.

Trainers write checkpoints (`checkpoint-500/`, `epoch_0/`), a folder for each named adapter of PEFT,
or one within others (verl's `global_step_10/actor/lora_adapter`). The only adapter inside is meant;
which of several is not guessed. Pieces that a training left on each of its processes are no adapter
yet: the refusal has the command that gathers them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.adapterhub import bottleneck
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.layouts.torchtune import MISTRAL_FILE, PARAMS_FILE
from quickchange_store.formats.peft.mlx import MLX_FILE
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.turbo.turbo_common import HEADS_CONFIG_FILE, HEADS_FILE
from quickchange_store.formats.weight_files import SAFETENSORS

MAX_DEPTH = 4  # folders in one another
MAX_ENTRIES = 10_000  # looked at
_SHOWN = 8  # folders, for a message
_STEM = Path(WEIGHTS_FILE).stem
_OWN = re.compile(
    rf"{re.escape(CONFIG_FILE)}|{_STEM}[.-].*|adapter_\d+\.pt"
    rf"|{re.escape(MLX_FILE)}|{re.escape(bottleneck.WEIGHTS_FILE)}|{re.escape(HEADS_FILE)}"
    r"|(lora|pytorch_lora_weights)\.safetensors|model\.safetensors|.*\.gguf|.*\.npz"
)
_ADAPTERS = (CONFIG_FILE, WEIGHTS_FILE, f"{_STEM}.bin", f"{_STEM}.pt", MLX_FILE)


@dataclass(frozen=True)
class _Pieces:
    """Files that are not an adapter yet, and what makes one of them."""

    pattern: re.Pattern[str]
    what: str
    remedy: str


_PIECES = (
    _Pieces(
        re.compile(r"model_world_size_\d+_rank_\d+\.pt"),
        "verl's shards of a model, one for each process",
        "give the folder lora_adapter beside them, or gather them: python -m verl.model_merger "
        "merge --backend fsdp --local_dir {folder} --target_dir merged, and give "
        "merged/lora_adapter",
    ),
    _Pieces(
        re.compile(r".*\.distcp"),
        "a distributed checkpoint of torch, one file for each process",
        "gather it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} "
        f"{_STEM}.bin, and give the folder with that file and {CONFIG_FILE}",
    ),
    _Pieces(
        re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+.*\.pt|bf16_zero_pp_rank_.*\.pt"),
        "DeepSpeed's state of a training, one file for each process",
        "gather it in the folder above: python zero_to_fp32.py . out, and give a folder with out's "
        f"file and {CONFIG_FILE}",
    ),
    _Pieces(
        re.compile(r".*\.nemo"),
        "an archive of NeMo",
        "export it to PEFT's format (NeMo's convert_nemo_to_hf or Megatron Bridge's export)",
    ),
    _Pieces(
        re.compile(r"lit_model\.pth\.lora"),
        "LitGPT's own names for tensors",
        "convert it: litgpt merge_lora and litgpt convert_from_litgpt, or train with PEFT",
    ),
    _Pieces(
        re.compile(r".*\.npz"),
        "MLX's earlier file of arrays",
        "convert it: python -c \"import mlx.core as mx; mx.save_safetensors('adapters.safetensors'"
        ", dict(mx.load('adapters.npz')))\"",
    ),
    _Pieces(
        re.compile(r".*\.gguf"),
        "llama.cpp's file of an adapter",
        "give the folder that it was converted from",
    ),
)


def adapter_folder(directory: Path) -> Path:
    """The folder of the adapter in `directory`. Raises StoreError where it is not clear."""
    if not directory.is_dir():
        raise InvalidAdapterError(
            "no such folder", file=str(directory), remedy="give the folder that holds the adapter"
        )
    names = _entries(directory)
    heads = HEADS_CONFIG_FILE in names and any(name.endswith(SAFETENSORS) for name in names)
    if heads or any(_OWN.fullmatch(name) for name in names if (directory / name).is_file()):
        _refuse_pieces(directory, names, unless_weights=True)
        return directory
    inside = list(_adapters(directory))
    if len(inside) == 1:
        return inside[0]
    if inside:
        shown = [str(path.relative_to(directory)) for path in sorted(inside, key=_by_number)]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise InvalidAdapterError(
            f"the folder holds several adapters: {', '.join(shown[-_SHOWN:])}{more}",
            file=str(directory),
            remedy=f"give one of them, such as {directory / shown[-1]}",
        )
    for folder in (directory, *_folders(directory)):
        _refuse_pieces(folder, _entries(folder), unless_weights=False)
    return directory


def _refuse_pieces(folder: Path, names: list[str], *, unless_weights: bool) -> None:
    """Refuse a folder of pieces by the first of its files that is one."""
    weights = any(name.startswith(_STEM) or name.endswith(SAFETENSORS) for name in names)
    if unless_weights and weights:
        return
    for pieces in _PIECES:
        found = next((name for name in names if pieces.pattern.fullmatch(name)), None)
        if found is not None:
            raise UnsupportedFeatureError(
                f"this is {pieces.what}",
                file=found,
                remedy=pieces.remedy.format(folder=folder),
            )


def _adapters(directory: Path) -> Iterator[Path]:
    """Folders inside that hold an adapter; none is looked for within another."""
    found: set[Path] = set()
    for folder in _folders(directory):
        own = any((folder / name).is_file() for name in _ADAPTERS)
        own = own or all((folder / name).is_file() for name in (PARAMS_FILE, MISTRAL_FILE))
        if own and found.isdisjoint(folder.parents):
            found.add(folder)
            yield folder


def _folders(directory: Path) -> Iterator[Path]:
    """Folders inside, near ones first; links are not followed. Bounded in depth and number."""
    left, looked = [(directory, 0)], 0
    for folder, depth in left:
        for name in _entries(folder):
            looked += 1
            path = folder / name
            if looked <= MAX_ENTRIES and path.is_dir() and not path.is_symlink():
                yield path
                if depth + 1 < MAX_DEPTH:
                    left.append((path, depth + 1))


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:  # a folder within that this user may not read holds no adapter for him
        return []


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Order by which checkpoint-1000 comes behind checkpoint-500."""
    return [(int(number or 0), text) for text, number in re.findall(r"(\D+)(\d*)", str(path))]
