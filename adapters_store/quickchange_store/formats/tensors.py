"""Weight files of an adapter's directory, opened and read tensor by tensor.

Every tensor is checked when it is taken; `AdapterTensors.left` holds those that were not taken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.adapter_bytes import DTYPES
from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import (
    BaseMismatchError,
    BaseModelError,
    InvalidAdapterError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.pickled_weights import as_safetensors
from quickchange_store.formats.weight_files import PICKLES

if TYPE_CHECKING:
    import torch

_COMPARED = 100  # names at most, for a message
Named = Iterable[tuple[str, "torch.Tensor"]]
_EMPTY_REMEDY = (
    "DeepSpeed's ZeRO-3 and FSDP leave such tensors where the parts were not gathered: run "
    "zero_to_fp32.py in the checkpoint, or save with stage3_gather_16bit_weights_on_model_save "
    "(FSDP: fsdp_state_dict_type FULL_STATE_DICT)"
)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if path.suffix in PICKLES:
        with as_safetensors(path) as converted, _opened(converted) as file:
            yield file
        return
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InvalidAdapterError(
            f"not a safetensors file ({error})",
            file=path.name,
            remedy="copy or save it again",
        ) from error


class AdapterTensors:
    """Tensors of one file or several; `left` holds the names not yet taken.

    `config_file`: for messages, the file that says which tensors there must be. `plain`: the name
    by which a tensor is asked for; None leaves its own. `parts`: in place of `plain`, the tensors
    that a tensor of a file makes, by the names that they are asked for by; None as before. It is
    called with the tensor's own name, the tensor and its file's name.
    """

    def __init__(
        self,
        *paths: Path,
        config_file: str = CONFIG_FILE,
        plain: Callable[[str], str | None] = lambda _: None,
        parts: Callable[[str, torch.Tensor, str], Named | None] | None = None,
    ) -> None:
        self._config_file = config_file
        self._main = paths[0].name
        self._plain = plain
        self._parts = parts or self._named
        self._content: dict[str, torch.Tensor] = {}
        self._files: dict[str, str] = {}
        self._own: dict[str, str] = {}  # names in the file, by those that they are asked for by
        self._strange: list[str] = []  # names that `plain` does not know
        for path in paths:
            self._open(path)
        self.left = set(self._content)

    def _open(self, path: Path) -> None:
        with _opened(path) as file:
            for own in map(str, file.keys()):
                tensor = file.get_tensor(own)
                known = self._parts(own, tensor, path.name)
                if known is None:
                    self._strange.append(own)
                for key, part in [(own, tensor)] if known is None else known:
                    self._add(path.name, own, key, part)

    def _named(self, own: str, tensor: torch.Tensor, _file: str) -> Named | None:
        key = self._plain(own)
        return None if key is None else [(key, tensor)]

    def _add(self, file: str, own: str, key: str, tensor: torch.Tensor) -> None:
        if key in self._content:
            twice = self._files[key] == file and self._content[key].equal(tensor)
            if twice:  # PEFT saves some of a module's biases under two names
                return
            raise InvalidAdapterError(
                f"the tensor is in {self._files[key]} too"
                + ("" if self._own[key] == own else f", as {self._own[key]}"),
                file=file,
                key=own,
                remedy="keep one of the two",
            )
        self._content[key] = tensor
        self._files[key] = file
        self._own[key] = own

    @staticmethod
    def keys(path: Path) -> set[str]:
        """Tensor names in one file, whose tensors are not read. Raises StoreError."""
        with _opened(path) as file:
            return set(file.keys())

    def file_of(self, key: str) -> str:
        """The name of the file that holds the tensor, or that should."""
        return self._files.get(key, self._main)

    def name(self, key: str) -> str:
        """What the file calls the tensor `key`."""
        return self._own.get(key, key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor that is there, which is not taken."""
        return tuple(self._content[key].shape)

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def take(self, key: str) -> torch.Tensor:
        """The tensor, checked for its dtype and for finite values."""
        tensor = self._find(key)
        if str(tensor.dtype) not in DTYPES:
            raise UnsupportedFeatureError(
                f"dtype {tensor.dtype} is not supported",
                file=self.file_of(key),
                key=self.name(key),
                remedy="save it as float32, bfloat16 or float16",
            )
        if not tensor.numel():
            raise InvalidAdapterError(
                f"the tensor is empty, shape {list(tensor.shape)}",
                file=self.file_of(key),
                key=self.name(key),
                remedy=_EMPTY_REMEDY,
            )
        if not bool(tensor.isfinite().all()):
            raise InvalidAdapterError(
                "it holds NaN or infinite values",
                file=self.file_of(key),
                key=self.name(key),
                remedy="train again, or take an earlier checkpoint",
            )
        self.left.discard(key)
        return tensor

    def take_any(self, key: str, *, empty: bool = False) -> torch.Tensor:
        """A tensor of numbers, checked as by `take`, or of whole numbers of any width.

        empty: the tensor may have no numbers.
        """
        tensor = self._find(key)
        pruned = empty and not tensor.numel()
        if not pruned and (tensor.is_floating_point() or tensor.is_complex()):
            return self.take(key)
        self.left.discard(key)
        return tensor

    def take_integers(self, key: str) -> torch.Tensor:
        """A tensor of whole numbers, int32 or int64."""
        tensor = self._find(key)
        if str(tensor.dtype) not in ("torch.int32", "torch.int64"):
            raise InvalidAdapterError(
                f"dtype {tensor.dtype}, where whole numbers are needed",
                file=self.file_of(key),
                key=self.name(key),
                remedy="save it as int32 or int64",
            )
        self.left.discard(key)
        return tensor

    def take_number(self, key: str) -> float:
        """The only number of a tensor of any usual dtype."""
        whole = str(self._find(key).dtype) in ("torch.int32", "torch.int64")
        tensor = self.take_integers(key) if whole else self.take(key)
        if tensor.numel() != 1:
            raise InvalidAdapterError(
                f"shape {list(tensor.shape)}, where one number is needed",
                file=self.file_of(key),
                key=self.name(key),
                remedy="save the adapter again",
            )
        return float(tensor.item())

    def _find(self, key: str) -> torch.Tensor:
        if key not in self._content:
            raise InvalidAdapterError(
                f"the tensor is missing, while {self._config_file} asks for it"
                + self._instead(key),
                file=self.file_of(key),
                key=key,
                remedy="save the adapter again, with all its tensors and their own names",
            )
        return self._content[key]

    def _instead(self, key: str) -> str:
        """The tensor, of those that nothing asks for, whose name is nearest to a missing one."""
        strange = [name for name in self._strange if name in self.left][:_COMPARED]
        nearest = get_close_matches(key, strange, n=1, cutoff=0.0)
        return f"; there is {nearest[0]} instead" if nearest else ""

    def take_shaped(self, key: str, module: str, expected: tuple[int, ...]) -> torch.Tensor:
        """`take` with a check of the base module's shape. Raises BaseMismatchError."""
        tensor = self.take(key)
        if tuple(tensor.shape) != expected:
            raise BaseMismatchError(
                f"shape {list(tensor.shape)}, while {module} of the base model asks for "
                f"{list(expected)}",
                file=self.file_of(key),
                key=self.name(key),
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
                file=self.file_of(key),
                key=self.name(key),
                remedy="add the adapter where the base model's safetensors weights are",
            )
        return base.weights.tensor(name)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that shares memory with nothing, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError, a full disk's by its number."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
