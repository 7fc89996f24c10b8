"""Generation of a request's choices: the engine's deltas become pieces of text.

A choice is one sequence in the engine with its transcript. Knows nothing of HTTP or of admission.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from itertools import starmap

from quickchange_server.engine_client.client import DeltaStream
from quickchange_server.errors import QuickchangeError, UnavailableError
from quickchange_server.frontend.output_processor import Piece, Transcript
from quickchange_server.frontend.request_observers import Account, Ending, TokenRecord
from quickchange_server.protocol import Delta, TokenLogprobs


class Choice:
    """One sequence of a request: its transcript, and the engine's figures for it."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self.queue_seconds = 0.0  # arrival in the engine to its first step
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # if requested; with the first piece
        self.embedding: bytes | None = None  # if requested; with the last piece

    @property
    def completion_tokens(self) -> int:
        return self._transcript.completion_tokens

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._transcript.stopped_by

    @property
    def drafted_tokens(self) -> int:
        return self._transcript.drafted_tokens

    @property
    def accepted_tokens(self) -> int:
        return self._transcript.accepted_tokens

    def tokens_within(self, spans: Iterable[tuple[int, int]]) -> int:
        """Tokens whose text begins in one of these parts of the text, in characters: from, to."""
        return sum(starmap(self._transcript.tokens_within, spans))

    def push(self, delta: Delta) -> Piece:
        """Add a delta. Raises UnavailableError if it cuts the sequence off."""
        if delta.queue_seconds is not None:
            self.queue_seconds = delta.queue_seconds
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.embedding = delta.embedding
        piece = self._transcript.push(delta)
        if delta.finish_reason is not None and piece.ending is None:
            raise UnavailableError("the generation was cut off; send the request again")
        return piece


class Generation:
    """An admitted request: its choices, `per_prompt` for each prompt, and its account."""

    def __init__(
        self,
        stream: DeltaStream,
        transcripts: Sequence[Transcript],
        account: Account,
        per_prompt: int = 1,
        record: TokenRecord | None = None,
    ) -> None:
        """`record`: gets the first choice's tokens; None: nobody wants them."""
        self._stream = stream
        self._per_prompt = per_prompt
        self.choices = tuple(map(Choice, transcripts))
        self.account = account
        self._record = record

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache, each prompt counted once."""
        return sum(choice.cached_tokens for choice in self.choices[:: self._per_prompt])

    @property
    def queue_seconds(self) -> float:
        """Seconds from arrival in the engine to the first step of any choice; 0 before that."""
        begun = (choice.queue_seconds for choice in self.choices if choice.queue_seconds)
        return min(begun, default=0.0)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def drafted_tokens(self) -> int:
        """Draft tokens verified by the base model."""
        return sum(choice.drafted_tokens for choice in self.choices)

    @property
    def accepted_tokens(self) -> int:
        """Completion tokens that came from accepted drafts."""
        return sum(choice.accepted_tokens for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all choices in the order they come, each with its choice's index.

        The last piece of a choice has an ending; empty pieces are left out. An error of one choice
        ends all. Closing the iterator cancels what still runs. The account is kept and ended here.
        """
        running = set(range(len(self.choices)))
        endings: set[str] = set()
        try:
            while running:
                index, delta = await self._stream.receive()
                if index not in running:  # sent before its stop string was found
                    continue
                if isinstance(delta, QuickchangeError):
                    raise delta
                piece = self.choices[index].push(delta)
                if index == 0 and self._record is not None:
                    self._record.add(piece.ids)
                if piece.ending is not None:
                    self._stream.stop(index)  # only a stop string leaves the sequence running
                    endings.add(piece.ending)
                    running.remove(index)
                elif not (piece.text or piece.tokens):
                    continue
                self.account.token()
                yield index, piece
        except QuickchangeError:
            self._end("failed")
            raise
        except BaseException:
            self._end("cancelled")
            raise
        self._end("length" if "length" in endings else "stop")
        if self._record is not None:
            self._record.keep()

    def close(self) -> None:
        """Cancel what still runs."""
        self._end("cancelled")

    def _end(self, ending: Ending) -> None:
        self._stream.close()
        self.account.end(ending, self)
