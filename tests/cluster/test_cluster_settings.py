"""Settings of a cluster: their bounds, what replicas get of them, and what can't be."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from quickchange_server.cluster.cluster_settings import (
    ApplicationArguments,
    ClusterSettings,
    check_database,
    for_replicas,
)
from quickchange_server.config import Settings
from quickchange_server.errors import SettingError


def settings(**changes: Any) -> Settings:
    return Settings(**{"model": "m", "store": "/tmp/store", **changes})


def test_the_arguments_of_an_application_are_both_kinds_of_settings_in_one() -> None:
    given = {"model": "m", "store": "s", "engines": "3", "threads": "2", "turbo": "false"}
    single, cluster = ApplicationArguments.model_validate(given).parts
    assert type(single) is Settings
    assert (single.model, single.threads, single.turbo) == ("m", 2, False)
    assert type(cluster) is ClusterSettings
    assert cluster == ClusterSettings(engines=3)


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(ValidationError, match="engine\n"):
        ApplicationArguments.model_validate({"model": "m", "store": "s", "engine": 2})


def test_what_an_application_is_given_wins_over_the_environment_of_who_builds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUICKCHANGE_ENGINES", "7")
    monkeypatch.setenv("QUICKCHANGE_PORT", "1")
    given = {"model": "m", "store": "s", "port": "9"}
    single, cluster = ApplicationArguments.model_validate(given).parts
    assert (single.port, cluster.engines) == (9, 7)


def test_no_name_means_one_thing_in_settings_and_another_in_a_clusters() -> None:
    assert not set(Settings.model_fields) & set(ClusterSettings.model_fields)


def test_settings_cross_to_other_machines_as_values(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pickle.dumps((settings(port=1234), ClusterSettings(engines=5)))
    monkeypatch.setenv("QUICKCHANGE_PORT", "1")
    monkeypatch.setenv("QUICKCHANGE_ENGINES", "1")
    assert pickle.loads(sent) == (settings(port=1234), ClusterSettings(engines=5))


@pytest.mark.parametrize(
    ("cpus", "engines", "threads"), [(8, 2, 4), (2, 2, 1), (2, 5, 1), (9, 2, 4)]
)
def test_engines_share_the_cpus_where_no_threads_are_given(
    cpus: float, engines: int, threads: int
) -> None:
    cluster = ClusterSettings(engines=engines)
    assert for_replicas(settings(), cluster, cpus=cpus).threads == threads
    assert for_replicas(settings(threads=3), cluster, cpus=cpus).threads == 3


def test_cpus_are_shared_by_as_many_engines_as_there_may_be() -> None:
    assert for_replicas(settings(), ClusterSettings(engines=2, max_engines=4), cpus=8).threads == 2


def test_no_path_of_whichever_machine_answers_is_read_unless_asked_for() -> None:
    cluster = ClusterSettings()
    assert for_replicas(settings(), cluster, cpus=2).adapter_paths is False
    assert for_replicas(settings(adapter_paths=True), cluster, cpus=2).adapter_paths is True


def test_fewer_engines_at_most_than_at_least_are_refused_by_name() -> None:
    with pytest.raises(SettingError, match="max_engines: 1 is below engines, 2") as caught:
        for_replicas(settings(), ClusterSettings(engines=2, max_engines=1), cpus=2)
    assert caught.value.param == "max_engines"


@pytest.mark.parametrize("name", ["engines", "ingresses", "max_engines", "queue_target"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        ClusterSettings(**{name: 0})


@pytest.mark.parametrize(
    ("database", "machines", "refused"),
    [
        (None, 1, False),
        (None, 2, True),
        ("sqlite:////tmp/x.sqlite3", 3, True),
        ("postgresql+psycopg://user:secret@db/q", 3, False),
        ("no url", 3, False),  # whoever opens it says so
    ],
)
def test_sqlite_serves_one_machine(database: str | None, machines: int, refused: bool) -> None:
    given = settings(database=database)
    if not refused:
        return check_database(given, machines=machines)
    with pytest.raises(SettingError, match="PostgreSQL") as caught:
        check_database(given, machines=machines)
    assert caught.value.param == "database"
    return None
