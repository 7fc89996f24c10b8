"""Training data of Turbo heads: prompts, the model's own greedy outputs, its hidden states.

The caller gives the function that makes outputs: this module knows nothing of engines. Outputs are
kept on disk as they come, so that an interrupted run can resume.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Protocol

import torch

from quickchange_training.errors import DataError
from quickchange_training.examples import Example, as_chat, encode_prompt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ABSENT = -1  # token id behind the output's end
SHORT_OUTPUT = 10  # tokens
_OUTPUTS, _STATES = "outputs.jsonl", "states.bin"
_OWN_SHARE = 0.5  # least share of the given completions that the model says itself


class OnOutput(Protocol):
    """Callback for one prompt's output as it ends."""

    def __call__(self, index: int, tokens: Sequence[int], states: Tensor, /) -> None:
        """states [tokens, H]: what entered the LM head for each of the tokens."""
        ...


Generate = Callable[[Sequence[Sequence[int]], OnOutput], None]
"""Makes the model's greedy outputs to prompts, in any order of their ends."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and the completion that the data gave for it, if it did."""

    tokens: tuple[int, ...]
    completion: tuple[int, ...]  # empty: none was given
    origin: str  # "FILE line N"


@dataclass(frozen=True)
class OwnOutput:
    """The model's output to a prompt, end-of-sequence token included where it was reached."""

    tokens: tuple[int, ...]
    states: Tensor  # bfloat16 [tokens, H]: what entered the LM head for each of them


@dataclass(frozen=True)
class Positions:
    """Training rows, one per output token: the heads' input and the tokens to draft.

    states [N, H]: what entered the LM head for the row's first token. tokens int64 [N, depth + 1]:
    that token and those after it, ABSENT behind the output's end.
    """

    states: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.states)


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, chat: bool, longest: int
) -> list[Prompt]:
    """Token ids of the prompts. Raises DataError for one that has none or more than `longest`."""
    prompts = []
    for example in as_chat(examples) if chat else examples:
        tokens = tuple(encode_prompt(example.prompt, tokenizer))
        if not 0 < len(tokens) <= longest:
            raise DataError(
                f"{example.origin}: the prompt has {len(tokens)} tokens; 1 to {longest} leave room "
                "for --max-new-tokens in --max-length"
            )
        answer = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(tokens, tuple(answer), example.origin))
    return prompts


