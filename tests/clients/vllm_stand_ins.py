"""pytest plugin that lets vLLM's own HTTP tests run, unmodified, against this server.

Where a test starts `vllm serve`, `quickchange serve` starts, with a tiny random model under the
name that the test asks for. What tests import from `vllm` or from `tests.utils` is stood in for: a
few things by what follows here, everything else by names that end the test as not applicable, since
it tests vLLM's own code. `vllm_entrypoints.py` runs it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, ClassVar

import httpx
import pytest

from quickchange_bench.load.load_client import ServedNames
from quickchange_bench.load.own_server import register
from quickchange_bench.load.server_process import (
    RunningServer,
    free_port,
    quickchange_command,
    running,
)
from quickchange_bench.models.random_adapters import AdapterSpec, write_in_this_process
from quickchange_server.api.app_state import VERSION

FOLDER = Path(os.environ["VLLM_TESTS_FOLDER"])  # holds the model; adapters and the report go there
MODEL, THINKING = FOLDER / "model", FOLDER / "thinking"
NAMES = os.environ["VLLM_TESTS_NAMES"].split(",")  # models that the tests ask for
OWN_CODE = "tests vLLM's own code"
_PLATFORMS = ("is_rocm", "is_cuda", "is_xpu", "is_cuda_alike", "is_tpu", "is_cpu")

# vLLM's options: how many values each has, and what stands for it here. None: nothing needs to.
OPTIONS: dict[str, tuple[int, str | None]] = {
    "--dtype": (1, None),
    "--enforce-eager": (0, None),
    "--max-model-len": (1, "--max-model-len"),
    "--max-num-seqs": (1, None),
    "--max-num-batched-tokens": (1, None),
    "--max-logprobs": (1, "--max-logprobs"),
    "--enable-chunked-prefill": (0, None),
    "--enable-prompt-tokens-details": (0, None),
    "--no-enable-prefix-caching": (0, "--no-prefix-cache"),
    "--enable-lora": (0, None),
    "--max-lora-rank": (1, None),
    "--max-loras": (1, None),
    "--max-cpu-loras": (1, None),
    "--gpu-memory-utilization": (1, None),
    "--enable-auto-tool-choice": (0, None),
    "--tool-call-parser": (1, None),
    "--reasoning-parser": (1, None),
    "--enable-tokenizer-info-endpoint": (0, None),
    "--enable-server-load-tracking": (0, None),
    "--enable-per-request-metrics": (0, None),
    "--seed": (1, None),
    "--port": (1, None),
    "--trust-remote-code": (0, None),
    "--trust-request-chat-template": (0, None),
    "--runner": (1, None),
    "--tokenizer": (1, None),
    "--generation-config": (1, None),
    "--async-scheduling": (0, None),
    "--structured-outputs-config.backend": (1, None),
    "--structured-outputs-config.enable_in_reasoning": (1, None),
}

CONTEXT = 4_096  # of every server but those for which a test asks more

START_SECONDS = 300.0  # for what a test needs: its server's start takes minutes on a busy machine
CALL_SECONDS = 60.0  # for a test itself
FILE_SECONDS = 600.0  # for all tests of a file, the starts of servers among them

LISTING = {"test_models.py"}  # files whose tests expect one name in the list of models

# What makes a server's start short.
QUICK = ("--no-model-check", "--no-turbo", "--no-prompt-lookup", "--threads", "1")


class _Running:
    """The state of the run."""

    test: ClassVar[bool] = False  # a test runs; else modules are imported
    file: ClassVar[str] = ""  # of the test


def not_applicable(reason: str) -> Any:
    """End the test. A module that is imported goes on with something absent."""
    if not _Running.test:
        return _Absent(reason, (Exception,), {})
    return pytest.skip(reason)


class _Absent(type):
    """Classes that stand for what is vLLM's own: whatever uses one ends its test."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return not_applicable(cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__" if _Running.test else "_") or name == "pytestmark":
            raise AttributeError(name)
        return not_applicable(f"{cls.__name__}.{name}")

    def __getitem__(cls, _: Any) -> Any:
        return not_applicable(cls.__name__)


class _StandIn(ModuleType):
    """A module whose unknown names are absent."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "pytestmark":
            raise AttributeError(name)
        return _Absent(f"{OWN_CODE}: {name}", (Exception,), {"__module__": self.__name__})


class _Platform:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in _PLATFORMS:
            return not_applicable(f"{OWN_CODE}: current_platform.{name}")
        return lambda: name == "is_cpu"


class _Hub:
    """The hub: whatever adapter is asked for is a random one."""

    def snapshot_download(self, repo_id: str, **_: Any) -> str:
        name = repo_id.replace("/", "--")
        if not (FOLDER / name).exists():
            spec = AdapterSpec(rank=8, seed=zlib.crc32(name.encode()))
            write_in_this_process(MODEL, FOLDER, [name], spec)
        return str(FOLDER / name)


class _ModelConfig:
    def __init__(self, **_: Any) -> None:
        pass

    def get_vocab_size(self) -> int:
        return int(json.loads((MODEL / "config.json").read_text())["vocab_size"])


class _Environment:
    """vLLM's environment variables, none of which is set."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("VLLM_"):
            raise AttributeError(name)


