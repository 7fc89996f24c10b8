"""A request's choices under way: from the engine's deltas to pieces of text.

A choice is one sequence in the engine with its transcript. Knows nothing of HTTP, and nothing of
how a request was admitted.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from quickchange_server.engine_client.client import DeltaStream
from quickchange_server.errors import QuickchangeError, UnavailableError
from quickchange_server.frontend.output_processor import Piece, Transcript
from quickchange_server.frontend.request_observers import Account, Ending
from quickchange_server.protocol import Delta, TokenLogprobs


class Choice:
    """One sequence's text, and what the engine has told beside it."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self.queue_seconds = 0.0  # from arrival in the engine to its first step
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        self.prompt_logprobs: tuple[
            TokenLogprobs, ...
        ] = ()  # where asked for; with the first piece
        self.embedding: bytes | None = None  # where asked for; with the last piece

    @property
    def completion_tokens(self) -> int:
        return self._transcript.completion_tokens

    @property
    def drafted_tokens(self) -> int:
        return self._transcript.drafted_tokens

    @property
    def accepted_tokens(self) -> int:
        return self._transcript.accepted_tokens

    def push(self, delta: Delta) -> Piece:
        """Add a delta. Raises UnavailableError where it ends the sequence before the text."""
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
    """An admitted request: its choices, `per_prompt` for each of its prompts, and its account."""

    def __init__(
        self,
        stream: DeltaStream,
        transcripts: Sequence[Transcript],
        account: Account,
        per_prompt: int = 1,
    ) -> None:
        self._stream = stream
        self._per_prompt = per_prompt
        self.choices = tuple(map(Choice, transcripts))
        self.account = account

    @property
    def cached_tokens(self) -> int:
        """Of the prompts' tokens, each prompt counted once, those found in the prefix cache."""
        return sum(choice.cached_tokens for choice in self.choices[:: self._per_prompt])

    @property
    def queue_seconds(self) -> float:
        """From arrival in the engine to the first step of any choice; 0 before that."""
        begun = (choice.queue_seconds for choice in self.choices if choice.queue_seconds)
        return min(begun, default=0.0)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def drafted_tokens(self) -> int:
        """Draft tokens that the base model has judged."""
        return sum(choice.drafted_tokens for choice in self.choices)

    @property
    def accepted_tokens(self) -> int:
        """Of the completion's tokens, those that came from drafts."""
        return sum(choice.accepted_tokens for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all choices as they come, each with its choice's index.

        The last piece of a choice has an ending; pieces that bring nothing are left out. The first
        error of one choice ends all. Closing the iterator cancels what still runs. Keeps the
        account on the way and ends it.
        """
        running = set(range(len(self.choices)))
        endings: set[str] = set()
        try:
            while running:
                index, said = await self._stream.receive()
                if index not in running:  # came before its stop string was found
                    continue
                if isinstance(said, QuickchangeError):
                    raise said
                piece = self.choices[index].push(said)
                if piece.ending is not None:
                    self._stream.stop(index)  # for a stop string; otherwise it has ended by itself
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

    def close(self) -> None:
        """Cancel what still runs."""
        self._end("cancelled")

    def _end(self, ending: Ending) -> None:
        self._stream.close()
        self.account.end(ending, self)
