"""PEFT adapters of small models with more tokens than their base, saved with their tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY, make_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]
END = VOCABULARY - 1  # ends a text of the base
ADDED = ("<tool>", "</tool>", "<|done|>")  # the first of them is id VOCABULARY
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
OWN_TEMPLATE = "{% for m in messages %}<tool>{{ m.content }}</tool>{% endfor %}"


def small_tokenizer(fewer: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE of as many tokens as the small models have: printable characters, a space, a
    line's end, and a mark. fewer: so many rows of the model are spare."""
    pieces = [*PRINTABLE[fewer:], "Ġ", "Ċ", "<|end|>"]
    assert len(pieces) == VOCABULARY - fewer
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


def grown_tokenizer(end: bool = False, fewer: int = 0) -> PreTrainedTokenizerFast:
    """The same with ADDED, and a chat template of its own. end: a text ends with the last one."""
    made = small_tokenizer(fewer)
    made.add_tokens([AddedToken(token, special=token == "<|done|>") for token in ADDED])
    made.chat_template = OWN_TEMPLATE
    if end:
        made.eos_token = ADDED[-1]
    return made


def save_base(family: str, folder: Path, fewer: int = 0) -> Path:
    """A small model with a tokenizer."""
    make_model(family).save_pretrained(folder)
    small_tokenizer(fewer).save_pretrained(folder)
    return folder


def train_grown(
    base: Path,
    folder: Path,
    config: LoraConfig,
    *,
    seed: int = 1,
    padded: int | None = None,
    grow: bool = True,
    fewer: int = 0,
) -> PeftModel:
    """A random adapter of the model with ADDED, saved in `folder` with its tokenizer.

    padded: the number of rows is a multiple of it. grow: False: no token is added, and no tokenizer
    saved. fewer: tokens that the base's tokenizer lacks.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers explains how it fills rows; PEFT, tying
        if grow:
            model.resize_token_embeddings(
                VOCABULARY - fewer + len(ADDED), pad_to_multiple_of=padded, mean_resizing=False
            )
        with torch.no_grad():
            for end in (model.get_input_embeddings(), model.get_output_embeddings()):
                torch.nn.init.normal_(end.weight[VOCABULARY - fewer :], std=0.6)  # often the best
        trained = get_peft_model(model, config).eval()
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.25)
            elif parameter.requires_grad:  # whole rows
                parameter.data += torch.randn_like(parameter) * 0.2
        trained.save_pretrained(folder)
    if grow:
        grown_tokenizer(fewer=fewer).save_pretrained(folder)
    return trained
