"""The command `quickchange warm-cache`: compiles ahead what the engine would compile at its start.

The engine starts as on the GPU, with random weights of the model's shapes and few layers, and goes
through its own warm-up; Triton compiles each launch for the GPU, which need not be there, and keeps
it where the engine will look. Nothing is computed, and of the model only its configuration is read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_server.config import Settings
from quickchange_server.entrypoints.gpu_names import GPUS
from quickchange_server.errors import SettingError

logger = logging.getLogger(__name__)

_CONTEXT = 4096  # tokens at most: what is compiled does not depend on it


@dataclass(frozen=True, slots=True)
class WarmCache:
    """What a run has made."""

    target: str
    folder: Path
    compiled: tuple[str, ...]  # kernels, one for each compilation
    found: int  # that the cache had
    seconds: float

    def __str__(self) -> str:
        return (
            f"{len(self.compiled)} kernels compiled for {self.target} in {self.seconds:.0f} s, "
            f"{self.found} were there: {self.folder}"
        )


def warm_cache(given: Mapping[str, Any], *, gpu: str | None, out: Path | None) -> WarmCache:
    """Compile for a GPU by its name or architecture (None: the one in this machine) what an engine
    with these settings launches, into `out` (None: Triton's own cache).

    Raises SettingError for a GPU that is not known and for one that the kernels don't fit.
    """
    from triton.runtime.errors import OutOfResources

    from quickchange_kernels.absent_gpu import absent_gpu
    from quickchange_kernels.kernel_cache import filling
    from quickchange_server.engine.engine import Engine
    from quickchange_server.model.loading.model_loader import prepare
    from quickchange_server.model.loading.short_model import short_model
    from quickchange_store.base_model.base_source import BaseSource

    started = time.monotonic()
    settings = Settings.model_validate({"store": ".", **given, "device": "cuda"})
    target = _target(gpu)
    config = BaseSource.of(settings.model).config()
    dtype = _dtype(settings, config, target.arch)
    model = prepare(
        short_model(config, dtype),
        adapters=settings.adapters,
        quantization=settings.quantization,
        model_check=False,
        deterministic=settings.deterministic,
        extra_vocabulary=settings.spare_tokens,
    )
    here = settings.model_copy(
        update={
            "device": "cpu",
            "dtype": str(dtype).removeprefix("torch."),
            "max_batch_tokens": settings.batch_tokens,
            "max_sequences": settings.step_sequences,
            "max_model_len": min(settings.max_model_len or _CONTEXT, model.max_positions, _CONTEXT),
        }
    )
    with filling(out) as filled, absent_gpu(target, products=False):
        try:
            Engine(model, here, load_adapter=_no_adapter, on_wake=lambda: None, depth=2).close()
        except OutOfResources as error:
            raise SettingError(
                f"--gpu {gpu}: {error}; use --dtype bfloat16 or float16", param="gpu"
            ) from error
    return WarmCache(
        target.name,
        filled.folder,
        tuple(filled.compiled),
        filled.found,
        time.monotonic() - started,
    )


def _target(gpu: str | None) -> Any:
    import torch

    from quickchange_kernels.gpu_targets import TARGETS

    if gpu is None:
        if not torch.cuda.is_available():
            raise SettingError(
                "--gpu: there is no GPU here; name the one to compile for, as --gpu h100",
                param="gpu",
            )
        gpu = "sm_{}{}".format(*torch.cuda.get_device_capability())
    known = GPUS.get(gpu.lower())
    name = gpu if known is None else known.target
    if name not in TARGETS:
        raise SettingError(
            f"--gpu {gpu}: not known; name one of {', '.join([*GPUS, *TARGETS])}", param="gpu"
        )
    return TARGETS[name]


def _dtype(settings: Settings, config: Any, arch: int | str) -> Any:
    """The floats that the engine would choose on the GPU."""
    from quickchange_server.model.loading.model_dtype import (
        AUTO,
        stored_dtype,
        suitable_dtype,
        torch_dtype,
    )

    if settings.dtype != AUTO:
        return torch_dtype(settings.dtype)
    bfloat16 = not isinstance(arch, int) or arch >= 80
    return suitable_dtype(stored_dtype(config), "cuda", bfloat16=bfloat16)


def _no_adapter(digest: str, _pause: Any) -> Any:
    raise FileNotFoundError(f"no adapter is loaded while kernels are compiled: {digest}")
