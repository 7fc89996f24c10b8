"""Sums of adapters under a name: what they are made of, what is refused, what keeps them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.composition_part import MAX_TERMS, Term
from quickchange_store.cli import app
from quickchange_store.combining.composing import GivenTerm, compose
from quickchange_store.combining.merging import Recipe, derive
from quickchange_store.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    CorruptStoreError,
    InvalidAdapterError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.vocabulary.resized_vocabulary import NEVER
from quickchange_store.index import Index, decode, encode
from quickchange_store.store import Store

ATTENTION, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def make(value: float, architecture: str = "LlamaForCausalLM") -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(int(value * 100))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    updates = {
        ATTENTION: LowRankUpdate(drawn(2, 4), drawn(4, 2), 0.5, bias=drawn(4), gain=drawn(4)),
        MLP: LowRankUpdate(drawn(3, 4), drawn(8, 3), 2.0),
    }
    return CanonicalAdapter(architecture, "tiny", updates)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    for name, value in (("tone", 1.0), ("german", 2.0)):
        made.add(name, make(value))
    return made


def effect(update: LowRankUpdate, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What an update adds to the module's output y, by its definition, in float64."""
    found = update.scale * (update.b.double() @ (update.a.double() @ x))
    bias = torch.zeros(len(y)).double() if update.bias is None else update.bias.double()
    gain = torch.ones(len(y)).double() if update.gain is None else update.gain.double()
    return found + bias + (gain - 1) * y


def test_a_composition_names_the_versions_that_its_terms_mean_now(store: Store) -> None:
    terms = [GivenTerm("tone", 0.7), GivenTerm("german", -0.2, begin=3, end=9)]
    version = compose(store, "both", terms)
    digests = [store.resolve(name).digest for name in ("tone", "german")]
    wanted = {Term(digests[0], 0.7), Term(digests[1], -0.2, 3, 9)}
    assert set(store.info(version.digest).composition) == wanted
    assert set(version.needs) == set(store.resolve("both").served) == set(digests)
    store.add("tone", make(9.0))  # the name serves another version now, the composition does not
    loaded = store.load(version.digest)
    assert loaded.composition is not None
    assert set(loaded.composition.terms) == wanted
    assert compose(store, "again", terms).digest != version.digest


def test_equal_sums_are_one_version_whatever_the_order_and_the_names(store: Store) -> None:
    store.alias("warm", "tone")
    one = compose(store, "one", [GivenTerm("tone", 0.5), GivenTerm("german")])
    other = compose(store, "other", [GivenTerm("german@1"), GivenTerm("warm", 0.5)])
    assert one.digest == other.digest


@settings(deadline=None)
@given(
    factor=st.floats(-8, 8, allow_nan=False, width=32),
    pattern=st.sampled_from(["*", "*.mlp.*", "*.self_attn.*", MLP]),
)
def test_a_scale_multiplies_what_the_modules_that_fit_add(factor: float, pattern: str) -> None:
    from fnmatch import fnmatchcase
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.add("tone", make(1.0))
        compose(store, "scaled", [GivenTerm("tone", 0.5, scales={pattern: factor})])
        (term,) = store.info(store.resolve("scaled").digest).composition
        scaled = store.load(term.digest)
        x = torch.arange(4.0).double() - 1
        for path, update in make(1.0).updates.items():
            y = torch.arange(float(len(update.b))).double() + 2
            wanted = effect(update, x, y) * (factor if fnmatchcase(path, pattern) else 1)
            made = scaled.updates.get(path)
            found = torch.zeros_like(y) if made is None else effect(made, x, y)
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert term.weight == 0.5


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5])
def test_no_scale_lets_tokens_come_that_an_adapter_lacks(store: Store, factor: float) -> None:
    fewer = make(3.0)
    bias = torch.tensor([0.5] * 6 + [NEVER] * 2)
    updates = {**fewer.updates, MLP: replace(fewer.updates[MLP], bias=bias)}
    store.add("fewer", replace(fewer, updates=updates))
    compose(store, "scaled", [GivenTerm("fewer", scales={"*": factor})])
    (term,) = store.info(store.resolve("scaled").digest).composition
    found = store.load(term.digest).updates[MLP]
    assert found.bias is not None
    assert found.bias.tolist() == [0.5 * factor] * 6 + [NEVER] * 2
    assert found.scale == 2.0 * factor


def test_the_first_scale_that_fits_counts(store: Store) -> None:
    scales = {"*.mlp.*": 3.0, "*": 0.5}
    compose(store, "scaled", [GivenTerm("tone", scales=scales)])
    (term,) = store.info(store.resolve("scaled").digest).composition
    updates = store.load(term.digest).updates
    assert (updates[MLP].scale, updates[ATTENTION].scale) == (6.0, 0.25)


