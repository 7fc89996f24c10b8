"""Ray Serve's configuration files: taken by Ray, and true to what the application takes."""

from __future__ import annotations

import re
import shlex
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from quickchange_server.cluster import application
from quickchange_server.cluster.cluster_settings import (
    ApplicationArguments,
    ClusterSettings,
    check_database,
    for_replicas,
)
from quickchange_server.config import Settings
from quickchange_server.tenants.cli import app as keys
from quickchange_server.tenants.tenancy import asks_for_keys

DOCKER = Path(__file__).parents[2] / "docker"
SERVE = DOCKER / "ray" / "serve.yaml"
COMPOSE = DOCKER / "ray" / "compose.yaml"
RAY_SERVICE = DOCKER / "kubernetes" / "rayservice.yaml"
DATABASE = "postgresql+psycopg://user@host/name"


def configuration(file: Path) -> Any:
    """What the file gives to Serve; of a RayService, the text in it."""
    documents = list(yaml.safe_load_all(file.read_text()))
    texts = [d["spec"]["serveConfigV2"] for d in documents if d.get("kind") == "RayService"]
    return yaml.safe_load(texts[0]) if texts else documents[0]


def app_of(file: Path) -> ServeApplicationSchema:
    (app,) = ServeDeploySchema.model_validate(configuration(file)).applications
    return app


class BuiltError(Exception):
    """What the application was built with, in place of an application of Serve."""


def built(
    app: ServeApplicationSchema, monkeypatch: pytest.MonkeyPatch, *, joined: bool = True
) -> Any:
    """The settings of both kinds, and what was joined before."""
    joins: list[str] = []

    def build(settings: Settings, cluster: ClusterSettings) -> Any:
        raise BuiltError(settings, cluster, joins)

    monkeypatch.setattr(application, "application", build)
    monkeypatch.setattr(application.ray, "is_initialized", lambda: joined)
    monkeypatch.setattr(application.ray, "init", lambda: joins.append("Ray"))
    with pytest.raises(BuiltError) as given:
        call_user_app_builder_with_args_if_necessary(application.build, app.args)
    return given.value.args


@pytest.mark.parametrize("file", [SERVE, RAY_SERVICE], ids=lambda file: file.name)
def test_the_application_is_built_from_the_file_as_serve_builds_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICKCHANGE_DATABASE", DATABASE)
    app = app_of(file)
    assert app.import_path == f"{application.__name__}:{application.build.__name__}"
    settings, cluster, _ = built(app, monkeypatch)
    for name, value in app.args.items():
        assert getattr(settings, name, getattr(cluster, name, None)) == value
    assert settings.database == DATABASE
    for_replicas(settings, cluster, cpus=16)  # raises where they make no sense


def test_words_of_serves_command_line_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    app = ServeApplicationSchema(
        import_path="m:build", args={"model": "m", "store": "s", "engines": "3", "turbo": "false"}
    )
    settings, cluster, _ = built(app, monkeypatch)
    assert (settings.model, settings.turbo, cluster.engines) == ("m", False, 3)


