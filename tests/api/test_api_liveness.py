"""The probes of a server whose engines fail: it says so, refuses with a time, and heals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from fake_engine import Behaviour
from http_support import BASE, live_server, wait_until

from quickchange_server.engine_client.local import supervisor


def test_liveness_fails_while_engines_fail_and_comes_back_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 2)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_SECONDS", 1.0)
    broken = tmp_path / "broken"
    with live_server(tmp_path, Behaviour(broken=broken)) as live:
        wait_until(lambda: live.http.get("/health").status_code == 200)
        assert live.http.get("/health/live").json() == {"state": "live"}
        broken.touch()
        engine = live.services.client.pid
        assert engine is not None
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: live.http.get("/health/live").status_code == 503)
        assert live.http.get("/health/live").json() == {"state": "failed"}
        assert live.http.get("/health/ready").status_code == 503
        refused = live.post("/v1/completions", {"model": BASE, "prompt": "a"})
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["retry-after"]) <= 60  # the pause, and a start's time
        broken.unlink()
        wait_until(lambda: live.http.get("/health/live").status_code == 200)
        assert live.post("/v1/completions", {"model": BASE, "prompt": "a"}).status_code == 200
