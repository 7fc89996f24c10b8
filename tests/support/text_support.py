"""Small tokenizers made on the spot: byte-level, SentencePiece-like, and Metaspace."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quickchange_server.frontend.detokenizer import byte_level_alphabet
from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.tokenizer import Text

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START, END = 256, 257


def byte_tokenizer(merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE: ids 0 to 255 are the bytes, 256 and 257 chat marks, then the merges."""
    vocabulary = {**byte_level_alphabet(), "<|im_start|>": START, "<|im_end|>": END}
    for left, right in merges or []:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges or []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def sentencepiece_tokenizer(strip: bool) -> PreTrainedTokenizerFast:
    """Like Llama 2's (strip) or Gemma's: "▁" for spaces, and a token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁a", "a", "b", "é", "日", "▁▁", "<0x1", "."]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A decoder that is none of the recognised: the window takes it."""
    pieces = ["<unk>", "</s>", "▁the", "▁a", "▁", "b", "c", "▁▁", "é"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def byte_text(template: str | None = CHAT_TEMPLATE, eos: frozenset[int] = frozenset({END})) -> Text:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Text(model_tokenizer(tokenizer), vocab_size=258, eos_ids=eos)
