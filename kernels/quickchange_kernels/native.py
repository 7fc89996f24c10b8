"""The native CPU kernels: built at first use, kept in the user's cache folder."""

from __future__ import annotations

import functools


@functools.cache
def ensure() -> bool:
    """Load the native kernels once; False where only the plain torch versions run."""
    return False
