"""The native CPU kernels: C++ built at first use and kept in the user's cache folder.

The library takes over the operations on the CPU by registering itself for PyTorch's CPU dispatch
key. It holds each kernel for AVX-512 (with and without bfloat16 products), AVX2 and the baseline,
and picks when it runs. Where there is no compiler, or the build fails, the plain torch versions
stay in place, with one warning.

QUICKCHANGE_NATIVE=0 keeps the plain versions. QUICKCHANGE_CACHE is the cache folder (default:
$XDG_CACHE_HOME/quickchange, else ~/.cache/quickchange). QUICKCHANGE_PREBUILT is one that was filled
before, such as an image's: it is looked into first and never written to.
`python -m quickchange_kernels.native` builds them into the cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from quickchange_kernels import dispatch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
LIBRARY_NAME = "quickchange_native"
# -fopenmp gives PyTorch's inlined thread loops; the library resolves to PyTorch's own libgomp, so
# there is one team of threads. Contraction makes multiply-adds of the vectors' a += b * c.
# NDEBUG because PyTorch was built with it, and some of its classes have other members without.
COMPILER_FLAGS = [
    "-O3",
    "-DNDEBUG",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
]


@functools.cache
def ensure() -> bool:
    """Load the native kernels once a process, building them where they aren't in the cache.

    Returns True if they serve the CPU. Takes about a minute the first time on a machine; call it at
    start-up, so that no request waits for it.
    """
    if os.environ.get("QUICKCHANGE_NATIVE") == "0" or dispatch.triton_interpreted():
        return False
    try:
        library = prebuilt() or build(cache_folder())
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "the native CPU kernels can't be built (%s); the plain PyTorch versions serve instead, "
            "several times slower. %s and start again; QUICKCHANGE_NATIVE=0 silences this",
            error,
            _remedy(error),
        )
        return False
    return True


def multiplies_bfloat16() -> bool:
    """True if the native kernels serve this CPU and take bfloat16 products from its AVX-512."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and ensure()


def _remedy(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return "Give a cache folder that this user may write (QUICKCHANGE_CACHE)"
    return "Install a C++ compiler (g++ 12 or newer)"


def cache_folder() -> Path:
    """The folder of this user's built kernels."""
    if own := os.environ.get("QUICKCHANGE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "quickchange"
    return Path.home() / ".cache" / "quickchange"


def prebuilt() -> Path | None:
    """The library from the folder that QUICKCHANGE_PREBUILT names, if it is there and fits."""
    folder = os.environ.get("QUICKCHANGE_PREBUILT")
    if not folder:
        return None
    library = _library(Path(folder))
    return library if library.exists() else None


def build(cache: Path) -> Path:
    """The built library: from the cache, else compiled now. Processes wait for one another.

    Raises RuntimeError or OSError where it can't be built.
    """
    library = _library(cache)
    if library.exists():  # and need not be writable
        return library
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not library.exists():
            _compile(folder, library)
    return library


def _library(cache: Path) -> Path:
    return cache / "native" / fingerprint() / f"{LIBRARY_NAME}.so"


def fingerprint() -> str:
    """Hash of what a library is built from: sources, flags, PyTorch, Python and the machine."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    versions = (torch.__version__, sys.version, platform.machine(), _compiler(), *COMPILER_FLAGS)
    digest.update(repr(versions).encode())
    return digest.hexdigest()[:20]


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _compile(folder: Path, library: Path) -> None:
    if shutil.which(_compiler()) is None:
        raise RuntimeError(f"no C++ compiler: {_compiler()!r} is not on the PATH")
    from torch.utils import cpp_extension

    logger.warning("building the native CPU kernels in %s: about a minute, once", folder)
    work = folder / "build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with _ninja_on_path():
        cpp_extension.load(
            name=LIBRARY_NAME,
            sources=[str(source) for source in sorted(SOURCES.glob("*.cpp"))],
            extra_cflags=COMPILER_FLAGS,
            build_directory=str(work),
            is_python_module=False,
        )
    # In one step: a process that was killed leaves no half-written library behind.
    (work / f"{LIBRARY_NAME}.so").replace(library)
    shutil.rmtree(work)


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """The environment's own ninja is found although the environment isn't activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(build(cache_folder()))
