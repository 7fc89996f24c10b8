"""Training of Turbo heads: they learn, draft by the form's formula, and survive interruptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from quickchange_store.canonical.turbo_part import TurboHeads
from quickchange_training.checkpoint import Checkpoints
from quickchange_training.errors import OutputError, RecipeError
from quickchange_training.turbo.fitting import StartingHeads, checked_start
from quickchange_training.turbo.turbo_data import ABSENT, OwnOutput, positions, widened
from quickchange_training.turbo.turbo_recipe import TurboRecipe
from quickchange_training.turbo.turbo_trainer import BaseEnds, TurboTrainer

HIDDEN, TOKENS = 48, 24
RECIPE = TurboRecipe(depth=3, vocabulary=0, epochs=1, steps=300, lr=1e-2, batch_size=32, seed=3)
PARALLEL = replace(RECIPE, kind="parallel", share="none")
KINDS = [RECIPE, replace(RECIPE, blocks=2, share="none"), replace(RECIPE, share="rest"), PARALLEL]
KINDS.append(replace(RECIPE, kl=0.5))


def ends() -> BaseEnds:
    generator = torch.Generator().manual_seed(5)
    made = torch.randn(2, TOKENS, HIDDEN, generator=generator)
    return BaseEnds(made[0] * 0.1, made[1])


def outputs(count: int = 24, length: int = 12) -> list[OwnOutput]:
    """Tokens count up by 5, and a state is like the LM head's row of its token."""
    head = ends().head
    made = []
    for start in range(count):
        tokens = tuple((start + 5 * i) % TOKENS for i in range(length))
        made.append(OwnOutput(tokens, head[torch.tensor(tokens)].to(torch.bfloat16)))
    return made


def trainer(recipe: TurboRecipe, vocabulary: list[int] | None = None) -> TurboTrainer:
    chosen = None if vocabulary is None else torch.tensor(vocabulary)
    return TurboTrainer(recipe, ends(), chosen)


def drafts(heads: TurboHeads, state: torch.Tensor, token: int, after: list[int]) -> list[int]:
    """Drafts by turbo_part.py's definition; `after`: the tokens that really came."""
    base, h, found = ends(), state, []
    for head, before in zip(heads.heads, [token, *after], strict=False):
        h = h if heads.sequential else state
        for place, index in enumerate(head):
            block = heads.blocks[index]
            z = h
            if heads.sequential and place == 0:
                z = torch.cat([h, base.embeddings[before]])
            h = h + functional.silu(block.weight.float() @ z + block.bias.float())
        rows = base.head
        if heads.vocabulary is not None:
            rows = rows[heads.vocabulary.long()]
        best = int((rows @ h).argmax())
        found.append(best if heads.vocabulary is None else int(heads.vocabulary[best]))
    return found


@pytest.mark.parametrize("recipe", KINDS)
def test_heads_learn_what_comes_next(recipe: TurboRecipe) -> None:
    made = trainer(recipe)
    heads, curve = made.train(positions(outputs(), recipe.depth))
    measured = made.measure(heads, outputs())
    assert curve.losses[-1] < 0.3 * curve.losses[0]
    assert min(measured.acceptance) > 0.9
    assert measured.tokens_a_step > 2.5


@pytest.mark.parametrize("recipe", KINDS)
def test_stored_heads_draft_by_the_forms_formula_as_measured(recipe: TurboRecipe) -> None:
    made = trainer(recipe)
    heads, _ = made.train(positions(outputs(), recipe.depth))
    stored = heads.export(None)
    assert stored.depth == recipe.depth
    assert {b.weight.dtype for b in stored.blocks} == {torch.bfloat16}
    right = total = 0
    for output in outputs():
        for k in range(len(output.tokens) - recipe.depth):
            came = list(output.tokens[k + 1 : k + 1 + recipe.depth])
            said = drafts(stored, output.states[k].float(), output.tokens[k], came)
            right += said == came
            total += 1
    assert right > 0.9 * total


def test_a_vocabulary_bounds_what_is_drafted() -> None:
    vocabulary = [1, 2, 3, 5, 8, 13, 21]
    made = trainer(RECIPE, vocabulary)
    heads, _ = made.train(positions(outputs(), RECIPE.depth))
    stored = heads.export(torch.tensor(vocabulary))
    assert stored.vocabulary is not None
    assert stored.vocabulary.tolist() == vocabulary
    state = outputs()[0].states[0].float()
    assert set(drafts(stored, state, 0, [5, 10])) <= set(vocabulary)
    covered = made.measure(heads, outputs()).covered
    said = [token for output in outputs() for token in output.tokens]
    assert covered == pytest.approx(sum(t in vocabulary for t in said) / len(said))


def test_heads_are_unsure_where_the_token_is_not_in_the_vocabulary() -> None:
    vocabulary = [t for t in range(TOKENS) if t != 5]
    made = trainer(replace(RECIPE, spread=1.0, depth=1), vocabulary)
    rows = positions(outputs(), 1)
    heads, _ = made.train(rows)
    unknown = rows.tokens[:, 1] == 5
    known = (rows.tokens[:, 1] != ABSENT) & ~unknown
    embedded = functional.embedding(rows.tokens[:, :1].T, ends().embeddings)
    with torch.no_grad():
        logits = heads(rows.states.float(), embedded)[0] @ ends().head[torch.tensor(vocabulary)].T
    surest = logits.softmax(-1).amax(-1)
    assert surest[unknown].max() < 0.5
    assert surest[known].mean() > 0.8


