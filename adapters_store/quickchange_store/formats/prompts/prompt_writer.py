"""Writer of virtual tokens as PEFT's prompt tuning or prefix tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quickchange_store.canonical.prompt_part import VirtualPrompt
from quickchange_store.formats.config_file import BASE_NAME, CONFIG_FILE
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.prompts.prompt_reader import PROMPT
from quickchange_store.formats.tensors import copied, save_tensors


def write_prompt(prompt: VirtualPrompt, directory: Path, base_name: str) -> None:
    """Write the folder of a PROMPT_TUNING or PREFIX_TUNING adapter into `directory`."""
    values = prompt.values
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        BASE_NAME: base_name,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.tokens,
    }
    if prompt.form == "embeddings":
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": values.shape[1]}
    else:
        layers, _, heads, tokens, size = values.shape
        values = values.permute(3, 0, 1, 2, 4).reshape(tokens, -1)
        config |= {
            "peft_type": "PREFIX_TUNING",
            "num_layers": layers,
            "num_attention_heads": heads,
            "token_dim": heads * size,
        }
    save_tensors({PROMPT: copied(values)}, directory / WEIGHTS_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
