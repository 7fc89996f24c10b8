"""One limit for two ingresses, and what is spent while its counter is dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cluster_harness import LIMIT_SECONDS, LiveCluster
from cluster_streams import PROMPT, tell
from keys_support import bearer, make_key

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]

LIMIT = 600  # tokens a minute
ANSWER = 44
EACH = len(PROMPT) + ANSWER  # 60, with a token a character
THREADS = 6


@pytest.fixture(scope="module")
def keyed(cluster: LiveCluster, store: Path) -> Iterator[LiveCluster]:
    """The cluster, asking for keys; its client brings an admin's."""
    _, secret = make_key(store, "operator", "admin")
    before = cluster.settings
    cluster.redeploy(before.model_copy(update={"api_keys": True}), engines=1)
    cluster.http.headers.update(bearer(secret))
    cluster.wait_for("Ingress", 2)
    yield cluster
    del cluster.http.headers["Authorization"]
    cluster.redeploy(before, engines=2)


def spend(cluster: LiveCluster, secret: str, seconds: float) -> tuple[int, set[str]]:
    """Tokens that a key gets by asking without pause; and what its refusals said."""
    spent: list[int] = []
    refusals: set[str] = set()
    end = time.monotonic() + seconds

    def work() -> None:
        body = {
            "model": "sql",
            "prompt": PROMPT,
            "max_tokens": ANSWER,
            "ignore_eos": True,
        }
        with httpx.Client(
            base_url=cluster.url, timeout=LIMIT_SECONDS, headers=bearer(secret)
        ) as http:
            while time.monotonic() < end:
                answer = http.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    spent.append(answer.json()["usage"]["total_tokens"])
                else:
                    assert answer.status_code == 429, answer.text
                    refusals.add(answer.json()["error"]["message"])
                    time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(spent), refusals


def test_600_tokens_a_minute_over_two_ingresses_are_spent_to_the_last_and_not_above(
    keyed: LiveCluster, store: Path
) -> None:
    _, secret = make_key(store, "acme", tokens_per_minute=LIMIT)
    time.sleep(1.5)  # ingresses read keys once a second
    spent, refusals = spend(keyed, secret, 8.0)
    tell("600 tokens/minute, two ingresses", spent=spent, bound=LIMIT)
    assert spent == LIMIT // EACH * EACH
    assert all("tokens_per_minute" in refusal for refusal in refusals)
    assert refusals


def test_with_its_counter_killed_a_limit_is_spent_once_for_each_ingress_at_most(
    keyed: LiveCluster, store: Path
) -> None:
    _, secret = make_key(store, "globex", tokens_per_minute=LIMIT)
    time.sleep(1.5)
    killer = threading.Timer(1.0, keyed.kill, ("Board",))
    killer.start()
    spent, _ = spend(keyed, secret, 12.0)
    killer.join()
    tell("the same, the counter killed after 1 s", spent=spent, bound=2 * LIMIT)
    assert LIMIT // EACH * EACH <= spent <= 2 * LIMIT
