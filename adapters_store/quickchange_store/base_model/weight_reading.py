"""Reading a checkpoint's weights: how far it is, which pages of its files stay in memory, and how
many bytes there are to read.

transformers maps the files. A weight that keeps its type stays a view of its file; one that is cast
or replaced by other memory (fused, quantised) leaves pages behind that count as this process's
memory until the whole file is let go. They are given back here: a page of a mapped file that is
wanted again is read again.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.errors import BaseModelError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_FILES = (".safetensors", ".gguf")
_MAPS = Path("/proc/self/maps")
_SAID_EVERY = 5.0  # seconds between lines of a log
_RELEASED_EVERY = 0.02  # seconds between two looks at the mapped files
_MADV_DONTNEED = 4  # Linux
_MOST_HEADER = 100 << 20  # bytes, as safetensors itself allows


@contextmanager
def reading(desc: str, *, cast: bool) -> Iterator[None]:
    """Show a bar on a terminal, lines in a log, for what transformers reads in the block.

    cast: no weight keeps its file's type, so that pages may be given back as they are read.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_reading
    from transformers.utils.logging import set_tqdm_hook

    def shown(_: Callable[..., Any], args: tuple[Any, ...], _named: dict[str, Any]) -> Any:
        return _Shown(args[0], desc, cast) if args else _Silent()

    own_bar = gguf_reading.tqdm  # the GGUF reader has a bar that no hook reaches
    before = set_tqdm_hook(shown)
    gguf_reading.tqdm = lambda items, **_: _Shown(items, desc, cast)
    try:
        yield
    finally:
        set_tqdm_hook(before)
        gguf_reading.tqdm = own_bar


class _Shown:
    """Iterates and shows how far it is."""

    def __init__(self, items: Iterable[Any], desc: str, cast: bool) -> None:
        self._items = items
        self._desc = desc
        self._cast = cast

    def __iter__(self) -> Iterator[Any]:
        items = list(self._items)
        released = said = begun = time.monotonic()
        bar = _bar(len(items), self._desc)
        for number, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if self._cast and now - released > _RELEASED_EVERY:
                released = now
                release_files()
            if bar is not None:
                bar.update()
            elif now - said > _SAID_EVERY:
                said = now
                share = number * 100 // len(items)
                logger.info("%s: %d%% after %.0f s", self._desc, share, now - begun)
        if bar is not None:
            bar.close()


class _Silent:
    """Stands for a bar that is moved by hand."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None


def _bar(total: int, desc: str) -> Any:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit="tensor")


def release_files() -> None:
    """Give back the pages of every mapped weight file. Nothing may have been written to them."""
    for begin, end in _mapped_files():
        _give_back(begin, end)


def release(tensor: torch.Tensor) -> None:
    """Give back the pages of a tensor that was copied, if it is a view of a weight file."""
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and any(a <= begin and end <= b for a, b in _mapped_files()):
        _give_back(begin, end)


def give_back_freed() -> None:
    """Return freed memory to the system, which glibc keeps where it lies between other pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses of the mapped weight files."""
    if not _MAPS.exists():
        return []
    found = []
    for line in _MAPS.read_text(errors="replace").splitlines():
        if line.endswith(_FILES):
            begin, _, end = line.split(maxsplit=1)[0].partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _give_back(begin: int, end: int) -> None:
    """Whole pages between two addresses."""
    page = mmap.PAGESIZE
    begin, end = -(-begin // page) * page, end // page * page
    if end > begin:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def checkpoint_bytes(folder: str | Path) -> int | None:
    """Bytes of all tensors in a folder's safetensors files; None where it has none.

    Raises BaseModelError for a file that is damaged.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    return sum(sum(_sizes(file)) for file in files) if files else None


def _sizes(file: Path) -> Iterator[int]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(opened.read(length))
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield end - begin
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BaseModelError(
            f"the base model's file can't be read ({error})",
            file=file.name,
            remedy="fetch the base model again",
        ) from error
