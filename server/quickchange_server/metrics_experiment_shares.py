"""The shares that running experiments' variants are to have, read at each scrape.

Beside them an alert holds the shares that the variants got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quickchange_server.experiments.layout import SIZE, shares
from quickchange_server.experiments.registry import Experiments
from quickchange_server.metric_labels import OTHER


class ShareCollector(Collector):
    """`label` bounds the experiments' names; those beyond the bound are left out."""

    def __init__(self, experiments: Experiments, label: Callable[[str], str]) -> None:
        self._experiments = experiments
        self._label = label

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "quickchange_experiment_share",
            "Share of the units that a running experiment gives to a variant",
            labels=["experiment", "variant"],
        )
        now = self._experiments.clock()
        for name, experiment in self._experiments.all.items():
            label = self._label(name)
            if experiment.state == "running" and label != OTHER:
                layout = experiment.stretches[experiment.stretch(now)].layout
                for variant, points in shares(layout).items():
                    family.add_metric([label, variant], points / SIZE)
        yield family