def test_the_last_tokens_of_an_output_have_nothing_after_them() -> None:
    rows = positions([OwnOutput((7, 8, 9), torch.zeros(3, HIDDEN))], 2)
    assert rows.tokens.tolist() == [[7, 8, 9], [8, 9, ABSENT], [9, ABSENT, ABSENT]]


def test_tokens_a_step_are_those_of_greedy_verification() -> None:
    """Heads that are always right give depth + 1 tokens a step; the first token is not counted."""
    made = trainer(PARALLEL)
    heads, _ = made.train(positions(outputs(), 3))
    assert made.measure(heads, outputs()).acceptance == (1.0, 1.0, 1.0)
    # 11 tokens after the first, four a step: three steps an output
    assert made.measure(heads, outputs()).tokens_a_step == pytest.approx(11 / 3)


class StopError(Exception):
    """Ends a run as a crash would."""


class Interrupted(Checkpoints):
    """Checkpoints that end the run after one of them."""

    def save(self, state: Mapping[str, Any]) -> None:
        super().save(state)
        raise StopError


def test_a_resumed_run_gives_what_an_uninterrupted_one_gives(tmp_path: Path) -> None:
    rows = positions(outputs(), RECIPE.depth)
    whole, curve = trainer(RECIPE).train(rows)
    with pytest.raises(StopError):
        trainer(RECIPE).train(rows, Interrupted(tmp_path, "run", every=23))
    resumed, again = trainer(RECIPE).train(rows, Checkpoints(tmp_path, "run", every=23))
    assert again.losses == curve.losses
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "one", every=1).save({"losses": []})
    with pytest.raises(OutputError, match="another recipe or other data"):
        Checkpoints(tmp_path, "other", every=1).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "--depth must be more than 0"),
        ({"vocabulary": -1}, "--vocabulary must not be negative"),
        ({"held_out": 1.0}, "--held-out must be at least 0 and less than 1"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"kind": "parallel", "share": "all"}, "give --share none"),
    ],
)
def test_a_bad_recipe_is_refused_by_its_options_name(options: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TurboRecipe(**options)


def start_of(recipe: TurboRecipe) -> TurboHeads:
    """Heads that have learned `outputs`, as stored."""
    return trainer(recipe).train(positions(outputs(), recipe.depth))[0].export(None)


@pytest.mark.parametrize("recipe", KINDS)
def test_heads_that_go_on_begin_as_they_are_stored(recipe: TurboRecipe) -> None:
    start = start_of(recipe)
    begun = replace(trainer(recipe), start=start).begun(positions(outputs(), recipe.depth))
    again = begun.export(None)
    assert (again.heads, again.sequential) == (start.heads, start.sequential)
    for one, other in zip(again.blocks, start.blocks, strict=True):
        torch.testing.assert_close(one.weight.float(), other.weight.float(), rtol=1e-2, atol=0)
        assert torch.equal(one.bias, other.bias)


def test_heads_that_go_on_lose_less_than_new_ones_in_as_few_steps() -> None:
    few = replace(RECIPE, steps=5)
    rows = positions(outputs(), RECIPE.depth)
    _, new = trainer(few).train(rows)
    _, continued = replace(trainer(few), start=start_of(RECIPE)).train(rows)
    assert continued.final < 0.3 * new.final


def test_sequential_heads_go_on_deeper_with_the_blocks_of_their_last_head() -> None:
    start = replace(RECIPE, depth=2, share="rest")
    deep = replace(RECIPE, depth=5)
    heads = checked_start(StartingHeads("they", start_of(start)), deep, HIDDEN)
    assert heads.heads == ((0,), (1,), (1,), (1,), (1,))
    rows = positions(outputs(), 5)
    trained, _ = replace(trainer(deep), start=heads).train(rows)
    assert trainer(deep).measure(trained, outputs()).tokens_a_step > 3.5


def test_heads_that_go_on_may_be_cut() -> None:
    start = start_of(replace(RECIPE, share="none"))
    heads = checked_start(StartingHeads("they", start), replace(RECIPE, depth=1), HIDDEN)
    assert heads.heads == ((0,),)
    assert len(heads.blocks) == 1


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        (RECIPE, {"blocks": 2}, "--blocks: heads that go on keep their form"),
        (PARALLEL, {"depth": 9}, "--depth 9: parallel heads draft no deeper"),
    ],
)
def test_heads_that_cant_go_on_are_refused(
    start: TurboRecipe, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        checked_start(
            StartingHeads("they", start_of(start)), replace(TurboRecipe(), **options), HIDDEN
        )


def test_heads_of_another_hidden_size_cant_go_on() -> None:
    with pytest.raises(RecipeError, match="hidden size of 48, and the base has 64"):
        checked_start(StartingHeads("they", start_of(RECIPE)), TurboRecipe(depth=3), 64)


@given(
    said=st.sets(st.integers(0, 40), min_size=1),
    start=st.sets(st.integers(0, 40), min_size=1),
    size=st.integers(1, 50),
)
def test_a_widened_vocabulary_holds_the_outputs_tokens_and_fills_its_room(
    said: set[int], start: set[int], size: int
) -> None:
    wide = widened(torch.tensor(sorted(said)), torch.tensor(sorted(start)), size).tolist()
    assert wide == sorted(set(wide))
    assert said <= set(wide) <= said | start
    room = max(len(said), size, len(start))
    assert len(wide) == min(len(said | start), room)
