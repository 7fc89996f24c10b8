"""A model's own greedy outputs by the server's engine, for the training of Turbo heads."""

from __future__ import annotations

import os
from collections.abc import Sequence

from quickchange_server.config import Settings
from quickchange_server.entrypoints.in_process_engine import EngineCompletion, InProcessEngine
from quickchange_server.errors import EngineFailedError, QuickchangeError
from quickchange_server.frontend.adapter_spans import activated
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_training.errors import ModelError
from quickchange_training.turbo.head_maker import WantedOutputs
from quickchange_training.turbo.turbo_data import Generate, OnOutput

_TOGETHER = 48  # most sequences in one step
_THE_ADAPTER = "adapter"  # stands for the only adapter's digest


def generate_for(wanted: WantedOutputs) -> Generate:
    """A function that makes greedy outputs with an engine of its own, closed at its end.

    For prompts whose outputs `wanted` knows it reads the states of these instead.

    The function raises ModelError where the model can't be served or a prompt can't be answered.
    """

    def generate(prompts: Sequence[Sequence[int]], on_output: OnOutput) -> None:
        settings = Settings(
            model=wanted.model,
            store=os.devnull,  # the only adapter is at hand
            dtype=wanted.dtype,
            max_sequences=_TOGETHER,
            adapters=wanted.adapter is not None,
        )

        def finished(index: int, completion: EngineCompletion) -> None:
            if completion.states is None:
                raise EngineFailedError(f"request {index}: it ended without a token")
            on_output(index, completion.token_ids, completion.states)

        try:
            with InProcessEngine(settings, lambda _digest: _known(wanted.adapter)) as engine:
                asked = [i for i, prompt in enumerate(prompts) if tuple(prompt) not in wanted.said]
                engine.run(
                    [_request(wanted, i, prompts[i]) for i in asked],
                    states=True,
                    on_finished=lambda place, completion: finished(asked[place], completion),
                )
                for index, prompt in enumerate(prompts):
                    said = wanted.said.get(tuple(prompt))
                    if said is not None:
                        states = engine.prompt_states(_request(wanted, index, prompt, said))
                        on_output(index, said, states[-len(said) :])
        except QuickchangeError as error:
            raise ModelError(f"{wanted.model}: its outputs can't be made: {error}") from error

    return generate


def _request(
    wanted: WantedOutputs, index: int, prompt: Sequence[int], said: Sequence[int] = ()
) -> Submit:
    """The request for what follows a prompt and what was said behind it."""
    sampling = SamplingParams(
        max_tokens=wanted.max_new_tokens,
        temperature=0.0,
        stop_token_ids=wanted.stop_token_ids,
    )
    adapters: tuple[Component, ...] = ()
    if (adapter := wanted.adapter) is not None:
        adapters = (Component(_THE_ADAPTER, virtual_tokens=adapter.virtual_tokens),)
        if adapter.invocation is not None:
            adapters = activated(adapters, {_THE_ADAPTER: adapter.invocation.tokens}, prompt)
    return Submit(str(index), (*prompt, *said), sampling, adapters, seed=0)


def _known(adapter: CanonicalAdapter | None) -> CanonicalAdapter:
    if adapter is None:
        raise EngineFailedError("an adapter was asked for, but the outputs are the base's own")
    return adapter
