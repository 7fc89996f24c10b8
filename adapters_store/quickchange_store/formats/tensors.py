"""The weight file of an adapter's directory: found, opened, and read tensor by tensor.

Every tensor is checked when it is taken, and the reader can tell which ones nothing asked for.
Pickled weights are never opened.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.canonical import DTYPES, BaseSpec
from quickchange_store.errors import (
    BaseMismatchError,
    BaseModelError,
    InvalidAdapterError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.config_file import CONFIG_FILE

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weights_file(directory: Path, expected: str, writer: str) -> Path:
    """The safetensors file `expected`, as `writer` saves it. Raises StoreError where it is not."""
    path = directory / expected
    if path.is_file():
        return path
    others = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    for name in others:
        if name.endswith(PICKLES):
            raise UnsupportedFeatureError(
                "a pickle can run any code when it is opened, and is not read",
                file=name,
                remedy="convert it where you trust it: python -c "
                f"{shlex.quote(_conversion(name, expected))}",
            )
    sharded = [name for name in others if Path(expected).stem in name]
    if sharded:
        raise UnsupportedFeatureError(
            "an adapter in several weight files is not supported",
            file=", ".join(sharded),
            remedy=f"save it as one {expected}",
        )
    raise InvalidAdapterError(
        "the file is missing",
        file=expected,
        remedy=f"give the folder that {writer} wrote",
    )


def _conversion(name: str, expected: str) -> str:
    return (
        "import torch; from safetensors.torch import save_file; "
        f"save_file(torch.load({name!r}, weights_only=True, map_location='cpu'), {expected!r})"
    )


class AdapterTensors:
    """The tensors of the file, and which of them nothing has asked for yet."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.file = path.name
        try:
            with safe_open(str(path), framework="pt") as file:
                self._content: dict[str, torch.Tensor] = {
                    str(key): file.get_tensor(key)
                    for key in file.keys()  # noqa: SIM118
                }
        except (SafetensorError, OSError) as error:
            raise InvalidAdapterError(
                f"not a safetensors file ({error})",
                file=self.file,
                remedy="copy or save it again",
            ) from error
        self.left = set(self._content)

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def take(self, key: str) -> torch.Tensor:
        """The tensor, checked for its dtype and for finite values."""
        if key not in self._content:
            raise InvalidAdapterError(
                f"the tensor is missing, while {CONFIG_FILE} asks for it",
                file=self.file,
                key=key,
                remedy="save the adapter again, with all its tensors",
            )
        tensor = self._content[key]
        if str(tensor.dtype) not in DTYPES:
            raise UnsupportedFeatureError(
                f"dtype {tensor.dtype} is not supported",
                file=self.file,
                key=key,
                remedy="save it as float32, bfloat16 or float16",
            )
        if not bool(tensor.isfinite().all()):
            raise InvalidAdapterError(
                "it holds NaN or infinite values",
                file=self.file,
                key=key,
                remedy="train again, or take an earlier checkpoint",
            )
        self.left.discard(key)
        return tensor

    def take_shaped(self, key: str, module: str, expected: tuple[int, ...]) -> torch.Tensor:
        """`take`, and the shape must be the one that the base's module asks for."""
        tensor = self.take(key)
        if tuple(tensor.shape) != expected:
            raise BaseMismatchError(
                f"shape {list(tensor.shape)}, while {module} of the base model asks for "
                f"{list(expected)}",
                file=self.file,
                key=key,
                remedy="use an adapter of this base model",
            )
        return tensor

    def base_tensor(self, base: BaseSpec, name: str, key: str) -> torch.Tensor:
        """The base's own parameter `name`, which the import of tensor `key` needs.

        Raises BaseModelError where the base's weights aren't at hand.
        """
        if base.weights is None:
            raise BaseModelError(
                f"the tensor must be compared with the base model's {name}, whose weights aren't "
                "at hand",
                file=self.file,
                key=key,
                remedy="add the adapter where the base model's safetensors weights are",
            )
        return base.weights.tensor(name)
