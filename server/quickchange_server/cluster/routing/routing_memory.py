"""What a router knows between the reports of the replicas, and the order it makes of it.

Replicas report about once a second; requests come a thousand times as often. So a router counts
on what it did itself: an adapter that it has just sent to a replica is believed to be there, or a
burst for a cold one would load it everywhere; and the replica that was last given a prompt's first
tokens is believed to have their keys and values. Both are hints: a replica may have evicted them.

Pure but for a clock that may be given: the plan for many replicas runs it on simulated time.
"""

from __future__ import annotations

import re
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from cachetools import LRUCache

from quickchange_server.cluster.routing.placement import (
    DEFAULT_POLICY,
    Held,
    PlacementPolicy,
    ReplicaCandidate,
    order,
)
from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.protocol import Prefetch, Submit

_FIRST_PREFIX = 32  # tokens; each further prefix that is remembered is twice as long
_LONGEST_PREFIX = 1 << 15
_SHORT = 16  # characters of a digest in a report: a hint need not be proof against forgery
_BELIEVED_SECONDS = 10.0  # for which an adapter counts as on its way without a report
_PREFIXES = 1 << 16  # remembered, of all requests
_REPLICAS_OF_A_PREFIX = 4
_SEQUENCES = 1 << 14  # whose replica is remembered
_AGAIN = re.compile(r"/\d+$")  # what a later submission of a sequence adds to its id

Prefixes = tuple[tuple[bytes, int], ...]  # keys and lengths in tokens, ascending


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What routing reads of a request."""

    digests: tuple[str, ...] = ()  # shortened, sorted
    prefixes: Prefixes = ()
    sequence: str = ""  # the same for all submissions of a sequence; "": not to be remembered
    submission: str = ""


def routed(request: object) -> RoutedRequest:
    """What routing reads of a Submit or a Prefetch; anything else goes to the least loaded."""
    if isinstance(request, Prefetch):
        return RoutedRequest((request.digest[:_SHORT],))
    if not isinstance(request, Submit):
        return RoutedRequest()
    digests = {component.digest[:_SHORT] for component in request.adapters}
    if request.drafting is not None and request.drafting.heads is not None:
        digests.add(request.drafting.heads[:_SHORT])
    return RoutedRequest(
        tuple(sorted(digests)),
        tuple(_prefixes(request)),
        _AGAIN.sub("", request.request_id),
        request.request_id,
    )


def routing_stats(
    residency: Mapping[str, Residence],
    *,
    device_bytes: int,
    queue: int,
    kv_share: float,
    step_seconds: float,
) -> dict[str, Any]:
    """A replica's answer to Serve's `record_routing_stats`. device_bytes: budget of that tier.

    Serve sends it to every handle whenever it changes, so the digests are shortened.
    """
    tiers: dict[str, list[str]] = {"device": [], "host": []}
    for digest, residence in residency.items():
        if residence.tier != "disk":
            tiers[residence.tier].append(digest[:_SHORT])
    sizes = [r.bytes for r in residency.values() if r.tier == "device"]
    usual = sum(sizes) / len(sizes) if sizes else 0
    return {
        **{tier: " ".join(sorted(digests)) for tier, digests in tiers.items()},
        "full": sum(sizes) + usual > device_bytes,
        "queue": queue,
        "kv_share": round(kv_share, 3),
        "step_seconds": round(step_seconds, 6),
    }


class RoutingCounts:
    """Routed requests for adapters, by where the chosen replica had them; any thread reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Held] = Counter()

    def add(self, held: Held) -> None:
        with self._lock:
            self._counts[held] += 1

    def snapshot(self) -> dict[Held, int]:
        with self._lock:
            return {held: self._counts[held] for held in ("device", "loading", "host", "disk")}


ROUTED = RoutingCounts()  # of this process


class _Submission(NamedTuple):
    """Where a sequence was last sent."""

    submission: str
    replica: str
    avoided: tuple[str, ...]