def _get_tokenizer(tokenizer_name: str, **_: Any) -> Any:
    del tokenizer_name
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


class _Process:
    """A server that runs until another one is wanted: starts take most of the tests' time."""

    kept: ClassVar[dict[tuple[str, ...], _Process]] = {}

    def __init__(self, weights: Path, model: str, arguments: Sequence[str]) -> None:
        self._stack = ExitStack()
        folder = self._stack.enter_context(TemporaryDirectory(prefix="vllm-tests-"))
        self.port = free_port()
        command = quickchange_command(
            "serve",
            *(
                "--model",
                str(weights),
                "--store",
                f"{folder}/store",
                "--port",
                str(self.port),
            ),
            *("--dtype", "float32", "--served-model-name", model, *QUICK, *arguments),
        )
        self.running: RunningServer = self._stack.enter_context(
            running(
                command,
                url=f"http://127.0.0.1:{self.port}",
                target=ServedNames(model.split(",")[0]),
                log=FOLDER / "server.log",
            )
        )

    @classmethod
    def of(cls, weights: Path, model: str, arguments: Sequence[str]) -> _Process:
        """A server of the model under this name first, and of others where no test lists them."""
        named = [name for name in NAMES if name != model]
        names = model if _Running.file in LISTING else ",".join(sorted([model, *named]))
        key = (str(weights), names, *arguments)
        if key not in cls.kept:
            cls.end_all(but=[server.process for server in RemoteOpenAIServer.live])
            cls.kept[key] = cls(weights, names, arguments)
        return cls.kept[key]

    @classmethod
    def end_all(cls, *, but: Sequence[_Process] = ()) -> None:
        for key, process in [*cls.kept.items()]:
            if process not in but:
                cls.kept.pop(key)._stack.close()


