"""Metrics of speculative decoding: drafted and accepted tokens by adapter and depth.

The ratio of accepted to drafted tokens is the acceptance rate; gained against estimated tokens
shows the quality of the estimate by which drafts are selected.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

from quickchange_server.observability.naming.labels import OTHER, AdapterLabels
from quickchange_server.protocol import LOOKUP, DraftCount, Drafting, StepStats

NameOf = Callable[[str], str | None]  # an adapter version's name by its digest, if known


class SpeculationMetrics:
    """The metrics of drafting."""

    def __init__(self, registry: CollectorRegistry, labels: AdapterLabels) -> None:
        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"quickchange_speculation_{name}", text, more, registry=registry)

        self._labels = labels
        self._requests = counter(
            "requests_total", "Admitted requests whose tokens are drafted ahead", "drafter"
        )
        self._drafted = counter(
            "drafted_tokens_total",
            "Draft tokens judged by the base, by the adapter whose heads made them and by the "
            "tokens from the last certain one",
            "adapter",
            "depth",
        )
        self._accepted = counter(
            "accepted_tokens_total", "Draft tokens that the base agreed to", "adapter", "depth"
        )
        self._rows = counter("rows_total", "Token rows of engine steps that were drafts")
        self._estimated = counter(
            "estimated_tokens_total", "Tokens that drafts were expected to bring when bought"
        )
        self._gained = counter("gained_tokens_total", "Tokens that drafts brought")

    def request(self, drafting: Drafting) -> None:
        """Count an admitted request by its sources of drafts."""
        kinds = {"heads": drafting.heads is not None, "lookup": drafting.lookup}
        self._requests.labels("+".join(kind for kind, drafts in kinds.items() if drafts)).inc()

    def step(self, stats: StepStats, name_of: NameOf) -> None:
        """Record the drafts of one engine step."""
        if not (stats.drafts or stats.draft_rows):
            return
        for count in stats.drafts:
            label, depth = self._label(count, name_of), str(count.depth)
            self._drafted.labels(label, depth).inc(count.drafted)
            self._accepted.labels(label, depth).inc(count.accepted)
        self._rows.inc(stats.draft_rows)
        self._estimated.inc(stats.draft_estimate)
        self._gained.inc(stats.draft_gain)

    def _label(self, count: DraftCount, name_of: NameOf) -> str:
        if count.drafter == LOOKUP:
            return LOOKUP
        name = name_of(count.drafter)
        return OTHER if name is None else self._labels(name)
