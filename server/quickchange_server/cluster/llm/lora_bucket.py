"""Adapters in the bucket of `lora_config.dynamic_lora_loading_path`, a folder for each id."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from ray.llm._internal.common.utils.cloud_utils import CloudFileSystem

from quickchange_server.errors import UnavailableError, UnknownModelError

CONFIGS = ("adapter_config.json", "config.json")  # PEFT's; that of Turbo heads alone
PAUSE_SECONDS = 1.0  # before the next try; twice as long each time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraBucket:
    """Reads with Ray's own clients, so with the credentials that its ingress lists with."""

    url: str
    try_seconds: float | None  # for one try; None: no limit
    tries: int

    async def fetch(self, adapter: str, folder: Path) -> None:
        """Copy an adapter's files into `folder`. Raises UnknownModelError, UnavailableError."""
        for attempt in range(1, self.tries + 1):
            try:
                async with asyncio.timeout(self.try_seconds):
                    await asyncio.to_thread(self._copy, adapter, folder)
                return
            except UnknownModelError:
                raise
            except Exception as error:  # each cloud's client has errors of its own
                logger.warning(
                    "adapter %s of %s, try %d of %d: %s: %s",
                    *(adapter, self.url, attempt, self.tries, type(error).__name__, error),
                )
                if attempt == self.tries:
                    raise UnavailableError(
                        f"model: the adapter {adapter!r} can't be fetched now; the replica's log "
                        "has the reason",
                        param="model",
                        retry_after=5.0,
                    ) from error
            await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))

    def _copy(self, adapter: str, folder: Path) -> None:
        place = f"{self.url}/{adapter}"
        if all(CloudFileSystem.get_file(f"{place}/{name}") is None for name in CONFIGS):
            raise UnknownModelError(
                f"model: there is no adapter {adapter!r} in {self.url}; GET /v1/models lists what "
                "there is",
                param="model",
            )
        CloudFileSystem.download_files(path=str(folder), bucket_uri=place)
