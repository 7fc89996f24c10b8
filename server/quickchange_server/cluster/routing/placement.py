"""Placement of a request on one of several engine replicas: an order of preference.

Replicas whose device tier holds all that the request needs come first, then those that hold it on
the host, then all in the order of rendezvous hashing (highest random weight, Thaler and
Ravishankar 1998) on the digests. So a cold adapter lives on one replica, the same one whichever
ingress asks, and of N replicas one that joins or leaves moves about a part in N of the adapters.

Loads are bounded (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads",
2018): a replica with more than (1 + ε) · mean + 1 is passed over for the next, so a hot adapter
spreads over more replicas as its queue grows; when it cools, the first in its order has all of it
again, and the others let it go as least recently used. The bound of a replica that holds the
adapter is wider than that of those that would have to load it: a queue of a few sequences costs
less than a copy that displaces another adapter.

Requests for the plain base go where the longest prefix of their prompt was computed, then to the
least loaded.

Pure: no clock, no randomness, no Ray; equal input gives equal order.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

# Where a replica has what a request needs; "loading": given to it a moment ago, not reported yet.
Held = Literal["device", "loading", "host", "disk"]

_SLOWEST = 4.0  # most that a step's time makes of a load, and one part of it the least
_CACHED_ORDERS = 1 << 14

_LAST = 4  # rank of a replica that the request was just lost on
_OVER = 3  # of one with too much to do


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """The bounds on loads, which count sequences."""

    epsilon: float = 0.25  # above the mean
    slack: float = 4.0  # more than that, for a replica that holds the adapter already
    kv_full: float = 0.95  # share of KV blocks in use above which a replica gets nothing new


DEFAULT_POLICY = PlacementPolicy()


@dataclass(slots=True)
class Candidate:
    """An engine replica as a router knows it."""

    replica: str
    queue: float = 0.0  # sequences that run or wait there
    device: Collection[str] = frozenset()  # digests
    host: Collection[str] = frozenset()
    full: bool = False  # another adapter would displace one from the device
    kv_share: float = 0.0  # of KV blocks in use
    step_seconds: float = 0.0  # recent mean; 0: not known
    loading: dict[str, float] = field(default_factory=dict)  # digest -> until when it is believed

    def held(self, digests: Sequence[str], now: float) -> Held:
        """The slowest tier on which one of the digests is."""
        found: Held = "device"
        for digest in digests:
            if digest in self.device:
                continue
            if self.loading.get(digest, now) > now:
                found = "loading" if found == "device" else found
            elif digest in self.host:
                found = "host"
            else:
                return "disk"
        return found


def order(
    candidates: Sequence[Candidate],
    digests: Sequence[str],
    *,
    now: float = 0.0,
    prefixes: Mapping[str, int] | None = None,
    spread: bytes = b"",
    avoid: Collection[str] = (),
    policy: PlacementPolicy = DEFAULT_POLICY,
) -> list[str]:
    """All replicas, the best first, for a request for `digests`; empty: for the plain base.

    prefixes: tokens of the prompt that a replica has computed before. spread: key by which replicas
    are told apart where nothing else does, without digests. avoid: replicas that have just lost it.
    """
    if not candidates:
        return []
    places = _places(tuple([c.replica for c in candidates]), _key(digests) if digests else spread)
    loads = _loads(candidates)
    mean = sum(loads) / len(loads)
    bound = (1 + policy.epsilon) * mean + 1
    known = prefixes or {}
    free = [
        load <= bound and c.kv_share <= policy.kv_full and c.replica not in avoid
        for c, load in zip(candidates, loads, strict=True)
    ]
    at_home = min((place, n) for n, place in enumerate(places) if free[n] or not any(free))[1]
    home_has_room = not candidates[at_home].full

    def rank(number: int) -> tuple[float, ...]:
        candidate, load, place = candidates[number], loads[number], places[number]
        if candidate.replica in avoid:
            return _LAST, load, place
        prefix = known.get(candidate.replica, 0)
        if not digests:
            return (0, -prefix, load, place) if free[number] else (_OVER, load, place)
        held = candidate.held(digests, now)
        wide = load <= bound + policy.slack and candidate.kv_share <= policy.kv_full
        if wide and held in ("device", "loading"):
            return 0, held == "loading", -prefix, place
        if not free[number]:
            return _OVER, load, place
        # A copy on the host is worth less than room on the device, where that is at home.
        if held == "host" and not (candidate.full and home_has_room):
            return 1, -prefix, place
        return 2, place

    ranked = sorted(range(len(candidates)), key=rank)
    return [candidates[number].replica for number in ranked]


def rendezvous(replicas: Sequence[str], digests: Sequence[str]) -> list[str]:
    """The replicas in their order for these digests, loads and tiers left aside."""
    places = _places(tuple(replicas), _key(digests))
    return [name for _, name in sorted(zip(places, replicas, strict=True))]


def _key(digests: Sequence[str]) -> bytes:
    return "\n".join(sorted(digests)).encode()


@lru_cache(maxsize=_CACHED_ORDERS)
def _places(replicas: tuple[str, ...], key: bytes) -> array[int]:
    """Each replica's place in the order of the key."""
    weights = [blake2b(key, digest_size=16, key=_secret(name)).digest() for name in replicas]
    ranked = sorted(range(len(replicas)), key=lambda n: (weights[n], replicas[n]), reverse=True)
    places = array("L", bytes(array("L").itemsize * len(replicas)))
    for place, number in enumerate(ranked):
        places[number] = place
    return places


@lru_cache(maxsize=1 << 10)
def _secret(replica: str) -> bytes:
    return blake2b(replica.encode(), digest_size=32).digest()


def _loads(candidates: Sequence[Candidate]) -> list[float]:
    """Queues, each times how slow its replica's steps are beside the others'."""
    timed = [c.step_seconds for c in candidates if c.step_seconds > 0]
    usual = sum(timed) / len(timed) if timed else 0.0
    return [
        c.queue * min(max(c.step_seconds / usual, 1 / _SLOWEST), _SLOWEST)
        if c.step_seconds > 0
        else float(c.queue)
        for c in candidates
    ]
