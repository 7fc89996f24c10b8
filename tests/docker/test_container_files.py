"""Dockerfiles, compose files and the Kubernetes example: valid, and true to what the server takes.

No container engine runs here: the images themselves are not built by these tests.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from quickchange_server.config import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
COMPOSE_FILES = [DOCKER / "compose.yaml", DOCKER / "compose.cuda.yaml"]
MANIFEST = DOCKER / "kubernetes" / "quickchange.yaml"
NOT_SETTINGS = {"QUICKCHANGE_CACHE", "QUICKCHANGE_PREBUILT"}  # of the kernels and the demo
USER = 10001


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def manifest(kind: str) -> dict[str, Any]:
    (found,) = [document for document in manifests() if document["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("Deployment")["spec"]["template"]["spec"]
    return spec


def options(arguments: list[str]) -> list[str]:
    return [a.removeprefix("--").replace("-", "_") for a in arguments if a.startswith("--")]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_has_no_warning(file: Path) -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [program, "--failure-threshold", "warning", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_an_image_copies_is_in_the_build_context(file: Path) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "constraints.txt" in kept
    assert all((ROOT / path).exists() for path in kept)
    assert "COPY constraints.txt" in file.read_text()


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_installs_the_pinned_torch(file: Path) -> None:
    pinned = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[0] in file.read_text()


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_runs_as_the_user_of_the_manifest(file: Path) -> None:
    assert f"USER {USER}:{USER}" in file.read_text()
    assert pod()["securityContext"]["runAsUser"] == USER


@pytest.mark.parametrize("file", [*DOCKERFILES, MANIFEST], ids=lambda file: file.name)
def test_every_environment_variable_is_a_setting(file: Path) -> None:
    named = set(re.findall(r"QUICKCHANGE_[A-Z_]+", file.read_text())) - NOT_SETTINGS
    settings = {f"QUICKCHANGE_{name.upper()}" for name in Settings.model_fields}
    assert named
    assert named <= settings


@pytest.mark.parametrize("file", COMPOSE_FILES, ids=lambda file: file.name)
def test_files_that_compose_names_are_there(file: Path) -> None:
    services = yaml.safe_load(file.read_text())["services"]
    for service in services.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DOCKER / source).exists(), source


def test_compose_publishes_on_loopback_only() -> None:
    services = yaml.safe_load(COMPOSE_FILES[0].read_text())["services"]
    ports = [port for service in services.values() for port in service["ports"]]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_options_that_containers_are_started_with_exist() -> None:
    services = yaml.safe_load(COMPOSE_FILES[0].read_text())["services"]
    commands = [services["server"]["command"]]
    for file in DOCKERFILES:
        for line in re.findall(r"docker run .*", file.read_text()):
            words = shlex.split(line)
            commands.append(words[words.index("serve") :])
    for command in commands:
        assert command[0] == "serve"
        assert set(options(command)) <= {"demo", *Settings.model_fields}


def test_volumes_of_compose_and_manifest_are_those_of_the_images() -> None:
    declared = {"/var/lib/quickchange", "/var/cache/quickchange"}
    for file in DOCKERFILES:
        assert all(f'"{path}"' in file.read_text() for path in declared)
    server = yaml.safe_load(COMPOSE_FILES[0].read_text())["services"]["server"]
    assert {volume.split(":")[1] for volume in server["volumes"]} == declared
    mounts = {mount["mountPath"] for mount in pod()["containers"][0]["volumeMounts"]}
    assert declared <= mounts


def test_the_manifest_is_valid_for_kubernetes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        import kubernetes_validate
    for document in manifests():
        kubernetes_validate.validate(document, "1.33", strict=True)


def test_a_pod_may_drain_before_it_is_killed() -> None:
    drain = float(manifest("ConfigMap")["data"]["QUICKCHANGE_DRAIN_SECONDS"])
    assert pod()["terminationGracePeriodSeconds"] >= drain + 5 + 10
    grace = yaml.safe_load(COMPOSE_FILES[0].read_text())["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > Settings.model_fields["drain_seconds"].default


def test_the_root_file_system_is_read_only() -> None:
    assert pod()["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert yaml.safe_load(COMPOSE_FILES[0].read_text())["services"]["server"]["read_only"] is True


def test_a_disruption_budget_keeps_a_replica() -> None:
    budget = manifest("PodDisruptionBudget")["spec"]
    deployment = manifest("Deployment")["spec"]
    assert 1 <= budget["minAvailable"] < deployment["replicas"]
    assert budget["selector"] == deployment["selector"]


def test_probes_are_routes_of_the_server() -> None:
    container = pod()["containers"][0]
    paths = {
        container[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {"/health/ready", "/health/live"}
