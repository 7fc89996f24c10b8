"""The tokens that activate an aLoRA, from PEFT's `alora_invocation_tokens`.

PEFT activates updates of linear modules alone. What else a folder may hold (trained biases, rows or
whole modules) it applies to all of the text, which no adapter that begins at its invocation does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.canonical.stored_parts import Invocation
from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE, invalid, is_set
from quickchange_store.formats.imported import Imported

TOKENS = "alora_invocation_tokens"
_REMEDY = "give the token ids that call the adapter, as PEFT's LoraConfig has them"
_OF_ALL_TEXT = ("modules_to_save", "trainable_token_indices", "target_parameters", "use_dora")


@dataclass(frozen=True)
class InvokedConfig:
    """What a LoRA's configuration says of its activation, and the configuration without it."""

    config: Mapping[str, Any]
    invocation: Invocation | None

    def joined(self, imported: Imported, base: BaseSpec) -> Imported:
        """What was imported by that configuration, activated. Raises UnsupportedFeatureError."""
        if self.invocation is None:
            return imported
        for path in imported.adapter.updates:
            if path not in base.modules or base.modules[path].kind != "linear":
                raise UnsupportedFeatureError(
                    "PEFT activates updates of linear modules alone",
                    file=CONFIG_FILE,
                    key=path,
                    remedy="train it without this module",
                )
        return replace(imported, adapter=replace(imported.adapter, invocation=self.invocation))


def take_invocation(config: Mapping[str, Any]) -> InvokedConfig:
    """Take the invocation, if any, of a LoRA. Raises StoreError, naming the field."""
    given = config.get(TOKENS)
    if not is_set(given):
        return InvokedConfig(config, None)
    if not isinstance(given, list) or any(isinstance(token, bool) for token in given):
        raise invalid(TOKENS, given, _REMEDY)
    whole = [name for name in _OF_ALL_TEXT if is_set(config.get(name))]
    if config.get("bias", "none") != "none":
        whole.append("bias")
    if whole:
        raise UnsupportedFeatureError(
            f"with {TOKENS} it would change the text before the invocation too",
            file=CONFIG_FILE,
            key=whole[0],
            remedy="train the aLoRA without it",
        )
    try:
        invocation = Invocation(tuple(given))
    except InvalidAdapterError as error:
        raise InvalidAdapterError(
            error.problem, file=CONFIG_FILE, key=TOKENS, remedy=error.remedy
        ) from error
    without = {name: value for name, value in config.items() if name != TOKENS}
    return InvokedConfig(without, invocation)
