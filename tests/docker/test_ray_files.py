"""Ray Serve's configuration files: taken by Ray, and true to what the application takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from quickchange_server.cluster import application
from quickchange_server.cluster.cluster_settings import ClusterSettings, for_replicas
from quickchange_server.config import Settings

DOCKER = Path(__file__).parents[2] / "docker"
SERVE = DOCKER / "ray" / "serve.yaml"
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


def built(app: ServeApplicationSchema, monkeypatch: pytest.MonkeyPatch) -> Any:
    def build(settings: Settings, cluster: ClusterSettings) -> Any:
        raise BuiltError(settings, cluster)

    monkeypatch.setattr(application, "application", build)
    with pytest.raises(BuiltError) as given:
        call_user_app_builder_with_args_if_necessary(application.build, app.args)
    return given.value.args


@pytest.mark.parametrize("file", [SERVE], ids=lambda file: file.name)
def test_the_application_is_built_from_the_file_as_serve_builds_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICKCHANGE_DATABASE", DATABASE)
    app = app_of(file)
    assert app.import_path == f"{application.__name__}:{application.build.__name__}"
    settings, cluster = built(app, monkeypatch)
    for name, value in app.args.items():
        assert getattr(settings, name, getattr(cluster, name, None)) == value
    assert settings.database == DATABASE
    for_replicas(settings, cluster, cpus=16)  # raises where they make no sense


def test_words_of_serves_command_line_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    app = ServeApplicationSchema(
        import_path="m:build", args={"model": "m", "store": "s", "engines": "3", "turbo": "false"}
    )
    settings, cluster = built(app, monkeypatch)
    assert (settings.model, settings.turbo, cluster.engines) == ("m", False, 3)


@pytest.mark.parametrize("file", [SERVE], ids=lambda file: file.name)
def test_options_are_of_deployments_that_there_are(file: Path) -> None:
    fields = {"proxy_location", "http_options", "logging_config", "applications"}
    assert set(configuration(file)) <= fields
    assert {options.name for options in app_of(file).deployments} <= {"Board", "Engine", "Ingress"}
