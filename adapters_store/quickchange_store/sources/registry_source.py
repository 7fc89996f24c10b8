"""Adapters in registries of containers, as OCI artifacts: a titled layer for each file.

`oras push REGISTRY/REPOSITORY:TAG adapter_config.json adapter_model.safetensors` makes one.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from pathlib import Path
from typing import Any

from quickchange_store.errors import AdapterSourceError
from quickchange_store.sources.adapter_url import AdapterUrl
from quickchange_store.sources.remote_files import RemoteFiles, nothing_there, unreachable

TITLE = "org.opencontainers.image.title"
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.v2+json"
)
SECONDS = (5.0, 30.0)  # to connect, and between two pieces of an answer
_NOT_FOR_US = (401, 403, 404)


def registry_files(url: AdapterUrl) -> RemoteFiles:
    """The titled layers of an artifact's manifest, each held against its digest.

    A registry on this machine's loopback is asked over HTTP, every other over HTTPS. Raises
    AdapterSourceError and SourceUnavailableError.
    """
    registry, container = _opened(url)
    address = f"{registry.prefix}://{container.manifest_url()}"
    try:
        answer = registry.do_request(address, "GET", headers={"Accept": MANIFESTS})
    except Exception as error:  # the library's own, and those of what it uses
        raise unreachable(url.text, error) from error
    if answer.status_code in _NOT_FOR_US:
        raise nothing_there(url.text, f"the registry answers {answer.status_code}")
    if answer.status_code != 200:
        raise unreachable(url.text, ValueError(f"the registry answers {answer.status_code}"))
    digest = f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
    if url.revision is not None and ":" in url.revision and url.revision != digest:
        raise nothing_there(url.text, f"the registry gives {digest} instead")
    layers = _layers(url, answer.content)

    def download(name: str, path: Path) -> None:
        try:
            registry.download_blob(container, layers[name][0], str(path))
        except Exception as error:
            raise unreachable(url.text, error) from error
        with path.open("rb") as file:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if layers[name][0] != found:
            raise AdapterSourceError(
                f"its bytes are {found}, while the manifest says {layers[name][0]}",
                file=url.text,
                key=name,
                remedy="push the artifact again",
            )

    return RemoteFiles({name: size for name, (_, size) in layers.items()}, digest, download)


def _layers(url: AdapterUrl, manifest: bytes) -> dict[str, tuple[str, int]]:
    """Digest and size of each titled layer. Raises AdapterSourceError."""
    try:
        layers = json.loads(manifest)["layers"]
        titled = [(each.get("annotations", {}).get(TITLE), each) for each in layers]
        return {
            str(title): (str(each["digest"]), int(each["size"]))
            for title, each in titled
            if title is not None
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise nothing_there(
            url.text, "what is there is no artifact with files as layers"
        ) from error


def _opened(url: AdapterUrl) -> tuple[Any, Any]:
    """The library's client, and its name of the artifact."""
    try:
        from oras.provider import Registry
        from requests.adapters import HTTPAdapter
    except ImportError as error:
        raise AdapterSourceError(
            f"oci:// needs a library that is not installed ({error})",
            file=url.text,
            remedy="pip install 'quickchange[oci]'",
        ) from error

    class Bounded(HTTPAdapter):  # type: ignore[misc]  # requests brings no types
        """Gives up on a registry that is silent; by itself the library waits without end."""

        def send(self, request: Any, **options: Any) -> Any:
            return super().send(request, **{**options, "timeout": SECONDS})

    registry = Registry(insecure=_is_loopback(url.place.partition(":")[0]))
    # By itself it tries for two minutes; a request waits for this.
    registry.do_request = type(registry).do_request.__wrapped__.__get__(registry)
    for scheme in ("http://", "https://"):
        registry.session.mount(scheme, Bounded())
    container = registry.get_container(url.text.removeprefix("oci://"))
    registry.auth.load_configs(container)
    return registry, container


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
