"""What Ray Serve LLM's configuration keeps in buckets: a model, and adapters by their ids.

Both are read with Ray's own clients, so with the credentials that its ingress lists with.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from ray.llm._internal.common.utils.cloud_utils import (
    CloudFileSystem,
    CloudMirrorConfig,
    is_remote_path,
)
from ray.llm._internal.common.utils.download_utils import download_model_files
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

from quickchange_server.errors import UnavailableError, UnknownModelError

CONFIGS = ("adapter_config.json", "config.json")  # PEFT's; that of Turbo heads alone
PAUSE_SECONDS = 1.0  # before the next try; twice as long each time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraBucket:
    """A folder for each id, at `lora_config.dynamic_lora_loading_path`."""

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


def lora_bucket(config: LLMConfig) -> LoraBucket | None:
    """The bucket of the configuration's adapters; None where it has none."""
    lora = config.lora_config
    if lora is None or lora.dynamic_lora_loading_path is None:
        return None
    return LoraBucket(
        lora.dynamic_lora_loading_path, lora.download_timeout_s, lora.max_download_tries
    )


def local_model(config: LLMConfig) -> str:
    """The model's folder, file or hub id; a mirror in a bucket is copied here first."""
    source = config.model_loading_config.model_source or config.model_id
    if isinstance(source, str) and not is_remote_path(source):
        return source
    mirror = CloudMirrorConfig(bucket_uri=source) if isinstance(source, str) else source
    return str(download_model_files(model_id=config.model_id, mirror_config=mirror))
