"""An experiment: its definition, its state, and its layouts over time.

Immutable values, and functions that return the changed value. Storage and HTTP are not known here;
times are arguments, in Unix seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from quickchange_server.errors import ConflictError, InvalidRequestError
from quickchange_server.experiments import layout
from quickchange_server.experiments.definition import Definition
from quickchange_server.experiments.layout import Layout

State = Literal["running", "paused", "stopped"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A period of constant weights; its number is its place in the list and never changes."""

    begins: float
    layout: Layout


@dataclass(frozen=True, slots=True)
class Pointed:
    """The target of an alias."""

    target: str
    turbo: str | None = None


@dataclass(frozen=True, slots=True)
class Promotion:
    """A move of the alias to a variant. `before`: the alias's earlier target, None if unset."""

    variant: str
    alias: str
    before: Pointed | None


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment. `version` counts its changes from 1."""

    id: str  # never reused, unlike the name; also the salt of the units' hashes
    definition: Definition
    version: int
    state: State
    created: float
    started: float  # origin of a ramp's `after`; every pause moves it
    changed: float  # time of the last change of state
    stretches: tuple[Stretch, ...]
    winner: str | None = None  # variant served once stopped; None: the control
    promotions: tuple[Promotion, ...] = ()  # rollback undoes the last one

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def served(self) -> str:
        """The variant that all requests get while the experiment does not run."""
        return self.winner or self.definition.default.name

    def stretch(self, now: float) -> int:
        """The number of the stretch in effect at `now`."""
        begun = bisect_right(self.stretches, now, key=lambda stretch: stretch.begins)
        return max(0, begun - 1)


def created(identity: str, definition: Definition, now: float) -> Experiment:
    """A new experiment, running."""
    planned = [
        Stretch(begins, layout.divided(weights))
        for begins, weights in _plan(definition, now, now)[:1]
    ]
    first = Experiment(identity, definition, 1, "running", now, now, now, tuple(planned))
    return replace(first, stretches=_replanned(first, definition, now, now))


def updated(old: Experiment, definition: Definition, now: float) -> Experiment:
    """Change the definition. Raises InvalidRequestError, or ConflictError once stopped."""
    if old.state == "stopped":
        raise ConflictError(
            f"name: the experiment {old.name!r} is stopped and can't change; create another",
            param="name",
        )
    _refuse_rewriting(old.definition, definition)
    _refuse_other_kinds(old.definition, definition)
    new_ramp = definition.ramp != old.definition.ramp
    started = now if new_ramp else old.started
    stretches = _replanned(old, definition, started, now)
    return _next(old, definition=definition, started=started, stretches=stretches)


def paused(old: Experiment, now: float) -> Experiment:
    """Pause: all requests get the control. Raises ConflictError unless running."""
    _must_be(old, "running", "pause")
    return replace(_next(old), state="paused", changed=now)


def resumed(old: Experiment, now: float) -> Experiment:
    """Resume, with a ramp where it was when paused. Raises ConflictError unless paused."""
    _must_be(old, "paused", "resume")
    started = old.started + now - old.changed
    # stretches planned after the pause are dropped, and planned again
    held = old.stretches[: old.stretch(old.changed) + 1]
    again = replace(_next(old), state="running", changed=now, started=started, stretches=held)
    return replace(again, stretches=_replanned(again, old.definition, started, now))


def stopped(old: Experiment, winner: str | None, now: float) -> Experiment:
    """Stop for good: all requests get the winner, or the control. Raises ConflictError if already
    stopped, InvalidRequestError for an unknown winner."""
    if old.state == "stopped":
        raise ConflictError(f"name: the experiment {old.name!r} is already stopped", param="name")
    if winner is not None:
        variant_of(old.definition, winner, param="winner")
    return replace(_next(old), state="stopped", changed=now, winner=winner)


def promoted(old: Experiment, variant: str, before: Pointed | None) -> Experiment:
    """Record that the definition's alias moves to `variant`. Raises InvalidRequestError if the
    definition has no alias or no such variant."""
    alias = old.definition.alias
    if alias is None:
        raise InvalidRequestError(
            f"alias: the experiment {old.name!r} names no alias to move; set its field alias",
            param="alias",
        )
    variant_of(old.definition, variant, param="variant")
    moves = (*old.promotions, Promotion(variant, alias, before))
    return replace(_next(old), promotions=moves)


def rolled_back(old: Experiment) -> Experiment:
    """Remove the last promotion. Raises ConflictError if there is none."""
    if not old.promotions:
        raise ConflictError(
            f"name: nothing was promoted by the experiment {old.name!r}", param="name"
        )
    return replace(_next(old), promotions=old.promotions[:-1])


def variant_of(definition: Definition, name: str, *, param: str) -> None:
    """Raise InvalidRequestError if the definition has no such variant."""
    known = definition.weights
    if name not in known:
        raise InvalidRequestError(
            f"{param}: there is no variant {name!r}; there are {', '.join(known)}", param=param
        )


def _next(
    old: Experiment,
    *,
    definition: Definition | None = None,
    started: float | None = None,
    stretches: tuple[Stretch, ...] | None = None,
) -> Experiment:
    return replace(
        old,
        version=old.version + 1,
        definition=old.definition if definition is None else definition,
        started=old.started if started is None else started,
        stretches=old.stretches if stretches is None else stretches,
    )


def _must_be(old: Experiment, state: State, action: str) -> None:
    if old.state != state:
        raise ConflictError(
            f"name: the experiment {old.name!r} is {old.state}; only a {state} one can {action}",
            param="name",
        )


def _refuse_rewriting(old: Definition, new: Definition) -> None:
    """Raise InvalidRequestError if the new definition would mix results of different things."""
    for field in ("name", "sticky", "alpha", "minimum"):
        if getattr(new, field) != getattr(old, field):
            raise _fixed(field)
    if new.default.name != old.default.name:
        raise _fixed("control")
    for field, before, after in (
        ("variants", old.variants, {v.name: v for v in new.variants}),
        ("shadows", old.shadows, {s.name: s for s in new.shadows}),
    ):
        for variant in before:
            kept = after.get(variant.name)
            if kept is None and field == "shadows":
                continue
            if kept is None or not variant.serves_as(kept):
                raise InvalidRequestError(
                    f"{field}: what {variant.name!r} serves can't change, nor can it go: its "
                    "results would mix two things; give it no share, and add another beside it",
                    param=field,
                )


def _refuse_other_kinds(old: Definition, new: Definition) -> None:
    kinds = {metric.name: metric.kind for metric in old.metrics}
    for metric in new.metrics:
        if kinds.get(metric.name, metric.kind) != metric.kind:
            raise InvalidRequestError(
                f"metrics: {metric.name!r} is a {kinds[metric.name]} and its outcomes are kept as "
                "that; give the new one another name",
                param="metrics",
            )


def _fixed(field: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{field}: can't change once the experiment exists: results hold for what was set before "
        "the first of them; create another experiment",
        param=field,
    )


def _plan(
    definition: Definition, started: float, now: float
) -> list[tuple[float, Mapping[str, float]]]:
    """(start, weights) of the current stretch, then of later ones. Before a ramp's first step the
    control gets all requests."""
    if not definition.ramp:
        return [(now, definition.weights)]
    control = {name: float(name == definition.default.name) for name in definition.weights}
    steps = [
        (step.at if step.after is None else started + step.after, definition.weights_of(step))
        for step in definition.ramp
    ]
    timed = sorted(((at or 0.0, weights) for at, weights in steps), key=lambda step: step[0])
    past = [weights for at, weights in timed if at <= now]
    return [(now, past[-1] if past else control), *(step for step in timed if step[0] > now)]


def _replanned(
    old: Experiment, definition: Definition, started: float, now: float
) -> tuple[Stretch, ...]:
    """The stretches until now, followed by those that the definition plans."""
    made = list(old.stretches[: old.stretch(now) + 1])
    for begins, weights in _plan(definition, started, now):
        division = layout.moved([stretch.layout for stretch in made], weights)
        if division != made[-1].layout:
            made.append(Stretch(begins, division))
    return tuple(made)
