"""Watch for kernels that are compiled when none should be: each such stalls whoever waits for it.

Triton compiles a kernel for every new mix of argument types, constants, and of what it notices in
numbers and addresses (1, multiples of 16). A program that serves requests wants all of them behind
it when it is ready; this counts those that come later and says which they were.
"""

from __future__ import annotations

import logging
import time
from typing import Any

logger = logging.getLogger(__name__)


class CompileWatch:
    """Counts the kernels that this process compiles, or reads from Triton's cache, from now on."""

    def __init__(self) -> None:
        from triton import knobs

        self.compiled = 0
        self._runtime = knobs.runtime
        self._begun = 0.0
        self._others = (self._runtime.jit_cache_hook, self._runtime.jit_post_compile_hook)
        self._runtime.jit_cache_hook = self._before
        self._runtime.jit_post_compile_hook = self._after

    def close(self) -> None:
        """Watch no longer."""
        self._runtime.jit_cache_hook, self._runtime.jit_post_compile_hook = self._others

    def _before(self, **compilation: Any) -> Any:
        self._begun = time.monotonic()
        other = self._others[0]
        return None if other is None else other(**compilation)

    def _after(self, **compilation: Any) -> Any:
        self.compiled += 1
        logger.warning(
            "%s was compiled while requests were served, which held them up for %.2f s: the "
            "warm-up lacks %s. Please report this; `quickchange warm-cache` makes it short",
            compilation["fn"].name,
            time.monotonic() - self._begun,
            compilation["key"],
        )
        other = self._others[1]
        return None if other is None else other(**compilation)
