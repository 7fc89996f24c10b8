"""Adapters over spans of a text equal a model whose rows in the spans alone take their updates.

The reference is transformers with hooks that add each update to the rows of its span, over the
whole text and without a cache. Served: schedules by position, in chunks, from cached prefixes,
preempted, with drafts, with two steps in flight, from graphs, and with recurrent layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bought_drafts import every_draft_bought
from engine_driver import Driver, make_engine, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_models import make_recurrent, save_recurrent
from repeating_capture import RepeatingCapture
from tiny_models import greedy, make_model, save_model

from quickchange_server.engine import model_runner
from quickchange_server.engine.engine import Engine
from quickchange_server.protocol import Component, Drafting
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

COUNT = 8
LONGEST = 34  # tokens of a prompt
NAMES = ("small", "wide", "tall")
RANKS = dict(zip(NAMES, (2, 8, 20), strict=True))


@dataclass(frozen=True)
class Based:
    """A base, adapters of it, and how they are made again as transformers' model."""

    path: Path
    make: Callable[[], torch.nn.Module]
    adapters: dict[str, CanonicalAdapter]

    def engine(self, **options: object) -> Engine:
        small: dict[str, object] = {"kv_cache_bytes": 1 << 20, "max_model_len": 96}
        return make_engine(self.path, self.adapters.__getitem__, **{**small, **options})

    @contextmanager
    def serving(
        self, model: torch.nn.Module, components: Sequence[Component]
    ) -> Iterator[torch.nn.Module]:
        """The model with hooks for the components."""
        modules = dict(model.named_modules())
        with ExitStack() as hooked:
            for component in components:
                for path, update in self.adapters[component.digest].updates.items():
                    hook = modules[path].register_forward_hook(adding(component, update))
                    hooked.callback(hook.remove)
            yield model


Asked = tuple[list[int], tuple[Component, ...]]


def adding(component: Component, update: LowRankUpdate) -> Any:
    """A hook that adds the update to a module's rows in the component's span."""

    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
        rows = slice(component.begin, component.end)
        low = torch.nn.functional.linear(inputs[0][:, rows], update.a)
        y[:, rows] += component.weight * update.scale * torch.nn.functional.linear(low, update.b)

    return hook


def based(
    path: Path, make: Callable[[], torch.nn.Module], targets: Sequence[str] | None = None
) -> Based:
    spec = base_spec(str(path))
    adapters = {}
    for name, rank in RANKS.items():
        generator = torch.Generator().manual_seed(rank)
        updates = {
            module: LowRankUpdate(
                torch.randn(rank, shape.in_features, generator=generator) * 0.2,
                torch.randn(shape.out_features, rank, generator=generator) * 0.2,
                scale=0.5,
            )
            for module, shape in spec.modules.items()
            if shape.kind == "linear" and (targets is None or module.rpartition(".")[2] in targets)
        }
        assert updates
        adapters[name] = CanonicalAdapter(spec.architecture, spec.name, updates)
    return Based(path, make, adapters)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Based:
    path = save_model("llama", tmp_path_factory.mktemp("spans") / "base")
    return based(path, lambda: make_model("llama"))


@st.composite
def spans(draw: st.DrawFn, name: str) -> list[Component]:
    """Spans of one adapter that do not overlap, in order."""
    borders = draw(st.lists(st.integers(0, LONGEST + COUNT), min_size=1, max_size=4, unique=True))
    borders.sort()
    found = []
    for begin, end in zip(borders, [*borders[1:], None], strict=True):
        weight = draw(st.sampled_from([0.0, 1.0, -0.6]))
        if weight:
            found.append(Component(name, weight, begin, end))
    return found


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    generator = random.Random(draw(st.integers(0, 3)))  # few: requests share prefixes
    text = [generator.randrange(90) for _ in range(LONGEST)]
    names = draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True))
    components = [term for name in sorted(names) for term in draw(spans(name))]
    return text[: draw(st.integers(1, LONGEST))], tuple(components)


def check(base: Based, batch: list[Asked], engine: Engine, drafting: Drafting | None) -> Driver:
    """Compare what an engine says, all in one batch, with the reference."""
    drive = Driver(engine)
    for key, (prompt, components) in enumerate(batch):
        asking = request(str(key), prompt, max_tokens=COUNT)
        engine.submit(replace(asking, adapters=components, drafting=drafting))
        if key % 3 == 2:
            drive.step()
    drive.finish(*map(str, range(len(batch))))
    engine.close()
    model = base.make()
    with torch.inference_mode():
        for key, one in enumerate(batch):
            prompt, components = one
            with base.serving(model, components):
                assert drive.tokens[str(key)] == greedy(model, prompt, COUNT), one
    return drive


