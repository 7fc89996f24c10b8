"""One engine replica on simulated time: its tiers, its loader, its steps.

As the engine does, in what decides times: continuous batching with chunked prefill, decode rows
first; adapters claimed on arrival, loaded one after another beside the steps, evicted least
recently used and never while claimed; images kept on the host within its budget. Simpler than the
engine: those whose adapters are there start in order of arrival (the engine is fair to adapters),
a sequence takes the KV blocks of its whole length when it starts (nothing is preempted), all
adapters are of one size, nothing is drafted.

Steps that are all alike are made in one go: a stretch ends where a sequence ends, or with the
first step after something has come.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from heapq import heappop, heappush
from typing import Literal

from quickchange_server.cluster.routing.placement import Held
from quickchange_server.cluster.simulation.replica_model import ReplicaModel
from quickchange_server.cluster.simulation.traffic import TracedRequest


class SimulatedSequence:
    """A request on its replica."""

    __slots__ = ("first", "kv", "left", "request")

    def __init__(self, request: TracedRequest) -> None:
        self.request = request
        self.left = request.prompt  # tokens to compute
        self.kv = 0  # tokens of room held
        self.first = math.nan  # when its first token came


class SimulatedReplica:
    """A replica. Its owner calls `step_end` at `ends` and `load_end` at `loaded`."""

    def __init__(self, model: ReplicaModel) -> None:
        self._model = model
        self._prices = model.price_table()
        self._store_seconds, self._copy_seconds = model.load_seconds
        # Adapters, those used least recently first; a device's adapter may be on the host as well.
        self.device: OrderedDict[str, None] = OrderedDict()
        self.host: OrderedDict[str, None] = OrderedDict()
        self._claims: Counter[str] = Counter()
        self._blocked: dict[str, list[SimulatedSequence]] = {}  # by the adapter that they wait for
        self._jobs: deque[tuple[str, Literal["store", "copy"]]] = deque()
        self._writing = ""  # adapter that is being copied to the device
        self.loaded = math.inf  # when the loader's job is done
        self._startable: deque[SimulatedSequence] = deque()
        self._prefilling: list[SimulatedSequence] = []
        self._decoding: list[tuple[int, int, SimulatedSequence]] = []  # heap, by the last step
        self._running: Counter[str] = Counter()  # by adapter
        self._prefixes: OrderedDict[str, int] = OrderedDict()
        self._kv_used = self._kv_cached = 0
        self._context = 0  # tokens of all decoding sequences
        self._steps = self._started = 0
        self.ends = math.inf  # when the stretch of steps is done
        self._begun = self._each = 0.0
        self._stretch = 0
        self._chunks: list[tuple[SimulatedSequence, int]] = []
        self.busy_seconds = 0.0
        self.placed = self.store_loads = self.copies = 0
        self.queue = 0
        self.finished: list[SimulatedSequence] = []  # since its owner last looked

    def held(self, adapter: str) -> Held:
        """Where an adapter is."""
        if not adapter or adapter in self.device:
            return "device"
        if adapter in self._blocked:
            return "loading"
        return "host" if adapter in self.host else "disk"

    @property
    def kv_share(self) -> float:
        return self._kv_used / self._model.kv_tokens

    @property
    def full(self) -> bool:
        return len(self.device) >= self._model.device_room

    @property
    def step_seconds(self) -> float:
        """Seconds of a recent step."""
        return self._each

    def submit(self, request: TracedRequest, now: float) -> None:
        """Take a request."""
        sequence, adapter = SimulatedSequence(request), request.adapter
        self.placed += 1
        self.queue += 1
        if adapter:
            self._claims[adapter] += 1
        if not adapter or adapter in self.device:
            self._startable.append(sequence)
            self._come(now)
            return
        waiting = self._blocked.setdefault(adapter, [])
        waiting.append(sequence)
        if len(waiting) == 1:
            self._jobs.append((adapter, "copy" if adapter in self.host else "store"))
            self._load(now)

    # --- loads ----------------------------------------------------------------------------------

    def load_end(self) -> None:
        """The loader's job is done."""
        now, self.loaded = self.loaded, math.inf
        adapter, kind = self._jobs.popleft()
        if kind == "store":
            self.store_loads += 1
            self.host[adapter] = None
            self._jobs.append((adapter, "copy"))
        else:
            self.copies += 1
            self.device[adapter] = None
            self._startable.extend(self._blocked.pop(adapter))
            self._come(now)
        self._trim_host()
        self._load(now)

    def _load(self, now: float) -> None:
        """Start the first job that can be done; a copy needs room on the device."""
        if self.loaded < math.inf:
            return
        for _ in range(len(self._jobs)):
            if self._jobs[0][1] == "store":
                self.loaded = now + self._store_seconds
                return
            if self._make_room():
                self.loaded = now + self._copy_seconds
                return
            self._jobs.rotate(-1)

    def _make_room(self) -> bool:
        if len(self.device) < self._model.device_room:
            return True
        victim = next((adapter for adapter in self.device if not self._claims[adapter]), None)
        if victim is None:
            return False
        del self.device[victim]
        return True

    def _trim_host(self) -> None:
        """Bring the host to its budget, as far as no image is waited for."""
        while len(self.host) > self._model.host_room:
            victim = next((each for each in self.host if each not in self._blocked), None)
            if victim is None:
                return
            del self.host[victim]

    # --- steps ----------------------------------------------------------------------------------

    def _come(self, now: float) -> None:
        """Start steps, or end the stretch with the step under way."""
        if self.ends == math.inf:
            self._begin(now)
        elif self._stretch > 1:
            steps = max(math.ceil((now - self._begun) / self._each), 1)
            if steps < self._stretch:
                self._stretch = steps
                self.ends = self._begun + steps * self._each

    def step_end(self) -> None:
        """The stretch of steps is done."""
        now, steps = self.ends, self._stretch
        self.busy_seconds += steps * self._each
        self._steps += steps
        self._context += steps * len(self._decoding)
        while self._decoding and self._decoding[0][0] <= self._steps:
            self._end(heappop(self._decoding)[2])
        for sequence, rows in self._chunks:
            sequence.left -= rows
            if not sequence.left:
                self._first_token(sequence, now)
        if self._chunks:
            self._prefilling = [sequence for sequence in self._prefilling if sequence.left]
        self._begin(now)

    def _first_token(self, sequence: SimulatedSequence, now: float) -> None:
        request = sequence.request
        sequence.first = now
        self._context += request.prompt
        if request.output == 1:
            self._end(sequence)
            return
        self._started += 1
        heappush(self._decoding, (self._steps + request.output - 1, self._started, sequence))

    def _end(self, sequence: SimulatedSequence) -> None:
        request, adapter = sequence.request, sequence.request.adapter
        self.queue -= 1
        self._kv_used -= sequence.kv
        self._context -= request.prompt + request.output - 1
        if adapter:
            self._running[adapter] -= 1
            if not self._running[adapter]:
                del self._running[adapter]
            self._claims[adapter] -= 1
        if request.prefix:
            self._remember(request)
        self.finished.append(sequence)

    def _begin(self, now: float) -> None:
        """Start sequences that can be, and the next stretch of steps."""
        if self._jobs:
            self._load(now)  # an adapter may have been let go
        self._admit()
        decoding = len(self._decoding)
        budget = self._model.max_batch_tokens - decoding
        rows = decoding
        self._chunks = []
        for sequence in self._prefilling:
            chunk = min(sequence.left, budget)
            if not chunk:
                break
            self._chunks.append((sequence, chunk))
            budget -= chunk
            rows += chunk
        if not rows:
            self.ends = math.inf
            return
        self._stretch = 1 if self._chunks else self._decoding[0][0] - self._steps
        self._begun = now
        self._each = (
            self._prices[rows]
            + self._model.adapter_seconds * len(self._running)
            + self._model.context_seconds * self._context
        )
        self.ends = now + self._stretch * self._each

    def _admit(self) -> None:
        while self._startable:
            running = len(self._decoding) + len(self._prefilling)
            sequence = self._startable[0]
            request = sequence.request
            cached = min(self._prefixes.get(request.prefix, 0), request.prompt - 1)
            needed = request.prompt + request.output
            room = self._kv_used + needed <= self._model.kv_tokens
            if running >= self._model.max_sequences or not (room or not running):
                return
            self._startable.popleft()
            sequence.kv, sequence.left = needed, request.prompt - cached
            self._kv_used += needed
            self._forget_prefixes()
            if request.adapter:
                self._running[request.adapter] += 1
                self.device.move_to_end(request.adapter)
                if request.adapter in self.host:
                    self.host.move_to_end(request.adapter)
            if cached:
                self._prefixes.move_to_end(request.prefix)
            self._prefilling.append(sequence)

    def _remember(self, request: TracedRequest) -> None:
        key = request.prefix
        self._kv_cached += request.prefix_tokens - self._prefixes.pop(key, 0)
        self._prefixes[key] = request.prefix_tokens
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        while self._prefixes and self._kv_used + self._kv_cached > self._model.kv_tokens:
            self._kv_cached -= self._prefixes.popitem(last=False)[1]
