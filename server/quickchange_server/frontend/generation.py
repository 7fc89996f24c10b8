"""The choices of one request, generated side by side: admitted together or not at all.

A choice is one sequence in the engine with its transcript. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence

from quickchange_server.engine_client.client import DeltaStream, EngineClient, Generation
from quickchange_server.errors import UnavailableError
from quickchange_server.frontend.output_processor import Piece, Transcript
from quickchange_server.protocol import TokenLogprobs

SEED_BYTES = 8


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the `choice`-th choice: the request's own for the first, else derived from it."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:SEED_BYTES], "little")


class Choice:
    """One sequence on its way, as pieces of text."""

    def __init__(self, stream: DeltaStream, transcript: Transcript) -> None:
        self._stream = stream
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

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces, the last of them with an ending; those that bring nothing are left out.

        Raises what the engine's stream raises.
        """
        async for delta in self._stream:
            if delta.queue_seconds is not None:
                self.queue_seconds = delta.queue_seconds
            if delta.cached_tokens is not None:
                self.cached_tokens = delta.cached_tokens
            self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
            self.embedding = delta.embedding
            piece = self._transcript.push(delta)
            if piece.ending is not None:
                self._stream.stop()  # for a stop string; otherwise it has ended by itself
                yield piece
                return
            if piece.text or piece.tokens:
                yield piece
        raise UnavailableError("the generation was cut off; send the request again")

    async def close(self) -> None:
        """Cancel what is not finished."""
        await self._stream.aclose()


class Choices:
    """All choices of one request: `per_prompt` for each of its prompts."""

    def __init__(self, choices: Sequence[Choice], per_prompt: int = 1) -> None:
        self._choices = choices
        self._per_prompt = per_prompt

    @classmethod
    async def admit(
        cls,
        client: EngineClient,
        orders: Sequence[tuple[Generation, Transcript]],
        per_prompt: int = 1,
    ) -> Choices:
        """Hand every generation to the engine. Raises QueueFullError or UnavailableError, and then
        none of them is left running."""
        admitted: list[Choice] = []
        try:
            for generation, transcript in orders:
                admitted.append(Choice(client.generate(generation), transcript))
        except BaseException:
            await cls(admitted).close()
            raise
        return cls(admitted, per_prompt)

    def __len__(self) -> int:
        return len(self._choices)

    def __getitem__(self, index: int) -> Choice:
        return self._choices[index]

    @property
    def cached_tokens(self) -> int:
        """Of the prompts' tokens, each prompt counted once, those found in the prefix cache."""
        firsts = self._choices[:: self._per_prompt]
        return sum(choice.cached_tokens for choice in firsts)

    @property
    def queue_seconds(self) -> float:
        """From arrival in the engine to the first step of any choice; 0 before that."""
        begun = (choice.queue_seconds for choice in self._choices if choice.queue_seconds)
        return min(begun, default=0.0)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self._choices)

    @property
    def drafted_tokens(self) -> int:
        """Draft tokens that the base model has judged."""
        return sum(choice.drafted_tokens for choice in self._choices)

    @property
    def accepted_tokens(self) -> int:
        """Of the completion's tokens, those that came from drafts."""
        return sum(choice.accepted_tokens for choice in self._choices)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all choices as they come, each with its choice's index.

        The first error of one ends all. Closing the iterator cancels what still runs.
        """
        try:
            if len(self._choices) == 1:
                async for piece in self._choices[0].pieces():
                    yield 0, piece
            else:
                async for item in self._interleaved():
                    yield item
        finally:
            await self.close()

    async def close(self) -> None:
        for choice in self._choices:
            await choice.close()

    async def _interleaved(self) -> AsyncGenerator[tuple[int, Piece], None]:
        arrived: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

        async def read(index: int, choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
                    arrived.put_nowait((index, piece))
            except Exception as error:
                arrived.put_nowait(error)
            else:
                arrived.put_nowait(None)

        readers = [asyncio.create_task(read(i, c)) for i, c in enumerate(self._choices)]
        running = len(readers)
        try:
            while running:
                item = await arrived.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for reader in readers:
                reader.cancel()