class RemoteOpenAIServer:
    """A server started with the options of `vllm serve`."""

    DUMMY_API_KEY: ClassVar[str] = "token-abc123"
    live: ClassVar[list[RemoteOpenAIServer]] = []
    show_hidden_metrics = False

    def __init__(
        self,
        model: str,
        vllm_serve_args: Sequence[str],
        *,
        env_dict: dict[str, str] | None = None,
        seed: int | None = 0,
        auto_port: bool = True,
        max_wait_seconds: float | None = None,
        override_hf_configs: dict[str, Any] | None = None,
    ) -> None:
        del env_dict, seed, auto_port, max_wait_seconds  # nothing here needs them
        if override_hf_configs is not None:
            not_applicable("another configuration of the model")
        arguments, adapters = _translated([*vllm_serve_args])
        thinks = any(option.startswith("--reasoning-parser") for option in vllm_serve_args)
        self.process = _Process.of(THINKING if thinks else MODEL, model, arguments)
        self.host, self.port, self.uds = "127.0.0.1", self.process.port, None
        self.pid = self.process.running.pid
        register(self.process.running.url, adapters)
        self.live.append(self)

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.live.remove(self)
        with httpx.Client(base_url=self.url_root, timeout=60) as client:
            for model in client.get("/v1/models").json()["data"]:
                if model.get("parent") is not None:  # an adapter; the next test has its own
                    client.post("/v1/unload_lora_adapter", json={"lora_name": model["id"]})

    @property
    def url_root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *parts])

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        given.setdefault("timeout", 600)
        return {
            "base_url": self.url_for("v1"),
            "api_key": self.DUMMY_API_KEY,
            "max_retries": 0,
            **given,
        }

    def get_client(self, **given: Any) -> Any:
        import openai

        return openai.OpenAI(**self._options(given))

    def get_async_client(self, **given: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(**self._options(given))

    def get_client_anthropic(self, **given: Any) -> Any:
        import anthropic

        return anthropic.Anthropic(**{**self._options(given), "base_url": self.url_root})

    def get_async_client_anthropic(self, **given: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(**{**self._options(given), "base_url": self.url_root})


def _translated(given: list[str]) -> tuple[list[str], dict[str, Path]]:
    """Our options for vLLM's, and the adapters that they name."""
    arguments = ["--max-model-len", str(CONTEXT)]
    adapters: dict[str, Path] = {}
    while given:
        option, *joined = given.pop(0).split("=", 1)
        option = option if option == "--port" else option.replace("_", "-", option.count("_"))
        given[:0] = joined
        if option == "--lora-modules":
            while given and not given[0].startswith("--"):
                named = given.pop(0)
                if named.startswith("{"):
                    module = json.loads(named)
                    adapters[module["name"]] = Path(module["path"])
                else:
                    name, _, path = named.partition("=")
                    adapters[name] = Path(path)
            continue
        if option == "--max-model-len" and int(given[0]) <= CONTEXT:
            given.pop(0)  # so that servers are alike
            continue
        if option not in OPTIONS:
            not_applicable(f"vLLM's option {option}")
        count, ours = OPTIONS[option]
        values = [given.pop(0) for _ in range(count)]
        if ours is not None:
            arguments += [ours, *values]
    return arguments, adapters


def _module(name: str, **names: Any) -> ModuleType:
    module = _StandIn(name)
    module.__path__ = []
    vars(module).update(names)
    return module


def _mark(*_: Any, **__: Any) -> Any:
    return pytest.mark.skip(reason="needs GPUs")


KNOWN = {
    "vllm": {"envs": _Environment()},
    "vllm.platforms": {"current_platform": _Platform()},
    "vllm.tokenizers": {"get_tokenizer": _get_tokenizer},
    "vllm.version": {"__version__": VERSION},
    "vllm.config": {"ModelConfig": _ModelConfig},
    "vllm.transformers_utils.repo_utils": {"hf_api": _Hub},
    "vllm.utils.network_utils": {"get_open_port": free_port},
    "vllm.logger": {"init_logger": __import__("logging").getLogger},
    "tests.utils": {
        "RemoteOpenAIServer": RemoteOpenAIServer,
        "RemoteLaunchRenderServer": RemoteOpenAIServer,
        "ROCM_EXTRA_ARGS": [],
        "VLLM_PATH": FOLDER,
        "requires_fp8": lambda test: test,
        **dict.fromkeys(("multi_gpu_test", "multi_gpu_only", "large_gpu_mark"), _mark),
    },
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds vLLM's modules, all of which are stand-ins."""

    def find_spec(self, name: str, *_: Any) -> Any:
        ours = name == "vllm" or name.startswith("vllm.") or name == "tests.conftest"
        return importlib.util.spec_from_loader(name, self) if ours or name in KNOWN else None

    def create_module(self, spec: Any) -> ModuleType:
        return _module(spec.name, **KNOWN.get(spec.name, {}))

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "vllm.version":
            vars(module)["_prev_minor_version"] = lambda: "0.0"


sys.meta_path.insert(0, _Finder())


@pytest.fixture(autouse=True, scope="session")
def _one_tokenizer() -> Iterator[None]:
    """Whatever tokenizer is asked for by a hub's name is the model's."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained
    AutoTokenizer.from_pretrained = lambda *_, **__: made(MODEL)
    yield
    AutoTokenizer.from_pretrained = made


class _Limits:
    """Bounds on the time of each test and each file: a test that hangs fails, and the run ends."""

    def __init__(self) -> None:
        self._spent: dict[Path, float] = {}
        signal.signal(signal.SIGALRM, self._end)

    @staticmethod
    def _end(*_: object) -> None:
        pytest.fail("took too long")

    @contextmanager
    def _bounded(self, file: Path, seconds: float) -> Iterator[None]:
        left = FILE_SECONDS - self._spent.get(file, 0.0)
        if left <= 0:
            pytest.fail(f"the file took more than {FILE_SECONDS:.0f} s")
        started = time.monotonic()
        signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended"))  # the servers end with it
        signal.setitimer(signal.ITIMER_REAL, min(seconds, left))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            self._spent[file] = self._spent.get(file, 0.0) + time.monotonic() - started

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        _Running.file = item.path.name
        with self._bounded(item.path, START_SECONDS):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with self._bounded(item.path, CALL_SECONDS):
            return (yield)


class _Report:
    """Outcomes of the tests, as JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._served: set[str] = set()

    def pytest_runtest_logstart(self) -> None:
        _Running.test = True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        if RemoteOpenAIServer.live:
            self._served.add(item.nodeid)
        started = len(RemoteOpenAIServer.live)
        yield
        if started != len(RemoteOpenAIServer.live):
            self._served.add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        if report.passed and report.nodeid in self._served:
            self._write(report.nodeid, "pass", "")
        elif report.passed:
            self._write(report.nodeid, "n/a", OWN_CODE)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self._write(report.nodeid, "n/a", reason.removeprefix("Skipped: "))
        else:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._write(report.nodeid, "fail", str(crash.message if crash else report.longrepr))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self._write(report.nodeid, "n/a", report.longrepr[2].removeprefix("Skipped: "))
        elif report.failed:
            self._write(report.nodeid, "fail", f"not collected: {str(report.longrepr)[-300:]}")

    def _write(self, test: str, outcome: str, reason: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "reason": reason}) + "\n")


def pytest_sessionfinish() -> None:
    _Process.end_all()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Limits())
    config.pluginmanager.register(_Report(FOLDER / "report.jsonl"))