class RoutingMemory:
    """One router's knowledge of the replicas. Used from one thread."""

    def __init__(
        self,
        policy: PlacementPolicy = DEFAULT_POLICY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._candidates: dict[str, ReplicaCandidate] = {}
        self._reported: dict[str, tuple[str, str]] = {}  # the tiers as they were last told
        self._prefixes: LRUCache[bytes, tuple[str, ...]] = LRUCache(_PREFIXES)
        self._queues: dict[str, int] = {}  # as they were last told
        self._sequences: LRUCache[str, _Submission] = LRUCache(_SEQUENCES)

    def keep(self, replicas: Iterable[str]) -> None:
        """Know these replicas from now on, and no other."""
        known = self._candidates
        self._candidates = {name: known.get(name) or ReplicaCandidate(name) for name in replicas}
        for told in (self._reported, self._queues):
            for name in told.keys() - self._candidates.keys():
                del told[name]

    def report(self, replica: str, stats: Mapping[str, Any]) -> None:
        """Take what a replica told by `routing_stats`; nothing, where it has told nothing yet."""
        candidate = self._candidates[replica]
        if not stats:
            return
        tiers = stats["device"], stats["host"]
        if self._reported.get(replica) != tiers:
            self._reported[replica] = tiers
            candidate.device, candidate.host = (frozenset(tier.split()) for tier in tiers)
        now = self._clock()
        candidate.loading = {
            digest: until
            for digest, until in candidate.loading.items()
            if until > now and digest not in candidate.device
        }
        candidate.queue = self._queues[replica] = stats["queue"]
        candidate.full, candidate.kv_share = stats["full"], stats["kv_share"]
        candidate.step_seconds = stats["step_seconds"]

    def queue(self, replica: str, told: int | None, more: int) -> None:
        """Note how many sequences a replica has: as it has told since its last report, if it has,
        and `more`."""
        known = self._queues.get(replica, 0) if told is None else told
        self._candidates[replica].queue = known + more

    def order(self, request: RoutedRequest) -> list[str]:
        """The replicas in order of preference for a request."""
        return order(
            list(self._candidates.values()),
            request.digests,
            now=self._clock(),
            prefixes=self._known_prefixes(request.prefixes),
            spread=request.prefixes[0][0] if request.prefixes else b"",
            avoid=self._avoided(request),
            policy=self._policy,
        )

    def place(self, request: RoutedRequest, replica: str) -> Held:
        """Note that a replica is given a request; says where it had the adapters before."""
        candidate, now = self._candidates[replica], self._clock()
        held = candidate.held(request.digests, now)
        for digest in request.digests:
            if digest not in candidate.device:
                candidate.loading[digest] = now + _BELIEVED_SECONDS
        for key, _ in request.prefixes:
            others = [name for name in self._prefixes.get(key, ()) if name != replica]
            self._prefixes[key] = (replica, *others[: _REPLICAS_OF_A_PREFIX - 1])
        if request.sequence:
            avoided = self._avoided(request)
            self._sequences[request.sequence] = _Submission(request.submission, replica, avoided)
        return held

    def _avoided(self, request: RoutedRequest) -> tuple[str, ...]:
        """The replica that an earlier submission of the sequence was lost on."""
        last = self._sequences.get(request.sequence)
        if last is None:
            return ()
        return last.avoided if last.submission == request.submission else (last.replica,)

    def _known_prefixes(self, prefixes: Prefixes) -> dict[str, int]:
        """Tokens of the longest prefix that each replica was given lately."""
        longest: dict[str, int] = {}
        for key, tokens in prefixes:
            longest.update(dict.fromkeys(self._prefixes.get(key, ()), tokens))
        return longest


def _prefixes(submit: Submit) -> Iterable[tuple[bytes, int]]:
    """Keys of the prompt's first 32, 64, 128, … tokens under what serves them, and its salt."""
    digest = blake2b(submit.salt.encode(), digest_size=16)
    begin, end = 0, _FIRST_PREFIX
    while end <= min(len(submit.prompt), _LONGEST_PREFIX):
        parts: Sequence[object] = sorted(
            (c.digest, c.weight, max(c.begin, begin), end if c.end is None else min(c.end, end))
            for c in submit.adapters
            if c.begin < end and (c.end is None or begin < c.end)
        )
        digest.update(repr(parts).encode())
        digest.update(array("q", submit.prompt[begin:end]).tobytes())
        yield digest.digest(), end
        begin, end = end, 2 * end
