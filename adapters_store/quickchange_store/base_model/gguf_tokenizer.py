"""The tokenizer, chat template and end tokens that a GGUF file holds.

transformers builds the tokenizer. A byte-level one also needs the rule by which text is cut before
merging, which the file only names (`tokenizer.ggml.pre`): where neither transformers nor this
module knows the name, other tokens than the model's own would come out, so it is refused. A
`tokenizer.json` beside the file is taken in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quickchange_store.base_model.gguf_file import gguf_errors, gguf_metadata
from quickchange_store.errors import BaseModelError

BESIDE = "tokenizer.json"
_FIELD = "tokenizer.ggml"
# Rules by their names in llama.cpp: GPT-2's own, and GPT-2's after every digit is cut off.
_AS_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "granite-docling", "trillion"})
_SINGLE_DIGITS = frozenset(
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"}
)
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end an answer though no field says so; llama.cpp knows them by their text too.
_END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|return|>", "<|call|>", "<turn|>", "<|END_OF_TURN_TOKEN|>"),
    }
)


def gguf_tokenizer(path: Path) -> tuple[Any, int, frozenset[int]]:
    """The tokenizer, the vocabulary's size and the ids that end a generation.

    Raises BaseModelError, OSError or ValueError.
    """
    from transformers import PreTrainedTokenizerFast

    fields, _ = gguf_metadata(path)
    if f"{_FIELD}.tokens" not in fields:
        raise BaseModelError(
            f"{path.name!r} holds no tokenizer",
            file=path.name,
            key=f"{_FIELD}.tokens",
            remedy=f"put the model's {BESIDE} beside it",
        )
    beside = (path.parent / BESIDE).is_file()
    options = {} if beside else {"gguf_file": path.name}
    with gguf_errors(path):
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path.parent), **options)
    if not beside:
        _cut_as_named(path, fields, tokenizer)
    template = fields.get("tokenizer.chat_template")
    if template is not None and not tokenizer.chat_template:
        tokenizer.chat_template = template
    named = {fields.get(f"{_FIELD}.{end}") for end in _ENDS}
    size = int(
        fields.get(f"{fields['general.architecture']}.vocab_size", fields[f"{_FIELD}.tokens"])
    )
    known = tokenizer.added_tokens_decoder.items()
    ends = {
        id_ for id_, token in known if token.special and token.content in _END_TEXTS and id_ < size
    }
    return tokenizer, size, frozenset(ends | {int(end) for end in named if end is not None})


def _cut_as_named(path: Path, fields: dict[str, Any], tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    name = fields.get(f"{_FIELD}.pre", "default")
    known = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS.keys() | _AS_GPT2
    if fields.get(f"{_FIELD}.model") != "gpt2" or name in known:
        return
    if name not in _SINGLE_DIGITS:
        raise BaseModelError(
            f"{path.name!r} cuts its text in a way that is not known here: {name!r}",
            file=path.name,
            key=f"{_FIELD}.pre",
            remedy=f"put the model's {BESIDE} beside it",
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