@pytest.mark.parametrize("joined", [True, False])
def test_ray_is_joined_by_who_builds_unless_it_was(
    joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serve run` builds before it joins; of a configuration file, a process of Ray's builds."""
    app = ServeApplicationSchema(import_path="m:build", args={"model": "m", "store": "s"})
    *_, joins = built(app, monkeypatch, joined=joined)
    assert joins == ([] if joined else ["Ray"])


@pytest.mark.parametrize("file", [SERVE, RAY_SERVICE], ids=lambda file: file.name)
def test_options_are_of_deployments_that_there_are(file: Path) -> None:
    fields = {"proxy_location", "http_options", "logging_config", "applications"}
    assert set(configuration(file)) <= fields
    assert {options.name for options in app_of(file).deployments} <= {"Board", "Engine", "Ingress"}


# --- the RayService -------------------------------------------------------------------------------


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(RAY_SERVICE.read_text()))


def ray_service() -> dict[str, Any]:
    (found,) = [document for document in manifests() if document["kind"] == "RayService"]
    return found


def pods() -> dict[str, dict[str, Any]]:
    """The pod templates in it, by the names of their containers."""
    cluster = ray_service()["spec"]["rayClusterConfig"]
    templates = [cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    return {template["spec"]["containers"][0]["name"]: template for template in templates}


def test_what_of_the_ray_service_is_kubernetes_own_is_valid() -> None:
    """The resource itself has a schema of KubeRay's, which is not at hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        import kubernetes_validate
    plain = [document for document in manifests() if document["kind"] != "RayService"]
    for name, template in pods().items():
        metadata = {**template["metadata"], "name": name}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        plain.append(pod)
    assert len(plain) >= 4
    for document in plain:
        kubernetes_validate.validate(document, "1.33", strict=True)


def test_nodes_run_the_ray_that_is_installed_and_ask_for_its_token() -> None:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}


def test_a_ray_service_has_gpus_for_its_engines_and_none_on_the_head() -> None:
    (app,) = ServeDeploySchema.model_validate(configuration(RAY_SERVICE)).applications
    cluster = ray_service()["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    gpus = pods()["ray-worker"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    each = app.args.get("tensor_parallel", 1)
    assert gpus * group["minReplicas"] >= each * app.args["engines"]
    assert gpus * group["maxReplicas"] >= each * app.args["max_engines"]
    assert gpus % each == 0
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


def test_an_old_cluster_outlives_the_streams_that_it_may_finish() -> None:
    (app,) = ServeDeploySchema.model_validate(configuration(RAY_SERVICE)).applications
    drain = ClusterSettings.model_fields["ingress_drain_seconds"].default
    drain = app.args.get("ingress_drain_seconds", drain)
    assert ray_service()["spec"]["rayClusterDeletionDelaySeconds"] > drain


def test_its_network_policy_and_budget_are_of_all_pods() -> None:
    labels = [template["metadata"]["labels"] for template in pods().values()]
    for document in manifests()[1:]:
        spec = document["spec"]
        selector = spec["selector"] if "selector" in spec else spec["podSelector"]
        for label in labels:
            assert selector["matchLabels"].items() <= label.items()


def test_its_first_key_is_made_by_a_command_that_there_is() -> None:
    head = RAY_SERVICE.read_text().partition("apiVersion")[0].replace("\\\n#", " ")
    (line,) = re.findall(r"^#\s+kubectl run .* -- (.*)$", head, re.MULTILINE)
    words = shlex.split(line)
    assert words.pop(0) == "keys"
    command: Any = typer.main.get_command(keys)
    command.commands[words[0]].make_context("create", words[1:])


# --- the nodes on one machine ---------------------------------------------------------------------


def test_variables_of_containers_are_settings() -> None:
    known = {*Settings.model_fields, *ClusterSettings.model_fields}
    for file in (RAY_SERVICE, COMPOSE):
        named = set(re.findall(r"QUICKCHANGE_([A-Z_]+)", file.read_text()))
        assert named
        assert {name.lower() for name in named} <= known


def test_compose_starts_nodes_of_one_image_with_the_extras_of_a_node() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    head, node = services["head"], services["node"]
    assert head["build"] == node["build"]
    assert (COMPOSE.parent / head["build"]["context"] / head["build"]["dockerfile"]).is_file()
    project = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]
    extras = set(head["build"]["args"]["EXTRAS"].split(","))
    assert {"ray", "postgres"} <= extras <= set(project["optional-dependencies"])
    assert head["volumes"] == node["volumes"], "the store has one path on all nodes"
    assert all(port.startswith("127.0.0.1:") for port in head["ports"])


def test_compose_gives_a_cluster_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = yaml.safe_load(COMPOSE.read_text())["services"]["head"]["environment"]
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings, cluster = ApplicationArguments(store="/var/lib/quickchange/store").parts
    check_database(settings, machines=3)
    for_replicas(settings, cluster, cpus=5)
    assert not asks_for_keys(settings.model_copy(update={"host": "0.0.0.0"}))