@contextmanager
def graphs(served: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if served:
            patch.setattr(model_runner, "capture_for", lambda _device: RepeatingCapture())
        yield


@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.lists(asked(), min_size=1, max_size=9),
    rows=st.sampled_from([16, 24, 128]),
    depth=st.sampled_from([1, 2]),
    from_graphs=st.booleans(),
    drafting=st.sampled_from([None, Drafting(lookup=True)]),
)
def test_spans_equal_the_reference_however_they_are_computed(
    llama: Based,
    batch: list[Asked],
    rows: int,
    depth: int,
    from_graphs: bool,
    drafting: Drafting | None,
) -> None:
    with graphs(from_graphs), every_draft_bought():
        engine = llama.engine(max_batch_tokens=rows, depth=depth)
        check(llama, batch, engine, drafting)


def schedules(count: int) -> list[Asked]:
    """Requests whose weights change within blocks, chunks, drafts and the output."""
    generator = random.Random(5)
    made = []
    for index in range(count):
        text = [index % 3] * 6 + [generator.randrange(90) for _ in range(generator.randint(4, 24))]
        border = generator.randint(1, len(text) + 4)
        one, other = generator.sample(NAMES, 2)
        terms = (
            Component(one, 0.8, 0, border),
            Component(one, -0.5, border),
            Component(other, 1.0, max(border - 3, 0), border + 5),
        )
        made.append((text, terms))
    return made


def test_preempted_schedules_equal_the_reference(llama: Based) -> None:
    small = 3 * 2 * 2 * 12 * 4 * 64 * 3 // 2  # 96 tokens
    drive = check(llama, schedules(12), llama.engine(kv_cache_bytes=small), None)
    assert drive.engine.scheduler.preemptions > 0


def test_drafts_across_a_border_are_verified_under_what_each_row_takes(llama: Based) -> None:
    repeating = [
        ([7, 8, 9, 10] * 5, (Component("wide", 1.0, begin), Component("small", 0.7, 0, begin + 2)))
        for begin in range(18, 27)
    ]
    with every_draft_bought():
        drive = check(llama, repeating, llama.engine(max_batch_tokens=48), Drafting(lookup=True))
    assert sum(drive.drafted.values()) > 0


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("lfm2", ["in_proj", "q_proj", "w1"]), ("qwen3_5_text", ["in_proj_qkv", "q_proj", "up_proj"])],
)
def test_recurrent_layers_read_states_of_what_each_row_took(
    kind: str, targets: list[str], tmp_path: Path
) -> None:
    base = based(save_recurrent(kind, tmp_path / "base"), lambda: make_recurrent(kind), targets)
    twice = schedules(6) * 2  # the second time from kept states
    engine = base.engine(kv_cache_bytes=4 << 20, max_sequences=5)
    drive = check(base, twice, engine, None)
    assert drive.engine.scheduler.prefix_hit_tokens > 0
    with every_draft_bought():
        engine = base.engine(kv_cache_bytes=4 << 20)
        check(base, schedules(6), engine, Drafting(lookup=True))


def test_what_is_read_of_a_prompt_is_read_under_its_spans(llama: Based) -> None:
    """Log-probabilities and vectors, in chunks, beside each other."""
    engine = llama.engine(max_sequences=18, max_batch_tokens=20)
    drive = Driver(engine)
    batch = schedules(6)
    for key, (prompt, components) in enumerate(batch):
        scored = request(f"scores/{key}", prompt, max_tokens=1, prompt_logprobs=0)
        engine.submit(replace(scored, adapters=components))
        for pooling in ("last", "mean"):
            pooled = request(f"{pooling}/{key}", prompt, max_tokens=0, pooling=pooling)
            engine.submit(replace(pooled, adapters=components))
    drive.finish(*(f"{kind}/{k}" for kind in ("scores", "last", "mean") for k in range(len(batch))))
    engine.close()
    model = llama.make()
    for key, (prompt, components) in enumerate(batch):
        with torch.inference_mode(), llama.serving(model, components):
            out = model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True)
        scores = out.logits[0].log_softmax(-1)
        expected = [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
        found = [score.logprob for score in drive.first[f"scores/{key}"].prompt_logprobs]
        assert found == pytest.approx(expected, abs=2e-3)
        states = out.hidden_states[-1][0]
        for pooling, wanted in (("last", states[-1]), ("mean", states.mean(0))):
            embedding = drive.last[f"{pooling}/{key}"].embedding
            assert embedding is not None
            vector = torch.frombuffer(bytearray(embedding), dtype=torch.float32)
            torch.testing.assert_close(vector, wanted, atol=2e-3, rtol=2e-3)
