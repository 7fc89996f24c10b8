"""The way of one streamed completion, as it is seen while a server on a tiny model answers it.

The event loop's calls are watched with a profile function, the engine's operations with a dispatch
mode, and frames say which files are in between. Knows two names of the server's: the channel's
`send`, and the prefix of the low-rank operations.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import torch
from source_tree import REPOSITORY, SOURCE_ROOTS, SourceTree
from text_of_pieces import text_of_pieces
from tiny_models import VOCABULARY, save_model
from torch.utils._python_dispatch import TorchDispatchMode

SUBMITS = "EngineChannel.send"
KERNEL = "quickchange::lowrank"
ROUTE = "run_endpoint_function"  # FastAPI's, which calls the route
SENDS = "stream_response"  # the response's, which reads the stream and sends it
ENGINE = "engine_main"  # the engine process's entry, which a request does not pass
LIMIT_SECONDS = 300.0  # the engine starts in a few, on a machine with nothing else to do
REQUEST = {
    "model": "adapter",
    "prompt": [1, 2, 3, 4, 5],
    "max_tokens": 4,
    "temperature": 0,
    "stream": True,
}


@dataclass
class RequestPath:
    """Files from outermost to innermost, and the asynchronous functions that a token passes."""

    api: list[str] = field(default_factory=list)
    engine: list[str] = field(default_factory=list)
    asynchronous: list[str] = field(default_factory=list)
    iterators: int = 0  # those of them that hand on one item after another

    @property
    def files(self) -> list[str]:
        """The files that a request passes, from its route to the kernel."""
        return list(dict.fromkeys([*self.api, *self.engine]))

    @property
    def layers(self) -> int:
        """Asynchronous functions between the engine's messages and the socket."""
        return len(self.asynchronous)


def trace() -> RequestPath:
    """Serve one completion by an adapter and say what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(asyncio.wait_for(_trace(Path(folder)), LIMIT_SECONDS))


async def _trace(folder: Path) -> RequestPath:
    app = _application(folder)
    path = RequestPath()
    async with app.router.lifespan_context(app):
        await app.state.services.started
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            with _watched(path):
                response = await client.post("/v1/completions", json=REQUEST)
    if response.status_code != 200 or "[DONE]" not in response.text:
        raise RuntimeError(f"no stream came: {response.status_code} {response.text}")
    path.engine = json.loads((folder / "engine.json").read_text())
    for side in ("api", "engine", "asynchronous"):
        if not getattr(path, side):
            raise RuntimeError(f"nothing was seen of the {side} side; adapt {__file__}")
    return path


# --- the server ---------------------------------------------------------------------------------


def _application(folder: Path) -> Any:
    """The server on a tiny model with one adapter. The engine runs in its own process."""
    found = _Definitions(SourceTree.read())
    model = save_model("llama", folder / "model")
    _store_adapter(found, folder / "store", model)
    settings = found("Settings")(
        model=str(model),
        store=folder / "store",
        kv_cache_bytes=4 << 20,
        threads=1,
        prompt_lookup=False,  # the model has no tokenizer
    )
    engine = partial(_watched_engine, folder / "engine.json", found("engine_main"))
    pieces = [chr(ord(" ") + token) for token in range(VOCABULARY)]
    text = text_of_pieces(pieces, end=VOCABULARY - 1)
    engines = partial(found("LocalEngines"), main=engine)
    return found("create_app")(settings, text=text, engines=engines)


class _Definitions:
    """Finds a class or function by its name, in whichever module it is defined."""

    def __init__(self, source: SourceTree) -> None:
        self._source = source

    def __call__(self, name: str) -> Any:
        for module in self._source.modules:
            if any(getattr(node, "name", None) == name for node in module.tree.body):
                return getattr(importlib.import_module(module.name), name)
        raise LookupError(f"{name} is defined nowhere; adapt {__file__}")


def _store_adapter(found: _Definitions, folder: Path, model: Path) -> None:
    spec = found("base_spec")(str(model))
    updates = {
        name: found("LowRankUpdate")(
            torch.full((4, shape.in_features), 0.01), torch.ones(shape.out_features, 4), 1.0
        )
        for name, shape in spec.modules.items()
        if shape.kind == "linear" and "layers" in name
    }
    adapter = found("CanonicalAdapter")(spec.architecture, spec.name, updates)
    found("Store")(folder).add("adapter", adapter)


# --- what is watched ----------------------------------------------------------------------------


@contextmanager
def _watched(path: RequestPath) -> Iterator[None]:
    """Fill in `path` from the calls of this thread, and from its coroutines as they go on."""

    def call(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not _is_ours(frame):
            return
        if code.co_qualname == SUBMITS and _carries(frame, "Submit"):
            path.api = _files(_stack(frame, ROUTE))
        elif code.co_flags & _ASYNCHRONOUS:
            _record(path, _stack(frame, SENDS, inclusive=True))

    sys.setprofile(call)
    try:
        yield
    finally:
        sys.setprofile(None)


_ASYNCHRONOUS = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _record(path: RequestPath, stack: Sequence[FrameType]) -> None:
    """Keep the stack with most iterators: that of a token which has just come."""
    passed = [frame for frame in stack if frame.f_code.co_flags & _ASYNCHRONOUS]
    iterators = sum(map(_is_iterator, passed))
    if (iterators, len(passed)) > (path.iterators, len(path.asynchronous)):
        path.asynchronous = [f"{_file(f)}:{f.f_code.co_qualname}" for f in passed]
        path.iterators = iterators


def _is_iterator(frame: FrameType) -> bool:
    code = frame.f_code
    return bool(code.co_flags & inspect.CO_ASYNC_GENERATOR) or code.co_name == "__anext__"


def _carries(frame: FrameType, type_name: str) -> bool:
    return any(type(value).__name__ == type_name for value in frame.f_locals.values())


class _KernelCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the files between the engine's entry and the last call of a low-rank operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.files: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.name().startswith(KERNEL):
            self.files = _files(_stack(sys._getframe(1), ENGINE))
        return func(*args, **(kwargs or {}))


def _watched_engine(
    result: Path,
    engine_main: Callable[[Connection, Any], None],
    connection: Connection,
    settings: Any,
) -> None:
    """The engine's entry, in its own process; its files are written to `result` at its end."""
    with _KernelCalls() as calls:
        engine_main(connection, settings)
    result.write_text(json.dumps(calls.files))


# --- frames -------------------------------------------------------------------------------------


def _stack(frame: FrameType, within: str, *, inclusive: bool = False) -> list[FrameType]:
    """Our frames inside the call named `within`, outermost first; none where there is no such call.

    inclusive: that call's own frame as well, where it is ours.
    """
    frames: list[FrameType] = []
    current: FrameType | None = frame
    while current is not None:
        ends = current.f_code.co_name == within
        if _is_ours(current) and (inclusive or not ends):
            frames.append(current)
        if ends:
            return frames[::-1]
        current = current.f_back
    return []


_OURS = tuple(str(REPOSITORY / root) for root in SOURCE_ROOTS)


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_OURS)


def _file(frame: FrameType) -> str:
    return str(Path(frame.f_code.co_filename).relative_to(REPOSITORY))


def _files(frames: Sequence[FrameType]) -> list[str]:
    return list(dict.fromkeys(map(_file, frames)))


if __name__ == "__main__":
    seen = trace()
    print(f"{len(seen.files)} files from the route to the kernel:", *seen.files, sep="\n  ")
    print(f"a token passes {seen.layers} asynchronous layers:", *seen.asynchronous, sep="\n  ")
