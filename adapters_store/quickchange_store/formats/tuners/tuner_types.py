"""What becomes of each of PEFT's types: served exactly, approximately on request, or refused.

Every member of PEFT's PeftType is in exactly one of `EXACT`, `ON_REQUEST` and `REFUSED`. Knows
nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.rank_limits import APPROXIMATE_REMEDY


@dataclass(frozen=True, slots=True)
class Tuner:
    """What is known of PEFT's layers of a type.

    shared: modules share vectors or are numbered, so that all are built at once. weighs: the update
    depends on the base's weight.
    """

    shared: bool = False
    weighs: bool = False


EXACT: Mapping[str, Tuner] = {
    "ADALORA": Tuner(),
    "BEFT": Tuner(),
    "CARTRIDGE": Tuner(),
    "CPT": Tuner(),
    "DEFT": Tuner(weighs=True),
    "DELORA": Tuner(weighs=True),
    "GRALORA": Tuner(),
    "HRA": Tuner(weighs=True),
    "IA3": Tuner(),
    "LN_TUNING": Tuner(),  # has a reader of its own
    "LOHA": Tuner(),
    "LOKR": Tuner(),
    "LORA": Tuner(weighs=True),  # kinds that the reader of plain LoRA has not
    "MISS": Tuner(weighs=True),
    "MULTITASK_PROMPT_TUNING": Tuner(),
    "PREFIX_TUNING": Tuner(),
    "PROMPT_TUNING": Tuner(),
    "PSOFT": Tuner(weighs=True),
    "PVERA": Tuner(shared=True),
    "P_TUNING": Tuner(),
    "TINYLORA": Tuner(shared=True),
    "TRAINABLE_TOKENS": Tuner(weighs=True),
    "UNILORA": Tuner(shared=True),
    "VBLORA": Tuner(shared=True),
    "VERA": Tuner(shared=True),
}
ON_REQUEST: Mapping[str, Tuner] = {
    "BOFT": Tuner(weighs=True),
    "C3A": Tuner(),
    "FOURIERFT": Tuner(),
    "FROD": Tuner(shared=True, weighs=True),
    "GLORA": Tuner(weighs=True),
    "HIRA": Tuner(weighs=True),
    "OFT": Tuner(weighs=True),
    "OSF": Tuner(weighs=True),
    "PEANUT": Tuner(weighs=True),
    "RANDLORA": Tuner(shared=True),
    "ROAD": Tuner(weighs=True),
    "SHIRA": Tuner(),
    "SUPERTUNING": Tuner(weighs=True),
    "WAVEFT": Tuner(),
}
_NO_UPDATE = "train a LoRA (peft_type LORA) instead"
REFUSED: Mapping[str, tuple[str, str]] = {  # why, and what to do
    "ADAMSS": (
        "its subspaces come from a clustering of the base's weights, which PEFT does again at "
        "every load with a library that is not part of this server",
        "merge it into the base with PEFT (merge_and_unload), or train a LoRA instead",
    ),
    "ADAPTION_PROMPT": ("it adds prompts within the attention of single layers", _NO_UPDATE),
    "LILY": (
        "it mixes its experts by the mean over a whole batch, so its output depends on what else "
        "is in the batch",
        _NO_UPDATE,
    ),
    "POLY": ("it mixes its skills by a task id, which a request does not have", _NO_UPDATE),
    "SHADOW": ("it runs a second network beside the base", _NO_UPDATE),
    "XLORA": (
        "it mixes its LoRAs by a network that reads each prompt",
        "add its LoRAs one by one, and give their weights in the request (`adapters`)",
    ),
}


def tuner_of(kind: object, *, on_request: bool) -> Tuner:
    """The reading of layers of PEFT's type `kind`.

    on_request: an approximation is asked for. Raises InvalidAdapterError where there is no type,
    UnsupportedFeatureError where it is not served, with the reason and the remedy.
    """
    if kind is None:
        raise InvalidAdapterError(
            "the field is missing",
            file=CONFIG_FILE,
            key="peft_type",
            remedy='set it to PEFT\'s name of the type, as "LORA"',
        )
    if isinstance(kind, str) and kind in EXACT:
        return EXACT[kind]
    if isinstance(kind, str) and kind in ON_REQUEST:
        if on_request:
            return ON_REQUEST[kind]
        raise UnsupportedFeatureError(
            f"updates of {kind} have full rank and are not served exactly",
            file=CONFIG_FILE,
            key="peft_type",
            remedy=APPROXIMATE_REMEDY,
        )
    why, remedy = ("this type is not known", "use one of PEFT's types: " + ", ".join(EXACT))
    if isinstance(kind, str) and kind in REFUSED:
        why, remedy = REFUSED[kind]
    raise UnsupportedFeatureError(
        f"{kind!r} is not supported: {why}", file=CONFIG_FILE, key="peft_type", remedy=remedy
    )
