"""The command `quickchange plan`: what a model would take of a device, with neither at hand."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quickchange_server.config import Settings, local_folder
from quickchange_server.engine.memory.planning import MemoryPlan, memory_plan
from quickchange_server.entrypoints.gpu_names import GPUS
from quickchange_server.entrypoints.serve import fail, settings_of
from quickchange_server.errors import QuickchangeError, SettingError
from quickchange_server.model.loading.model_dtype import multiplies_bfloat16
from quickchange_server.model.loading.model_outline import Outline, outline
from quickchange_store.errors import StoreError

_GIB = 1 << 30
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|k|m|g|t)(i?)b?", re.IGNORECASE)
DEFAULT_RANKS = (8, 16, 32, 64)


def plan(given: Mapping[str, Any], *, gpu: str | None, ranks: str | None) -> None:
    """Print the plan for the settings `given`; exits with status 1 and one line of error if none
    is possible."""
    try:
        print(planned(given, gpu=gpu, ranks=ranks))
    except (QuickchangeError, StoreError, ValueError) as error:
        fail(str(error))


def planned(given: Mapping[str, Any], *, gpu: str | None, ranks: str | None) -> str:
    """The plan. gpu: a device's name or a size; None: a CPU. ranks: of adapters, with commas."""
    settings, _, found = memory_of(given, gpu=gpu, ranks=ranks)
    return f"{settings.model} on {gpu or 'a CPU'}:\n{found.text}"


def memory_of(
    given: Mapping[str, Any], *, gpu: str | None, ranks: str | None
) -> tuple[Settings, Outline, MemoryPlan]:
    """The settings, the base without its weights, and an engine's memory for both."""
    device = "cpu" if gpu is None else "cuda"
    settings = settings_of({"store": ".", **given, "device": device}, Settings)
    if settings.tensor_parallel > 1:
        raise SettingError(
            "--tensor-parallel: a plan is for a base on one device; plan for one device of the "
            "memory of all, which is close",
            param="tensor_parallel",
        )
    total = None if gpu is None else device_bytes(gpu)
    import torch

    base = outline(
        settings.model,
        dtype=settings.dtype,
        device=device,
        bfloat16=total is not None or multiplies_bfloat16(torch.device("cpu")),
        adapters=settings.adapters,
        quantization=settings.quantization,
        extra_vocabulary=settings.spare_tokens,
    )
    folder = local_folder(settings.store)
    store = folder if folder.exists() else Path()
    free = shutil.disk_usage(store).free
    return settings, base, memory_plan(base, settings, total, ranks_of(ranks), free)


def device_bytes(name: str) -> int:
    """Bytes of a device by its name, or of a size such as 24GiB. Raises ValueError for others."""
    known = GPUS.get(name.lower())
    if known is not None:
        return int(known.gib * _GIB)
    match = _SIZE.fullmatch(name)
    count = 0
    if match is not None:
        number, unit, binary = match.groups()
        power = " kmgt".index(unit.lower() or " ")
        count = int(float(number) * (1024 if binary else 1000) ** power)
    if count < 1 << 20:
        raise ValueError(f"--gpu {name}: give a size such as 24GiB, or one of {', '.join(GPUS)}")
    return count


def ranks_of(given: str | None) -> Sequence[int]:
    """The ranks that are joined by commas, or the default ones. Raises ValueError."""
    if given is None:
        return DEFAULT_RANKS
    parts = given.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"--ranks {given}: give whole numbers above 0, joined by commas: 8,16")
    return [int(part) for part in parts]
