"""Workload of a server: prompts, their lengths, the lengths of the answers, the adapters.

Every request follows from (seed, index) alone. No prompt shares its beginning with another, so a
prefix cache gains nothing. Knows nothing of HTTP; standard library only, so that a benchmark that
runs inside another project's environment can ask the very same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from quickchange_bench.load.popularity import Popularity

# Common words: one token each, with the space before it, in every usual English vocabulary.
_WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
name president team minute idea body information back parent face others level office door health
person art war history party result change morning reason research girl guy moment air teacher force
education food land music river stone tree wall window winter summer garden island letter paper
table king ship fire road gold horse bird fish
"""
WORDS = tuple(_WORDS.split())

ROUND_STRIDE = 100_000  # request indices between two rounds: more than a round ever uses


class Length(Protocol):
    """A distribution of lengths in tokens."""

    def draw(self, rng: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def draw(self, rng: random.Random) -> int:  # noqa: ARG002 (the protocol's)
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    low: int
    high: int  # included

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Log-normal lengths by median and sigma, from 1 token to 8 times the median."""

    median: int
    sigma: float

    def draw(self, rng: random.Random) -> int:
        drawn = round(rng.lognormvariate(math.log(self.median), self.sigma))
        return min(max(drawn, 1), 8 * self.median)


def parse_length(text: str) -> Length:
    """Parse `64`, `uniform:32:128` or `lognormal:64:0.5` (median, sigma).

    Raises:
        ValueError: anything else, or lengths under 1 token.
    """
    name, *numbers = text.split(":")
    try:
        match (name, numbers):
            case ("uniform", [low, high]) if 1 <= int(low) <= int(high):
                return Uniform(int(low), int(high))
            case ("lognormal", [middle, sigma]) if int(middle) >= 1 and float(sigma) >= 0:
                return LogNormal(int(middle), float(sigma))
            case (_, []) if int(name) >= 1:
                return Fixed(int(name))
    except ValueError:
        pass  # not a number: refused below, with the whole text
    raise ValueError(
        f"length {text!r}: give a number of tokens, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
    )


def make_prompt(seed: int, index: int, tokens: int) -> str:
    """A prompt of about `tokens` tokens, one per word.

    The first word counts the requests, so len(WORDS) neighbours differ from their first token on;
    those further apart that share it differ in what follows, drawn from (seed, index).
    """
    rng = random.Random(f"prompt {seed} {index}")
    first = WORDS[(index + seed) % len(WORDS)].capitalize()
    return " ".join([first, *rng.choices(WORDS, k=max(tokens - 1, 0))])


@dataclass(frozen=True, slots=True)
class Request:
    """One completion request. `adapter`: its index, or None for the plain base model."""

    index: int
    prompt: str | tuple[int, ...]  # or token ids
    output_tokens: int
    adapter: int | None


@dataclass(frozen=True)
class Workload:
    """A stream of requests. Without `popularity` all are for the base model."""

    prompt_tokens: Length
    output_tokens: Length
    popularity: Popularity | None = None
    seed: int = 0

    def request(self, index: int) -> Request:
        rng = random.Random(f"lengths {self.seed} {index}")
        prompt_tokens = self.prompt_tokens.draw(rng)
        return Request(
            index=index,
            prompt=make_prompt(self.seed, index, prompt_tokens),
            output_tokens=self.output_tokens.draw(rng),
            adapter=None if self.popularity is None else self.popularity.adapter(index),
        )

    def requests(self, start: int, count: int) -> Iterator[Request]:
        """The `count` requests from index `start`."""
        return (self.request(index) for index in range(start, start + count))