def test_a_composition_of_compositions_is_their_terms(store: Store) -> None:
    compose(store, "both", [GivenTerm("tone", 0.5, begin=2, end=8), GivenTerm("german")])
    outer = compose(store, "outer", [GivenTerm("both", 2.0, begin=4)])
    tone, german = (store.resolve(name).digest for name in ("tone", "german"))
    assert set(store.info(outer.digest).composition) == {
        Term(tone, 1.0, 4, 8),
        Term(german, 2.0, 4, None),
    }
    late = compose(store, "late", [GivenTerm("both", begin=8)])
    assert set(store.info(late.digest).composition) == {Term(german, 1.0, 8, None)}
    compose(store, "early", [GivenTerm("tone", end=8)])
    with pytest.raises(InvalidAdapterError, match="serves a position"):
        compose(store, "nothing", [GivenTerm("early", begin=8)])


def test_gc_keeps_what_a_composition_needs_until_it_goes(store: Store) -> None:
    compose(store, "scaled", [GivenTerm("tone", scales={"*": 0.5}), GivenTerm("german")])
    needed = set(store.resolve("scaled").served)
    store.remove("tone")
    store.remove("german")
    for digest_ in needed:
        past = time.time() - 100
        os.utime(store.path(digest_).parent, (past, past))
    store.gc(min_age=50)
    assert all(store.load(digest_) for digest_ in needed)
    assert store.verify() == []
    store.path(min(needed)).write_bytes(b"damaged")
    assert [str(problem).partition(":")[0] for problem in store.verify()] == ["scaled@1"]
    store.remove("scaled")
    assert needed.isdisjoint(store.snapshot().digests())


def test_what_generates_nothing_or_is_for_another_base_is_refused(store: Store) -> None:
    store.add("other", make(1.0, "Qwen2ForCausalLM"))
    store.add("empty", replace(make(1.0), updates={}))
    with pytest.raises(BaseMismatchError, match="Qwen2ForCausalLM"):
        compose(store, "both", [GivenTerm("tone"), GivenTerm("other")])
    with pytest.raises(UnsupportedFeatureError, match="nothing that changes"):
        compose(store, "both", [GivenTerm("empty")])
    with pytest.raises(AdapterNotFoundError):
        compose(store, "both", [GivenTerm("missing")])
    with pytest.raises(InvalidAdapterError, match=r"\*\.attention"):
        compose(store, "both", [GivenTerm("tone", scales={"*.attention": 2.0})])
    with pytest.raises(InvalidAdapterError, match=str(MAX_TERMS)):
        compose(store, "both", [GivenTerm("tone", float(n)) for n in range(MAX_TERMS + 1)])
    assert "both" not in store.names()


@given(st.integers(-5, 5), st.one_of(st.none(), st.integers(-5, 5)))
def test_a_term_holds_for_positions_in_order(begin: int, end: int | None) -> None:
    if begin >= 0 and (end is None or begin < end):
        assert Term("0" * 64, 1.0, begin, end).begin == begin
    else:
        with pytest.raises(InvalidAdapterError, match="behind the begin"):
            Term("0" * 64, 1.0, begin, end)


def test_a_composition_is_not_merged_itself(store: Store) -> None:
    version = compose(store, "both", [GivenTerm("tone"), GivenTerm("german")])
    with pytest.raises(UnsupportedFeatureError, match="made of"):
        derive(store, Recipe("ties", ((version.digest, 1.0),), 0.5))


def test_an_earlier_release_refuses_an_index_with_compositions(store: Store) -> None:
    compose(store, "both", [GivenTerm("tone")])
    tree = json.loads(encode(store.snapshot()))
    assert tree["format"] == 4
    assert decode(json.dumps(tree).encode(), "index") == store.snapshot()
    tree["names"]["both"]["versions"]["1"]["needs"] = ["no digest"]
    with pytest.raises(CorruptStoreError):
        decode(json.dumps(tree).encode(), "index")
    assert json.loads(encode(Index()))["format"] == 1


def test_the_command_composes_with_scales_and_spans(store: Store) -> None:
    made = CliRunner().invoke(
        app,
        [
            *("compose", "both", "tone=0.7", "german", "--store", store.location, "--json"),
            *("--scale", "german:*.mlp.*=0.2", "--span", "german:0:200"),
        ],
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["digest"] == store.resolve("both").digest
    terms = store.info(store.resolve("both").digest).composition
    tone, german = sorted(terms, key=lambda term: term.weight)
    assert (tone.digest, tone.weight) == (digest(make(1.0)), 0.7)
    assert (german.weight, german.begin, german.end) == (1.0, 0, 200)
    assert store.load(german.digest).updates[MLP].scale == pytest.approx(0.4)
    shown = CliRunner().invoke(app, ["show", "both", "--store", store.location])
    assert "0.7 tone, 1 german from 0 to 200 with 1 scales" in shown.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["tone=much"], "tone=much"),
        (["tone", "tone=2"], "tone=2"),
        (["tone", "--scale", "german:*=2"], r"german:\*=2"),
        (["tone", "--scale", "tone=2"], "tone=2"),
        (["tone", "--span", "tone:a"], "tone:a"),
        (["tone=inf"], "tone=inf"),
    ],
)
def test_the_command_names_the_option_that_it_can_not_read(
    store: Store, options: list[str], named: str
) -> None:
    import re

    refused = CliRunner().invoke(app, ["compose", "both", *options, "--store", store.location])
    assert refused.exit_code == 1
    assert re.search(named, refused.stderr)
