"""File operations that survive a crash and other processes: locks, fsync, atomic replacement."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, waiting for it. The system frees it when a holder dies.

    Each call opens the file anew, so that threads of one process exclude each other too.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_directory(path: Path) -> Iterator[None]:
    """Create the directory `path` and hold a lock on it, so that others see its maker is alive."""
    path.mkdir(parents=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """True if a living process holds a lock on the directory `path`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the directory's entries (creations, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def placed(path: Path) -> Iterator[None]:
    """Give an OSError without a file name, as a full disk's, the path that was written to."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk; what fails leaves no file."""
    try:
        with written_synced(path) as file:
            file.write(content)
    except FileExistsError:
        raise
    except OSError:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def written_synced(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, and wait at the end until it is on the disk."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace_atomically(path: Path, content: bytes, scratch: Path) -> None:
    """Replace `path` so that a reader, or a crash, sees the old content or the new, never half.

    `scratch` is a directory of the same file system, for the file while it is written.
    """
    temporary = scratch / f"{path.name}.{secrets.token_hex(8)}"
    write_synced(temporary, content)
    temporary.replace(path)
    sync_directory(path.parent)


def abandoned(path: Path, before: float) -> bool:
    """True if `path` was last changed at `before` or earlier and no living process holds it."""
    try:
        return path.stat().st_mtime <= before and not (path.is_dir() and is_held(path))
    except FileNotFoundError:  # its writer has just removed it
        return False


def tree_size(path: Path) -> int:
    """Size of a file, or of all files of a directory, in bytes."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def delete(path: Path) -> None:
    """Remove a file or a directory; a file that is gone already is no error."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # its writer may have removed it since it was listed
