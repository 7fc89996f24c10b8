"""Where a base model lies and which transformers class is its language model.

A base is a folder in transformers' layout, a hub id, or one GGUF file: `FILE.gguf`, or
`OWNER/NAME:FILE.gguf` on the hub. Of a checkpoint that also sees or hears, the language model alone
is made: its towers take neither memory nor time.

Knows nothing of adapters or of serving.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.errors import BaseModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_ON_HUB = re.compile(r"(?P<where>[^/:]+/[^/:]+):(?P<file>.+\.gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class BaseSource:
    """A folder or hub id, and the GGUF file in it if the base is one."""

    where: str
    gguf_file: str | None = None

    @classmethod
    def of(cls, model: str | Path) -> BaseSource:
        """Read what `--model` takes. Raises BaseModelError for a GGUF file that isn't there."""
        text = str(model)
        if not text.lower().endswith(".gguf") or Path(text).is_dir():
            return cls(text)
        on_hub = _ON_HUB.fullmatch(text)
        if on_hub is not None and not Path(text).exists():
            return cls(on_hub["where"], on_hub["file"])
        file = Path(text).expanduser()
        if not file.is_file():
            raise BaseModelError(
                f"there is no file {text!r}",
                file=file.name,
                remedy="give the path of a GGUF file, or OWNER/NAME:FILE.gguf for one on the hub",
            )
        return cls(str(file.parent), file.name)

    @property
    def options(self) -> dict[str, str]:
        """What transformers' `from_pretrained` needs beside `where`."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    @property
    def gguf_path(self) -> Path | None:
        """The GGUF file on this machine, fetched from the hub where it lies there."""
        if self.gguf_file is None:
            return None
        local = Path(self.where) / self.gguf_file
        if local.is_file():
            return local
        from transformers.utils.hub import cached_file

        return Path(str(cached_file(self.where, self.gguf_file)))

    def config(self) -> PretrainedConfig:
        """The model's configuration. Raises BaseModelError where there is none to be served."""
        try:
            return self._config()
        except BaseModelError:
            raise
        except Exception as error:  # validation's, the hub's and JSON's errors are of many classes
            raise self._unreadable(error) from error

    def _config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        if self.gguf_path is not None:
            from quickchange_store.base_model.gguf_file import gguf_config

            changed = self.gguf_path.stat().st_mtime_ns
            return copy.deepcopy(gguf_config(self.gguf_path, changed))
        # Always given: without it, transformers asks on a terminal whether to run a model's code.
        return AutoConfig.from_pretrained(self.where, trust_remote_code=False)

    def _unreadable(self, error: Exception) -> BaseModelError:
        """What is wrong with a base whose configuration transformers can't read."""
        folder = Path(self.where)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            return BaseModelError(
                f"{self.where!r} is an adapter, not a base model",
                file="adapter_config.json",
                remedy="serve the base that it was trained on, and add this to the store with "
                "`quickchange adapters add`",
            )
        said = " ".join(str(error).split())
        if "trust_remote_code" in said:
            return BaseModelError(
                f"{self.where!r} needs custom code, which is not run",
                file="config.json",
                key="auto_map",
                remedy="use a model of a type that transformers has itself",
            )
        return BaseModelError(
            f"{self.where!r} has no configuration that transformers can read ({said[:400]})",
            file="config.json",
            remedy="give a folder in transformers' layout, a GGUF file, or the id of a model in "
            "the hub's cache",
        )


def base_name(model: str | Path) -> str:
    """The name under which a base is served: its folder's or file's, else its hub id."""
    path = Path(model)
    if path.is_dir():
        return path.resolve().name
    return Path(str(model).rpartition(":")[2]).stem if str(model).endswith(".gguf") else str(model)


def language_model(config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class that makes a configuration's language model, and the configuration it takes.

    Raises ValueError where transformers has none.
    """
    from transformers.models.auto import modeling_auto

    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )
    found = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    text = config.sub_configs.get("text_config")
    aside = type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if found is None or (aside and (text is None or config.is_encoder_decoder)):
        raise ValueError(
            f"transformers has no class that makes text for model type {config.model_type!r}"
        )
    if isinstance(found, tuple):
        named = [each for each in found if each.__name__ in (config.architectures or ())]
        found = (named or found)[0]
    if text is None or config.get_text_config() is config:
        return found, config
    if found.config_class is text:
        own = config.get_text_config()
        if getattr(config, "quantization_config", None) is not None:
            own.quantization_config = config.quantization_config
        return found, own
    return _without_towers(found), config


@lru_cache
def _without_towers(whole: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A multimodal class that keeps the modules of its language model alone, under their names."""

    def init(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        dropped = _drop_towers(self)
        known = getattr(self, "_keys_to_ignore_on_load_unexpected", None) or ()
        patterns = {rf"(^|\.){re.escape(name)}\." for name in dropped}
        self._keys_to_ignore_on_load_unexpected = {*known, *patterns}

    body = {"__init__": init, "__module__": whole.__module__, "__qualname__": whole.__qualname__}
    return type(whole.__name__, (whole,), body)


def text_modules(model: PreTrainedModel) -> set[nn.Module]:
    """The modules that text passes through: all, or a multimodal model's decoder and ends."""
    if model.config.get_text_config() is model.config:
        return set(model.modules())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {*model.get_decoder().modules(), *(end for end in ends if end is not None)}


def _drop_towers(model: PreTrainedModel) -> list[str]:
    """Remove whole models beside the language model; returns their names in their parents."""
    from transformers import PreTrainedModel

    text = text_modules(model)
    dropped = []
    for parent in [module for module in model.modules() if module not in text]:
        for name, child in list(parent.named_children()):
            if isinstance(child, PreTrainedModel) and text.isdisjoint(child.modules()):
                setattr(parent, name, None)
                dropped.append(name)
    return dropped
