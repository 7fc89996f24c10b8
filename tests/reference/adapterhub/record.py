"""Records what AdapterHub's `adapters` library answers with bottleneck adapters of every form.

The library needs another transformers than the project does, so it runs apart, once, and its
answers are kept in answers.json beside this file. From the repository's root:

    pip install --target OTHER --no-deps adapters==1.3.0 transformers==4.57.6 "huggingface_hub<1"
    PYTHONPATH=OTHER:tests/support python tests/reference/adapterhub/record.py
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from formula_weights import fill, formula_tensor
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = 10
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
STD = 0.3
# Llama's layers are the library's own; Qwen 2's and Gemma 2's are transformers', with hooks.
FORMS: dict[str, dict[str, BnConfig]] = {
    "llama": {
        "houlsby": DoubleSeqBnConfig(reduction_factor=4),
        "pfeiffer": SeqBnConfig(reduction_factor={"0": 2, "default": 6}),
        "everywhere-but-layer-1": SeqBnConfig(
            reduction_factor=6, mh_adapter=True, non_linearity="gelu", leave_out=[1]
        ),
        "parallel": ParBnConfig(reduction_factor=3),
        "parallel-learned-scale": ParBnConfig(
            reduction_factor=3, scaling="learned", mh_adapter=True, non_linearity="gelu_new"
        ),
        "scale-by-channel": DoubleSeqBnConfig(
            reduction_factor=5, scaling="channel", non_linearity="tanh"
        ),
        "residual-inside": BnConfig(
            mh_adapter=True,
            output_adapter=True,
            reduction_factor=8,
            non_linearity="relu",
            original_ln_before=True,
            original_ln_after=False,
            residual_before_ln=False,
        ),
        "one-wide": DoubleSeqBnConfig(reduction_factor=100, non_linearity="silu"),
        "linear": DoubleSeqBnConfig(reduction_factor=4, non_linearity="linear", scaling=0.5),
    },
    "qwen2": {
        "houlsby": DoubleSeqBnConfig(reduction_factor=4),
        "pfeiffer": SeqBnConfig(reduction_factor=6),
        "pfeiffer-everywhere": SeqBnConfig(reduction_factor=6, mh_adapter=True),
        "parallel": ParBnConfig(reduction_factor=3, mh_adapter=True),
    },
    "gemma2": {
        "houlsby": DoubleSeqBnConfig(reduction_factor=4),
        "parallel": ParBnConfig(reduction_factor=3, mh_adapter=True),
    },
}


def record(family: str, name: str, form: BnConfig, folder: Path) -> Mapping[str, Any]:
    """One adapter as the library saves it (its tensors' shapes alone), and the answers with it."""
    config = AutoConfig.for_model(family, **SIZES, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    fill(model, STD)
    adapters.init(model)
    model.add_adapter(name, config=form)
    model.set_active_adapters(name)
    model.save_adapter(str(folder), name, use_safetensors=True, with_head=False)
    tensors = load_file(folder / "adapter.safetensors")
    shapes = {key: list(tensor.shape) for key, tensor in sorted(tensors.items())}
    filled = {key: formula_tensor(key, tuple(shape), STD) for key, shape in shapes.items()}
    save_file(filled, folder / "adapter.safetensors")
    model.load_adapter(str(folder), load_as=name, use_safetensors=True, set_active=True)
    model.eval()
    generator = random.Random(7)
    answers = []
    for _ in range(3):
        prompt = [generator.randrange(SIZES["vocab_size"]) for _ in range(generator.randint(2, 20))]
        answers.append({"prompt": prompt, "tokens": _greedy(model, prompt)})
    return {
        "config": json.loads((folder / "adapter_config.json").read_text()),
        "shapes": shapes,
        "answers": answers,
    }


@torch.inference_mode()
def _greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(TOKENS):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def main() -> None:
    """Write answers.json."""
    recorded: dict[str, Any] = {"sizes": SIZES, "std": STD, "families": {}}
    for family, forms in FORMS.items():
        recorded["families"][family] = {}
        for name, form in forms.items():
            with tempfile.TemporaryDirectory() as folder:
                recorded["families"][family][name] = record(family, name, form, Path(folder))
    target = Path(__file__).with_name("answers.json")
    target.write_text(json.dumps(recorded, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
