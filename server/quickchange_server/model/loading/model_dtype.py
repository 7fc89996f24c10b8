"""Which floats a base is served in: the setting's, or those that suit checkpoint and device.

    checkpoint            CPU                               GPU
    bfloat16              bfloat16 where the CPU multiplies bfloat16, where it multiplies it;
                          it, else float32                  else float16
    float16               float32                           float16
    float32, or not said  float32                           as bfloat16

A CPU multiplies bfloat16 if the native kernels do (AVX-512 BF16): elsewhere they would widen every
number first. float32 on a GPU has no tensor cores and twice the bytes; bfloat16 has its range, so
no weight overflows. A base that is stored quantised, or as GGUF, is computed in what its
configuration says, and GGUF says float32, to which it is dequantised.
"""

from __future__ import annotations

import logging

import torch
from transformers import PretrainedConfig

from quickchange_kernels import native
from quickchange_server.errors import SettingError

logger = logging.getLogger(__name__)

AUTO = "auto"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that a setting names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which settings and reports know a torch dtype."""
    return str(dtype).removeprefix("torch.")


def model_dtype(
    asked: str | torch.dtype, config: PretrainedConfig, device: torch.device
) -> torch.dtype:
    """The dtype to load a base in. asked: the setting `dtype`, or a dtype.

    Raises SettingError for bfloat16 on a GPU that does not multiply it.
    """
    if asked == AUTO:
        stored = stored_dtype(config)
        chosen = suitable_dtype(stored, device.type, bfloat16=multiplies_bfloat16(device))
        logger.info("dtype: %s (the model's own: %s)", dtype_name(chosen), stored or "not said")
        return chosen
    dtype = torch_dtype(asked) if isinstance(asked, str) else asked
    if dtype == torch.bfloat16 and device.type == "cuda" and not multiplies_bfloat16(device):
        raise SettingError(
            f"--dtype bfloat16 (or QUICKCHANGE_DTYPE): {torch.cuda.get_device_name(device)} does "
            "not multiply bfloat16; use float16, or auto",
            param="dtype",
        )
    return dtype


def suitable_dtype(stored: torch.dtype | None, device: str, *, bfloat16: bool) -> torch.dtype:
    """The dtype for weights of a stored one. bfloat16: whether the device multiplies it."""
    if device == "cpu":
        own = stored == torch.bfloat16 and bfloat16
        return torch.bfloat16 if own else torch.float32
    if stored == torch.float16 or not bfloat16:
        return torch.float16
    return torch.bfloat16


def stored_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The floats that a checkpoint's configuration names; None: it names none."""
    for part in (config, config.get_text_config()):
        dtype = getattr(part, "dtype", None)
        if dtype is not None:
            return torch_dtype(dtype) if isinstance(dtype, str) else dtype
    return None


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if products of bfloat16 are the device's own and the kernels use them."""
    if device.type == "cpu":
        return native.multiplies_bfloat16()
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
