"""The public Python API, modelled on vLLM's `LLM`: texts in, texts out, no server.

Each call answers a list of prompts in one batch, each with its own adapter. The whole call is
checked before any of it runs. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, TypeVar, cast

from pydantic import Field, ValidationError
from tqdm.auto import tqdm

from quickchange_server.adapter_registry.resolver import (
    AUTO,
    OFF,
    Catalog,
    Selection,
    WeightedName,
    base_names,
)
from quickchange_server.api.openai.chat.chat_requests import ChatRendering, Message
from quickchange_server.api.openai.chat.tool_calling import tools_form
from quickchange_server.api.openai.chat.tool_requests import Tools
from quickchange_server.config import Settings
from quickchange_server.entrypoints.engine_start import token_text
from quickchange_server.entrypoints.in_process_engine import EngineCompletion, InProcessEngine
from quickchange_server.entrypoints.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    generated_position,
    prompt_positions,
)
from quickchange_server.errors import (
    ConflictError,
    EngineFailedError,
    InvalidRequestError,
    QuickchangeError,
    SettingError,
    UnknownModelError,
)
from quickchange_server.frontend.context_length import check_fits, room
from quickchange_server.frontend.embedding import unit, vector
from quickchange_server.frontend.output_processor import Ending, Transcript
from quickchange_server.frontend.request_admission import Seeds, choice_seed
from quickchange_server.frontend.request_base import Body
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import LOOKUP, Delta, Pooling, SamplingParams, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import BaseSpec, digest
from quickchange_store.errors import AdapterNotFoundError, InvalidNameError
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.store import Store

Prompt = str | Sequence[int]
Adapter = str | Mapping[str, float] | None
"""A name, version or alias of the store; a mix Σ weight · adapter; None: the base model."""
Conversation = Sequence[Mapping[str, Any]]
Folder = str | Path

_LONG = 16  # number of prompts from which a progress bar is shown

logger = logging.getLogger(__name__)


_B = TypeVar("_B", bound=Body)


class _Chats(ChatRendering):
    """The way in which conversations of one call become prompts."""

    tools: Tools = Field(default=[])


@dataclass(frozen=True, slots=True)
class _Asked:
    """A tokenized prompt; `place` names it in errors."""

    place: str
    text: str | None  # None: token ids were given
    ids: tuple[int, ...]


@dataclass(slots=True)
class _Choice:
    """One sequence of a call, with its text so far."""

    submit: Submit
    transcript: Transcript
    parts: list[str] = field(default_factory=list)
    ending: Ending | None = None

    def push(self, delta: Delta) -> bool:
        """Add a delta; true if the choice is complete, at a stop string or otherwise."""
        piece = self.transcript.push(delta)
        self.parts.append(piece.text)
        self.ending = piece.ending
        return piece.ending is not None


class LLM:
    """One base model in this process, with its adapters. A context manager.

    `model`: a folder in transformers' layout, a GGUF file, or a hub id. `adapters`: folders by the
    names that calls use, imported into `store`, or without one into a temporary store that `close`
    removes.
    `settings`: any other setting of the server (docs/settings.md), such as max_model_len, threads,
    turbo or seed.

    Settings that are not given come from the environment, as the server's do (QUICKCHANGE_...).
    Raises SettingError, StoreError if an adapter can't be imported, ConflictError if its name is
    taken, and what `load_model` raises.
    """

    def __init__(
        self,
        model: Folder,
        *,
        adapters: Mapping[str, Folder] | None = None,
        store: Folder | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        **settings: Any,
    ) -> None:
        with ExitStack() as opened:
            root = store or opened.enter_context(TemporaryDirectory(prefix="quickchange-"))
            made = _settings(
                model=str(model),
                store=str(root),
                device=device,
                dtype=dtype,
                adapters=bool(adapters) or store is not None,
                **settings,
            )
            self._text = Text.load(made.model)
            self._store = Store(*made.store_opening)
            self._catalog = Catalog(
                self._store,
                base_names(made),
                adapters=made.adapters,
                turbo=made.turbo,
                prompt_lookup=made.prompt_lookup,
            )
            self._seeds = Seeds(made.seed)
            if adapters:
                _import(self._store, adapters, base_spec(made.model), self._catalog.base_names)
            words = token_text(self._text) if made.turbo and made.prompt_lookup else None
            self._engine = opened.enter_context(InProcessEngine(made, text=words))
            self._opened = opened.pop_all()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and remove the temporary store. Calls after it raise RuntimeError."""
        self._opened.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: Adapter | Sequence[Adapter] = None,
        turbo: str | Sequence[str] = AUTO,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, each a text or token ids; the outputs are in the prompts' order.

        `params`, `adapter` and `turbo` are one for all prompts, or a list with one per prompt.
        `turbo` is the source of drafts, which changes no output: "auto", "off", "lookup" or the
        name of an adapter with heads. `use_tqdm`: show a progress bar; None: on long lists.

        Raises InvalidRequestError, ContextLengthError or UnknownModelError before anything runs;
        AdapterFailedError or EngineFailedError if the engine fails.
        """
        asked = self._asked(prompts)
        return self._generate(asked, params or SamplingParams(), adapter, turbo, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: Adapter | Sequence[Adapter] = None,
        turbo: str | Sequence[str] = AUTO,
        use_tqdm: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, str]] = (),
        reasoning_effort: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template.

        Otherwise the same as `generate`, with the rendered conversations as prompts. The arguments
        behind `use_tqdm` are the fields of the HTTP API with these names (docs/http.md), one for
        all conversations; the texts hold thoughts and tool calls as the model writes them.
        """
        rendering = _validated(
            _Chats,
            "",
            {
                "tools": list(tools),
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "chat_template_kwargs": chat_template_kwargs,
                "documents": list(documents),
                "reasoning_effort": reasoning_effort,
            },
        )
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], [messages] if one else messages)
        asked = [
            self._asked_chat(f"messages[{i}]", c, rendering) for i, c in enumerate(conversations)
        ]
        return self._generate(asked, params or SamplingParams(), adapter, turbo, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        adapter: Adapter | Sequence[Adapter] = None,
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Turn prompts into vectors: the hidden states that enter the LM head, "mean" or "last".

        Raises what `generate` raises.
        """
        if pooling not in ("mean", "last"):
            raise InvalidRequestError(
                f'pooling: {pooling!r} is not known; give "mean" or "last"', param="pooling"
            )
        asked = self._asked(prompts)
        for one in asked:
            check_fits(self._engine.info.max_model_len, len(one.ids), one.place)
        sampling = SamplingParams(max_tokens=0)
        submits = [
            Submit(str(i), one.ids, sampling, selection.adapters, pooling=pooling, seed=0)
            for i, (one, selection) in enumerate(
                zip(asked, self._selections(adapter, OFF, len(asked)), strict=True)
            )
        ]
        completions = self._run(submits, None, use_tqdm)
        return [
            _embedded(str(i), one, completion, normalize)
            for i, (one, completion) in enumerate(zip(asked, completions, strict=True))
        ]

    # --- checks before a call -------------------------------------------------------------------

    def _asked(self, prompts: Prompt | Sequence[Prompt]) -> list[_Asked]:
        several = [prompts] if _is_one(prompts) else prompts
        return [self._asked_one(f"prompts[{i}]", p) for i, p in enumerate(several)]

    def _asked_one(self, place: str, prompt: Any) -> _Asked:
        if isinstance(prompt, str):
            ids = self._encode(place, prompt)
            self._text.check_ids(ids, place)
            return _Asked(place, prompt, tuple(ids))
        if isinstance(prompt, Iterable):
            ids = list(prompt)
            if all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
                self._text.check_ids(ids, place)
                return _Asked(place, None, tuple(map(int, ids)))
        raise InvalidRequestError(
            f"{place}: {type(prompt).__name__} is no prompt; give a text or a list of token ids",
            param=place,
        )

    def _encode(self, place: str, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"{place}: holds half of a surrogate pair; give valid Unicode", param=place
            ) from error
        return self._text.encode_within(text, most=self._engine.info.max_model_len, param=place)

    def _asked_chat(self, place: str, messages: Conversation, rendering: _Chats) -> _Asked:
        checked = [_validated(Message, f"{place}[{i}]", m) for i, m in enumerate(messages)]
        if not checked:
            raise InvalidRequestError(f"{place}: is empty; give at least one message", param=place)
        tools_form(self._text, checked, rendering.tools)
        prompt = self._text.render_chat(
            [message.for_template() for message in checked],
            tools=[tool.for_template() for tool in rendering.tools],
            how=rendering.how,
            param=place,
        )
        ids = self._text.encode_within(
            prompt, most=self._engine.info.max_model_len, param=place, add_special_tokens=False
        )
        self._text.check_ids(ids, place)
        return _Asked(place, prompt, tuple(ids))

    def _selections(
        self, adapter: Adapter | Sequence[Adapter], turbo: str | Sequence[str], count: int
    ) -> list[Selection]:
        """The adapters and drafter of each prompt. Raises with the place of a wrong name."""
        adapters: list[Adapter] = _each(adapter, count, "adapter", (str, Mapping, type(None)))
        turbos: list[str] = _each(turbo, count, "turbo", (str,))
        return [
            self._selection(one, drafter, index)
            for index, (one, drafter) in enumerate(zip(adapters, turbos, strict=True))
        ]

    def _selection(self, adapter: Adapter, turbo: str, index: int) -> Selection:
        place = f"adapter[{index}]"
        mix = adapter if isinstance(adapter, Mapping) else {}
        model = adapter if isinstance(adapter, str) else self._catalog.base_name
        for name in mix or [model]:
            if mix or not self._catalog.is_base(name):
                self._check_known(name, place)
        if turbo not in (AUTO, OFF, LOOKUP):
            self._check_known(turbo, f"turbo[{index}]")
        composition = [_term(name, weight, place) for name, weight in mix.items()]
        try:
            return self._catalog.select(model, composition, turbo)
        except QuickchangeError as error:
            raise type(error)(f"{place}: {error.message}", param=error.param) from error

    def _check_known(self, name: str, place: str) -> None:
        try:
            self._store.resolve(name)
        except (AdapterNotFoundError, InvalidNameError) as error:
            raise UnknownModelError(
                f"{place}: {error}; or give LLM its folder: adapters={{{name!r}: folder}}",
                param=place,
            ) from error

    def _choices(
        self, index: int, asked: _Asked, params: SamplingParams, selection: Selection
    ) -> list[_Choice]:
        """The sequences of one prompt, one per choice."""
        for name in ("stop_token_ids", "logprob_token_ids", "allowed_token_ids"):
            self._text.check_ids(sorted(getattr(params, name)), name)
        self._text.check_ids(list(params.logit_bias), "logit_bias")
        fits = room(self._engine.info.max_model_len, len(asked.ids), params.max_tokens, asked.place)
        most = fits if params.max_tokens is None else params.max_tokens
        if params.min_tokens > most:
            raise InvalidRequestError(
                f"min_tokens: {params.min_tokens} exceeds the {most} tokens that fit behind "
                f"{asked.place}; lower it",
                param="min_tokens",
            )
        sampling = params.resolved(
            max_tokens=most, eos_ids=self._text.eos_ids, vocab_size=self._text.vocab_size
        )
        seed = self._seeds.draw() if params.seed is None else params.seed % 2**64
        first = Submit(
            f"{index}-0",
            asked.ids,
            sampling,
            selection.adapters,
            drafting=selection.drafting,
            bad_tokens=self._text.spellings(params.bad_words),
            seed=seed,
        )
        others = replace(sampling, prompt_logprobs=None)  # the first choice's serve all
        submits = [first] + [
            replace(
                first,
                request_id=f"{index}-{number}",
                sampling=others,
                seed=choice_seed(seed, number),
            )
            for number in range(1, params.n)
        ]
        return [_Choice(submit, Transcript(self._text, sampling)) for submit in submits]

    # --- running and results --------------------------------------------------------------------

    def _generate(
        self,
        asked: Sequence[_Asked],
        params: SamplingParams | Sequence[SamplingParams],
        adapter: Adapter | Sequence[Adapter],
        turbo: str | Sequence[str],
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        each_params: list[SamplingParams] = _each(params, len(asked), "params", (SamplingParams,))
        selections = self._selections(adapter, turbo, len(asked))
        for selection in selections:
            selection.check_generates()
        choices = [
            self._choices(index, *one)
            for index, one in enumerate(zip(asked, each_params, selections, strict=True))
        ]
        by_id = {c.submit.request_id: c for of_prompt in choices for c in of_prompt}
        completions = iter(
            self._run(
                [choice.submit for choice in by_id.values()],
                lambda delta: by_id[delta.request_id].push(delta),
                use_tqdm,
            )
        )
        return [
            self._output(str(index), one, params, [(c, next(completions)) for c in of_prompt])
            for index, (one, params, of_prompt) in enumerate(
                zip(asked, each_params, choices, strict=True)
            )
        ]

    def _run(
        self,
        submits: Sequence[Submit],
        ends: Callable[[Delta], bool] | None,
        use_tqdm: bool | None,
    ) -> tuple[EngineCompletion, ...]:
        shown = len(submits) >= _LONG if use_tqdm is None else use_tqdm
        with tqdm(total=len(submits), disable=not shown, unit="sequence") as bar:
            run = self._engine.run(submits, ends=ends, on_finished=lambda *_: bar.update())
        return run.completions

    def _output(
        self,
        request_id: str,
        asked: _Asked,
        params: SamplingParams,
        answers: Sequence[tuple[_Choice, EngineCompletion]],
    ) -> RequestOutput:
        _, first = answers[0]
        return RequestOutput(
            request_id=request_id,
            prompt=asked.text,
            prompt_token_ids=list(asked.ids),
            prompt_logprobs=prompt_positions(
                self._text, first.prompt_logprobs, params.prompt_logprobs
            ),
            outputs=[
                self._completion(number, choice, completion, params)
                for number, (choice, completion) in enumerate(answers)
            ],
            num_cached_tokens=first.cached_tokens,
        )

    def _completion(
        self, index: int, choice: _Choice, completion: EngineCompletion, params: SamplingParams
    ) -> CompletionOutput:
        # Fewer than the engine's tokens if a stop string ended amid accepted drafts.
        count = choice.transcript.completion_tokens
        ids, scores = list(completion.token_ids[:count]), completion.logprobs[:count]
        if choice.ending is None:
            raise EngineFailedError(
                f"request {choice.submit.request_id}: it ended without a reason"
            )
        ended_by = ids[-1] if choice.ending == "stop" and ids else None
        scored = params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(choice.parts),
            token_ids=ids,
            cumulative_logprob=sum(one.logprob for one in scores) if scored else None,
            logprobs=[generated_position(self._text, one, params) for one in scores]
            if scored
            else None,
            finish_reason=choice.ending,
            stop_reason=choice.transcript.stopped_by
            or (ended_by if ended_by in params.stop_token_ids else None),
            drafted_tokens=choice.transcript.drafted_tokens,
            accepted_tokens=choice.transcript.accepted_tokens,
        )


def _settings(**given: Any) -> Settings:
    try:
        return Settings(**given)
    except ValidationError as error:
        finding = error.errors()[0]
        name = str(finding["loc"][0])
        raise SettingError(
            f"{name}: {finding['msg']}; docs/settings.md lists the settings", param=name
        ) from error


def _import(
    store: Store, adapters: Mapping[str, Folder], base: BaseSpec, taken: Sequence[str]
) -> None:
    """Publish adapter folders under their names. A name already in the store keeps its version."""
    for name in set(taken) & set(adapters):
        raise ConflictError(
            f"adapters: {name!r} is the base model; choose another name", param="adapters"
        )
    for name, folder in adapters.items():
        if name in store.names():
            _check_same(store, name, Path(folder), base)
            continue
        for warning in add_adapter(store, name, Path(folder), base).warnings:
            logger.warning("adapters: %s: %s", name, warning)


def _check_same(store: Store, name: str, folder: Path, base: BaseSpec) -> None:
    if digest(read_adapter(folder, base).adapter) != store.resolve(name).digest:
        raise ConflictError(
            f"adapters: the store has another {name!r} than {folder}; choose another name, leave "
            "it out to use the store's, or publish this one with `quickchange adapters add`",
            param="adapters",
        )


def _is_one(prompts: Any) -> bool:
    """True for one prompt, false for a list of them."""
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], Integral)


def _each(value: Any, count: int, name: str, kinds: tuple[type, ...]) -> list[Any]:
    """One value of these `kinds` per prompt, from one for all or a list."""
    if isinstance(value, kinds):
        return [value] * count
    if not isinstance(value, Sequence) or not all(isinstance(one, kinds) for one in value):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise InvalidRequestError(
            f"{name}: {value!r:.80} is no {wanted}, nor a list of them; give one for all prompts, "
            "or one for each",
            param=name,
        )
    if len(value) != count:
        raise InvalidRequestError(
            f"{name}: {len(value)} for {count} prompts; give one for all, or one for each",
            param=name,
        )
    return list(value)


def _term(name: str, weight: Any, place: str) -> WeightedName:
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise InvalidRequestError(
            f"{place}: the weight of {name!r} is {weight!r}; give a finite number", param=place
        )
    return WeightedName(name, float(weight))


def _validated(model: type[_B], place: str, given: Any) -> _B:
    """The value as the HTTP API takes it. Raises with the place of what is wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        finding = error.errors()[0]
        context = finding.get("ctx", {})
        field = [context["field"]] if "field" in context else []
        places = ([place] if place else []) + [*finding["loc"], *field]
        where = ".".join(map(str, places))
        raise InvalidRequestError(f"{where}: {finding['msg']}", param=where) from error


def _embedded(
    request_id: str, asked: _Asked, completion: EngineCompletion, normalize: bool
) -> EmbeddingRequestOutput:
    if completion.embedding is None:
        raise EngineFailedError(f"{asked.place}: the engine ended it without a vector; try again")
    state = vector(completion.embedding)
    numbers: list[float] = (unit(state) if normalize else state).tolist()
    return EmbeddingRequestOutput(request_id, list(asked.ids), EmbeddingOutput(numbers))
