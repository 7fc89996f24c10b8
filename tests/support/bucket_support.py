"""Stores in buckets for tests: in this process's memory, and on a small S3 server on loopback."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from quickchange_store.places.bucket_place import BucketPlace
from quickchange_store.places.objects import Objects
from quickchange_store.places.version_cache import VersionCache
from quickchange_store.store import Store

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server with one bucket, `adapters`; gives its URL, which the environment names."""
    import botocore.retryhandler
    import fsspec

    # A call that was given up is retried on a thread, beside the next file's tests: it must not
    # draw from the generator that hypothesis watches.
    botocore.retryhandler.random = random.Random()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # A process of its own: on a thread it draws random numbers beside hypothesis, and parses code.
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = {name: os.environ.get(name) for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")}
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=url)
    try:
        _wait_for(url, server)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("adapters")
        yield url
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end and server.poll() is None:
        with suppress(httpx.TransportError):
            httpx.get(url)
            return
        time.sleep(0.05)
    raise TimeoutError("the S3 server did not start")


def store_on(filesystem: Any, root: str, cache: Path, limit: int = 1 << 30) -> Store:
    """A store on a file system made by a test, which may fail or wait."""
    store = Store(f"memory://{root}", cache, limit)
    objects = Objects(filesystem, f"/{root}", f"memory://{root}")
    store._place = BucketPlace(objects, VersionCache(cache, limit))
    return store


def look(*stores: Store) -> None:
    """Let readers of stores in buckets see what is the newest now, as they do by themselves."""
    for store in stores:
        if isinstance(store._place, BucketPlace):
            store._place._indexes.look()


def file_system_of(store: Store) -> Any:
    """The fsspec file system of a store in a bucket."""
    place = store._place
    assert isinstance(place, BucketPlace)
    return place._objects._files


def remove_memory() -> None:
    """Forget every object of memory:// file systems."""
    import fsspec

    fsspec.filesystem("memory").rm("/", recursive=True)
