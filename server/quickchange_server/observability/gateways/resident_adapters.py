"""Where adapter versions are, as the engines' allocators have said: told anew at each scrape.

Names are the store's, which engines don't know, so no registry holds these series: whoever answers
a scrape tells them, in a cluster for every replica.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.observability.naming.labels import OTHER

MOST_DIGESTS = 100  # told of one engine
LabelOf = Callable[[str], str]  # a label value for an adapter version's digest
Residences = Mapping[str, Residence]  # by digest


class Told(Collector):
    """Families that are made for one scrape, and are in no registry."""

    def __init__(self, *families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for families in self._families:
            yield from families


def resident(replicas: Mapping[str | None, Residences], label_of: LabelOf) -> Iterator[Metric]:
    """Both families, of each replica by its label; None: the only engine of a machine."""
    versions: Counter[tuple[str, ...]] = Counter()
    size: Counter[tuple[str, ...]] = Counter()
    for replica, residences in replicas.items():
        of = () if replica is None else (replica,)
        for digest, there in residences.items():
            label, pinned = label_of(digest), "true" if there.pinned else "false"
            versions[label, there.tier, pinned, str(there.rank), *of] += 1
            size[label, there.tier, *of] += there.bytes
    by = [] if None in replicas else ["replica"]
    yield _family(
        "quickchange_adapter_resident",
        "Versions of an adapter on a tier, by pin and rank",
        ["adapter", "tier", "pinned", "rank", *by],
        versions,
    )
    yield _info(replicas, label_of, by)
    yield _family(
        "quickchange_adapter_resident_bytes",
        "Bytes of an adapter's versions on a tier",
        ["adapter", "tier", *by],
        size,
    )


def _info(replicas: Mapping[str | None, Residences], label_of: LabelOf, by: list[str]) -> Metric:
    """The digests behind the names: of MOST_DIGESTS versions of a replica, the device's first."""
    told: Counter[tuple[str, ...]] = Counter()
    for replica, residences in replicas.items():
        of = () if replica is None else (replica,)
        named = [d for d in sorted(residences) if label_of(d) != OTHER]
        named.sort(key=lambda digest: residences[digest].tier != "device")
        told.update((label_of(digest), digest, *of) for digest in named[:MOST_DIGESTS])
    return _family(
        "quickchange_adapter_info",
        "Adapter versions in memory by digest, always 1",
        ["adapter", "digest", *by],
        told,
    )


def _family(
    name: str, text: str, labels: list[str], values: Mapping[tuple[str, ...], int]
) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family