class KeptOutputs:
    """Outputs made so far, in a folder: token ids per line, states in a second file.

    `key` identifies the model, recipe and prompts. Raises DataError where the folder holds outputs
    of another key.
    """

    def __init__(self, folder: Path, key: str, hidden: int) -> None:
        self._hidden = hidden
        self.found: dict[int, OwnOutput] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._whole_lines(folder, key)
        rows = self._read(folder / _STATES, lines)
        # Drop what a crash left half written: a line without newline, states without a line.
        self._lines = (folder / _OUTPUTS).open("w", encoding="utf-8")
        self._lines.writelines(json.dumps(line) + "\n" for line in [{"key": key}, *lines])
        self._states = (folder / _STATES).open("ab")
        self._states.truncate(rows * hidden * 2)

    def __enter__(self) -> KeptOutputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._states.close()

    def add(self, index: int, tokens: Sequence[int], states: Tensor) -> None:
        """Keep the output of prompt `index`: states first, so that a line has its states."""
        kept = states.to(torch.bfloat16)
        self._states.write(kept.contiguous().view(torch.uint8).numpy().tobytes())
        self._states.flush()
        self._lines.write(json.dumps({"index": index, "tokens": list(tokens)}) + "\n")
        self._lines.flush()
        self.found[index] = OwnOutput(tuple(tokens), kept)

    def _whole_lines(self, folder: Path, key: str) -> list[dict[str, Any]]:
        file = folder / _OUTPUTS
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        if lines and json.loads(lines[0]) != {"key": key}:
            raise DataError(
                f"{file}: outputs of another model, to other prompts or of another length; remove "
                "the folder to make them again"
            )
        return [json.loads(line) for line in lines[1:]]

    def _read(self, file: Path, lines: Sequence[dict[str, Any]]) -> int:
        """Read the states of `lines` and return their number of rows."""
        rows = 0
        raw = bytearray(file.read_bytes()) if lines else bytearray()
        states = torch.frombuffer(raw, dtype=torch.bfloat16) if raw else torch.empty(0)
        states = states[: len(states) // self._hidden * self._hidden].view(-1, self._hidden)
        for line in lines:
            tokens = tuple(line["tokens"])
            self.found[line["index"]] = OwnOutput(tokens, states[rows : rows + len(tokens)])
            rows += len(tokens)
        return rows


def own_outputs(
    prompts: Sequence[Prompt], generate: Generate, kept: KeptOutputs
) -> list[OwnOutput]:
    """The model's own greedy outputs, in the prompts' order; those in `kept` are not made again."""
    from tqdm import tqdm

    wanted = [i for i in range(len(prompts)) if i not in kept.found]
    done = len(prompts) - len(wanted)
    with tqdm(total=len(prompts), initial=done, desc="own outputs", unit="prompt") as bar:

        def keep(index: int, tokens: Sequence[int], states: Tensor) -> None:
            kept.add(wanted[index], tokens, states)
            bar.update()

        if wanted:
            generate([prompts[i].tokens for i in wanted], keep)
    return [kept.found[i] for i in range(len(prompts))]


def positions(outputs: Sequence[OwnOutput], depth: int) -> Positions:
    """The rows of all outputs, one after another."""
    return Positions(
        torch.cat([output.states for output in outputs]),
        torch.cat([_ahead(output.tokens, depth) for output in outputs]),
    )


def _ahead(tokens: Sequence[int], depth: int) -> Tensor:
    """[len(tokens), depth + 1]: each token and the `depth` after it."""
    padded = torch.tensor([*tokens, *[ABSENT] * depth])
    return padded.unfold(0, depth + 1, 1)


def draft_vocabulary(outputs: Sequence[OwnOutput], size: int, stop: frozenset[int]) -> Tensor:
    """int64, ascending: the `size` most frequent tokens of the outputs, stop tokens among them.

    Fewer where the outputs have fewer. Of equally frequent tokens the smaller ids come first.
    """
    said = torch.tensor([token for output in outputs for token in output.tokens])
    tokens, counts = torch.unique(said, return_counts=True)  # ascending
    counts[torch.isin(tokens, torch.tensor(sorted(stop), dtype=torch.int64))] = len(said) + 1
    best = counts.argsort(descending=True, stable=True)[:size]
    chosen: Tensor = tokens[best].sort().values
    return chosen


def widened(chosen: Tensor, start: Tensor, size: int) -> Tensor:
    """int64, ascending: the tokens `chosen` and, while there is room, those of `start`.

    There is room for `size` tokens, or for as many as `start` has. Lower ids, which tokenizers
    give to more frequent tokens, come first.
    """
    more = start[~torch.isin(start, chosen)].to(torch.int64)
    room = max(0, max(size, len(start)) - len(chosen))
    both: Tensor = torch.cat([chosen, more[:room]]).sort().values
    return both


def short_outputs(lengths: Sequence[int]) -> list[str]:
    """A warning where outputs are so short that drafting can save few steps."""
    if not lengths or mean(lengths) >= SHORT_OUTPUT:
        return []
    return [
        f"outputs have {mean(lengths):.1f} tokens on average: under {SHORT_OUTPUT} a request is "
        "mostly its prompt, and drafting can save little"
    ]


def not_its_own(
    prompts: Sequence[Prompt], outputs: Sequence[OwnOutput], stop: frozenset[int]
) -> list[str]:
    """A warning where the data's completions differ from the model's outputs."""
    given = [
        (prompt.completion, tuple(t for t in output.tokens if t not in stop))
        for prompt, output in zip(prompts, outputs, strict=True)
        if prompt.completion
    ]
    own = sum(completion == said for completion, said in given)
    if not given or own >= _OWN_SHARE * len(given):
        return []
    return [
        f"{len(given) - own} of {len(given)} completions in the data are not what the model says: "
        "heads learn from its own outputs instead; if the data is what it should say, train a "
        "LoRA on it first (quickchange train turbo-lora)"
    ]
