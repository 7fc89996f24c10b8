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


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """The bounds on loads, which count sequences."""

    epsilon: float = 0.25  # above the mean
    slack: float = 4.0  # more than that, for a replica that holds the adapter already
    kv_full: float = 0.95  # share of KV blocks in use above which a replica gets nothing new


DEFAULT_POLICY = PlacementPolicy()


@dataclass(slots=True)
class ReplicaCandidate:
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
    candidates: Sequence[ReplicaCandidate],
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
    names = tuple([candidate.replica for candidate in candidates])
    places = _places(names, _key(digests) if digests else spread)
    loads = _loads(candidates)
    bound = (1 + policy.epsilon) * sum(loads) / len(loads) + 1
    wide = bound + policy.slack
    known = prefixes or {}
    # Each in the order of hashing, which sorting keeps between equals.
    there: list[int] = []
    on_host: list[int] = []
    elsewhere: list[int] = []
    over: list[int] = []
    lost: list[int] = []
    for number in places:
        candidate, load = candidates[number], loads[number]
        if candidate.replica in avoid:
            lost.append(number)
        elif load > wide or candidate.kv_share > policy.kv_full:
            over.append(number)
        elif not digests:
            (there if load <= bound else over).append(number)
        elif (held := candidate.held(digests, now)) in ("device", "loading"):
            there.append(number)
        elif load > bound:
            over.append(number)
        else:
            (on_host if held == "host" else elsewhere).append(number)
    if not digests:
        there.sort(key=lambda n: (-known.get(names[n], 0), loads[n]))
    elif len(there) > 1:
        there.sort(
            key=lambda n: (candidates[n].held(digests, now) != "device", -known.get(names[n], 0))
        )
    on_host.sort(key=lambda n: -known.get(names[n], 0))
    if on_host and elsewhere and not candidates[elsewhere[0]].full:
        # A copy on the host is worth less than room on the device nearer to home.
        home = places.index(elsewhere[0])
        nearer = [n for n in on_host if places.index(n) < home or not candidates[n].full]
        elsewhere += [n for n in on_host if n not in nearer]
        on_host = nearer
    over.sort(key=loads.__getitem__)
    lost.sort(key=loads.__getitem__)
    return [names[number] for number in (*there, *on_host, *elsewhere, *over, *lost)]


def _key(digests: Sequence[str]) -> bytes:
    return "\n".join(sorted(digests)).encode()


@lru_cache(maxsize=_CACHED_ORDERS)
def _places(replicas: tuple[str, ...], key: bytes) -> array[int]:
    """The replicas' numbers in the order of the key."""
    weights = [blake2b(key, digest_size=16, key=_secret(name)).digest() for name in replicas]
    numbers = sorted(range(len(replicas)), key=lambda n: (weights[n], replicas[n]), reverse=True)
    return array("L", numbers)


@lru_cache(maxsize=1 << 10)
def _secret(replica: str) -> bytes:
    return blake2b(replica.encode(), digest_size=32).digest()


def _loads(candidates: Sequence[ReplicaCandidate]) -> list[float]:
    """Queues, each times how slow its replica's steps are beside the others'."""
    timed = [c.step_seconds for c in candidates if c.step_seconds > 0]
    usual = sum(timed) / len(timed) if timed else 0.0
    return [
        c.queue * min(max(c.step_seconds / usual, 1 / _SLOWEST), _SLOWEST)
        if c.step_seconds > 0
        else float(c.queue)
        for c in candidates
    ]
