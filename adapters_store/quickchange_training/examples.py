"""Training examples: JSONL to text, text to token ids, token ids to batches.

An example is tokenised as the server tokenises it: the prompt by itself (through the chat template
where there is one, generation prompt included), then the completion's tokens and eos, so that the
boundary between the two is where sampling begins. Knows nothing of models or of LoRA.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from quickchange_training.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant")
_BUCKET_BATCHES = 16  # batches that are cut from one window of examples sorted by length
Item = TypeVar("Item")
IGNORED = -100  # label of a position that carries no loss


@dataclass(frozen=True)
class Example:
    """A conversation, or a bare prompt, and the answer to learn."""

    prompt: str | tuple[dict[str, str], ...]  # a bare prompt, or messages with role and content
    completion: str
    origin: str  # "FILE line N", for messages


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt, completion and eos; the loss falls on those from `prompt_length` on."""

    tokens: tuple[int, ...]
    prompt_length: int  # at least 1

    @property
    def answer_length(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class TrainingBatch:
    """One right-padded batch; `first` is the first position whose logits carry loss.

    tokens, mask [B, T] int64. labels [B, T - first] int64: the token that position `first + i` must
    predict, IGNORED in the prompt, in the padding and at the last position.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    first: int


def read_examples(file: Path) -> list[Example]:
    """Examples of a JSONL file of {"prompt", "completion"} or {"messages": [...]}, one a line.

    In a conversation the last message must be the assistant's; it alone is learned. Blank lines are
    skipped. Raises DataError at the first bad line.
    """
    return _read_lines(file, lambda line, origin: _parsed(_object(line, origin), origin))


def read_prompts(file: Path) -> list[Example]:
    """Prompts of a JSONL file: as `read_examples`, but completions may be missing.

    {"prompt"} alone, or a conversation that ends with the user's message, gives an empty
    completion. Raises DataError at the first bad line.
    """
    return _read_lines(file, _asked)


def _asked(line: str, origin: str) -> Example:
    value = _object(line, origin)
    if value.keys() == {"prompt"}:
        return Example(_text(value, "prompt", origin), "", origin)
    messages = value.get("messages")
    if value.keys() == {"messages"} and isinstance(messages, list) and messages:
        last = messages[-1]
        if isinstance(last, dict) and last.get("role") == "user":
            return Example(tuple(_checked_messages(messages, origin)), "", origin)
    return _parsed(value, origin)


def _read_lines(file: Path, parse: Callable[[str, str], Example]) -> list[Example]:
    """Parse each line that is not blank, with its origin."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    examples = [
        parse(line, f"{file} line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not examples:
        raise DataError(f"{file}: holds no examples; write one JSON object a line")
    return examples


def _object(line: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a JSON object is expected, not {type(value).__name__}")
    return value


def _parsed(value: dict[str, Any], origin: str) -> Example:
    keys = value.keys()
    if keys == {"prompt", "completion"}:
        prompt, completion = _text(value, "prompt", origin), _text(value, "completion", origin)
        return Example(prompt, completion, origin)
    if keys == {"messages"}:
        return _conversation(value["messages"], origin)
    raise DataError(
        f'{origin}: has the fields {sorted(keys)}; give either "prompt" and "completion" '
        'or "messages" alone'
    )


def _text(value: dict[str, Any], name: str, origin: str, where: str = "") -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise DataError(f'{origin}: field "{where}{name}" must be text that is not empty')
    return text


def _conversation(messages: object, origin: str) -> Example:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f'{origin}: field "messages" must be a list of two or more messages')
    checked = _checked_messages(messages, origin)
    last = checked.pop()
    if last["role"] != "assistant":
        raise DataError(
            f"{origin}: the last message's role is {last['role']}; it must be assistant, since "
            "that message is what is learned"
        )
    return Example(tuple(checked), last["content"], origin)


def _checked_messages(messages: list[Any], origin: str) -> list[dict[str, str]]:
    checked = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise DataError(f'{origin}: field "{where}" must be an object with role and content')
        role = message.get("role")
        if role not in _ROLES:
            raise DataError(f'{origin}: field "{where}.role" must be one of {", ".join(_ROLES)}')
        content = _text(message, "content", origin, f"{where}.")
        checked.append({"role": role, "content": content})
    return checked


def split(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split into (learned, held out), in order, by a random choice of seed and count alone."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    held_out = set(order[: int(share * len(items))])
    learned = [item for i, item in enumerate(items) if i not in held_out]
    return learned, [items[i] for i in sorted(held_out)]


def as_chat(examples: Iterable[Example]) -> list[Example]:
    """Examples with bare prompts turned into user messages; conversations stay."""
    return [
        Example(({"role": "user", "content": e.prompt},), e.completion, e.origin)
        if isinstance(e.prompt, str)
        else e
        for e in examples
    ]


def encode_prompt(
    prompt: str | Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a prompt: bare text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """Token ids of every example. Raises DataError for one that is longer than `max_length`."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no eos token, so an adapter could never learn to stop")
    return [_encode_one(example, tokenizer, int(eos), max_length) for example in examples]


def _encode_one(
    example: Example, tokenizer: PreTrainedTokenizerBase, eos: int, max_length: int
) -> Encoded:
    prompt = encode_prompt(example.prompt, tokenizer)
    if not prompt:
        raise DataError(f"{example.origin}: the prompt has no tokens")
    answer = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    tokens = (*prompt, *answer, eos)
    if len(tokens) > max_length:
        raise DataError(
            f"{example.origin}: {len(tokens)} tokens, more than {max_length}; shorten it or raise "
            "--max-length"
        )
    return Encoded(tokens, len(prompt))


def batches(encoded: Sequence[Encoded], size: int, rng: random.Random) -> list[list[Encoded]]:
    """One epoch in random order, in batches of examples of like length (little padding)."""
    order = list(encoded)
    rng.shuffle(order)
    window = size * _BUCKET_BATCHES
    result = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda e: len(e.tokens))
        result += [near[i : i + size] for i in range(0, len(near), size)]
    rng.shuffle(result)
    return result


def collate(group: Sequence[Encoded], pad_id: int) -> TrainingBatch:
    """One batch of tensors. Positions before `first` need no logits: the LM head is spared."""
    longest = max(len(e.tokens) for e in group)
    first = min(e.prompt_length for e in group) - 1
    tokens = torch.full((len(group), longest), pad_id)  # [B, T]
    mask = torch.zeros(len(group), longest, dtype=torch.int64)
    labels = torch.full((len(group), longest), IGNORED)
    for row, e in enumerate(group):
        ids = torch.tensor(e.tokens)
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        labels[row, e.prompt_length - 1 : len(ids) - 1] = ids[e.prompt_length :]
    return TrainingBatch(tokens, mask, labels[:, first:].contiguous(), first)


FEW_EXAMPLES = 2000


def few_examples(count: int) -> list[str]:
    """A warning where there are few examples to train on."""
    if count >= FEW_EXAMPLES:
        return []
    return [
        f"{count} examples: with fewer than {FEW_EXAMPLES} an adapter tends to learn them by "
        "heart; compare its held-out loss with its training loss, and gather more if they differ"
    ]
