"""Adapters published, rolled back and renamed at one ingress, and what the other answers then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cluster_harness import LiveCluster, wait_until
from cluster_streams import Asked, Streams, expected, series, tell
from llm_models import LlmModels
from random_updates import random_adapter, write_peft

from quickchange_server.entrypoints.llm import LLM
from quickchange_store.base_model.base_spec import base_spec

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]

SEEN_SECONDS = 1.0  # after the answer to a change every ingress goes by it
WATCHED_SECONDS = 2.5
ONE, TWO = "lora-00", "lora-01"  # have the weights of the versions that are published here
SHORT, LONG = 16, 1500  # tokens


@pytest.fixture(scope="module")
def restored(cluster: LiveCluster) -> Iterator[LiveCluster]:
    """The cluster, which in the end is as before."""
    before = cluster.settings
    yield cluster
    cluster.redeploy(before, engines=2)


@pytest.fixture(scope="module", params=["folder", "bucket"])
def published(
    request: pytest.FixtureRequest,
    restored: LiveCluster,
    bucket: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> LiveCluster:
    """The cluster on an empty store, with one engine."""
    folder = tmp_path_factory.mktemp("published")
    changes = {
        "store": bucket if request.param == "bucket" else str(folder / "store"),
        "store_cache": str(folder / "cache"),
        "database": f"sqlite:///{folder}/quickchange.sqlite3",
    }
    restored.redeploy(restored.settings.model_copy(update=changes), engines=1)
    restored.wait_for("Ingress", 2)
    return restored


@pytest.fixture(scope="module")
def folders(models: LlmModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """PEFT folders of the two versions."""
    base, folder = base_spec(str(models.path)), tmp_path_factory.mktemp("versions")
    one, two = (write_peft(random_adapter(base, seed), folder / str(seed)) for seed in (0, 1))
    return one, two


Change = Callable[[], httpx.Response]


@dataclass(frozen=True)
class Answered:
    sent: float  # seconds after the answer to the change
    status: int
    text: str


class Asking:
    """What is asked of a cluster whose ingresses are new, so that all they count is from here."""

    def __init__(self, cluster: LiveCluster) -> None:
        self._cluster = cluster
        self._ingresses = {f"ingress-{replica}" for replica, _, _ in cluster.replicas("Ingress")}
        self.asked = 0

    def watch(self, model: str, change: Change) -> list[Answered]:
        """What is answered by the name from the change on; both ingresses must have."""
        before = self._counted()
        change().raise_for_status()
        changed = time.monotonic()
        answers: list[Answered] = []

        def ask() -> None:
            while (sent := time.monotonic() - changed) < WATCHED_SECONDS:
                body = Asked(model, 1, SHORT).body
                given = self._cluster.http.post("/v1/completions", json=body)
                found = given.status_code == 200
                text = given.json()["choices"][0]["text"] if found else given.text
                answers.append(Answered(sent, given.status_code, text))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.asked += len(answers)
        after = self._counted()
        assert {i for i in after if after[i] > before.get(i, 0)} == self._ingresses
        return answers

    def _counted(self) -> dict[str, float]:
        """Answers by ingress, once all that were begun are counted."""
        found: dict[str, float] = {}

        def all_counted() -> bool:
            route = "/v1/completions"
            told = series(self._cluster.http, "quickchange_http_responses_total", route=route)
            found.update({i: n for i, n in told.items() if i in self._ingresses})
            return sum(found.values()) >= self.asked

        wait_until(all_counted)
        return found


def test_changes_at_one_ingress_are_the_others_within_a_second_and_streams_keep_their_version(
    published: LiveCluster, folders: tuple[Path, Path], single: LLM, request: pytest.FixtureRequest
) -> None:
    http = published.http
    one, two = (
        said.text for said in expected(single, [Asked(ONE, 1, SHORT), Asked(TWO, 1, SHORT)])
    )
    assert one != two
    asking, late = Asking(published), dict[str, float]()

    def check(step: str, model: str, old: str | None, new: str, call: Change) -> None:
        answers = asking.watch(model, call)
        stale = [a for a in answers if not (a.status == 200 and a.text == new)]
        for answer in stale:
            assert answer.sent < SEEN_SECONDS, f"{step}: {answer}"
            if old is None:
                assert answer.status == 404, f"{step}: {answer}"
            else:
                assert (answer.status, answer.text) == (200, old), f"{step}: {answer}"
        late[step] = round(max((answer.sent for answer in stale), default=0.0), 3)
        assert any(answer.sent >= SEEN_SECONDS for answer in answers)

    def add(folder: Path) -> Change:
        def call() -> httpx.Response:
            files = {path.name: (path.name, path.read_bytes()) for path in folder.iterdir()}
            return http.post("/v1/adapters", data={"name": "made"}, files=files)

        return call

    def point(target: str) -> Change:
        return lambda: http.put("/v1/aliases/live", json={"target": target})

    check("add", "made", None, one, add(folders[0]))
    check("alias", "live", None, one, point("made@1"))
    asked = [Asked(name, seed, LONG) for name in ("made", "live") for seed in (7, 8)]
    right = [Asked(ONE, one_asked.seed, LONG) for one_asked in asked]
    with ThreadPoolExecutor(1) as pool:
        texts = pool.submit(expected, single, right)
        streams = Streams(http, asked)
        asking.asked += len(asked)
        streams.wait_for_tokens(1)
        check("second version", "made", one, two, add(folders[1]))
        check("rollback", "made", two, one, lambda: http.post("/v1/adapters/made/rollback"))
        check("alias moved", "live", one, two, point("made@2"))
        assert [stream.said for stream in streams.ended()] == texts.result()
    store = request.node.callspec.params["published"]
    tell(f"seen by all ingresses, store in a {store}, seconds", **late)
