"""The public Python API, modelled on vLLM's `LLM`: texts in, texts out, no server.

Each call answers a list of prompts in one batch, each with its own adapter. The whole call is
checked before any of it runs. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, cast

from pydantic import ValidationError
from tqdm.auto import tqdm

from quickchange_server.adapter_registry.resolver import AUTO, OFF, Catalog, Selection, base_names
from quickchange_server.config import Settings
from quickchange_server.entrypoints.engine_start import token_text
from quickchange_server.entrypoints.in_process_engine import EngineCompletion, InProcessEngine
from quickchange_server.entrypoints.outputs import EmbeddingRequestOutput, RequestOutput
from quickchange_server.entrypoints.prompt_answers import AnswerMaker, embedded
from quickchange_server.entrypoints.python_api.given_prompts import (
    AskedPrompt,
    ChatFields,
    Conversation,
    Prompt,
    PromptReader,
    several,
    validated,
)
from quickchange_server.entrypoints.python_api.named_adapters import (
    Adapter,
    Folder,
    NamedAdapters,
    each,
    publish,
)
from quickchange_server.errors import InvalidRequestError, SettingError
from quickchange_server.frontend.adapter_texts import AdapterTexts
from quickchange_server.frontend.context_length import check_fits
from quickchange_server.frontend.request_admission import Seeds
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Delta, Pooling, SamplingParams, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.store import Store

_LONG = 16  # number of prompts from which a progress bar is shown


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
            text = Text.load(made.model)
            adapter_store = Store(*made.store_opening)
            catalog = Catalog(
                adapter_store,
                base_names(made),
                adapters=made.adapters,
                turbo=made.turbo,
                prompt_lookup=made.prompt_lookup,
                tokens=text.vocab_size + made.spare_tokens,
            )
            if adapters:
                base = replace(base_spec(made.model), spare_tokens=made.spare_tokens)
                publish(adapter_store, adapters, base, catalog.base_names)
            self._adapters = NamedAdapters(adapter_store, catalog)
            words = token_text(text) if made.turbo and made.prompt_lookup else None
            self._engine = opened.enter_context(InProcessEngine(made, text=words))
            most = self._engine.info.max_model_len
            self._texts = AdapterTexts(text, adapter_store.tokenizer)
            self._prompts = PromptReader(most)
            self._answers = AnswerMaker(Seeds(made.seed), most)
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
        given = several(prompts)
        selections, texts = self._selected(adapter, turbo, len(given))
        asked = self._prompts.read(given, texts)
        return self._generate(asked, params or SamplingParams(), selections, use_tqdm)

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
        rendering = validated(
            ChatFields,
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
        selections, texts = self._selected(adapter, turbo, len(conversations))
        asked = [
            self._prompts.chat(f"messages[{i}]", conversation, rendering, text)
            for i, (conversation, text) in enumerate(zip(conversations, texts, strict=True))
        ]
        return self._generate(asked, params or SamplingParams(), selections, use_tqdm)

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
        given = several(prompts)
        selections, texts = self._selected(adapter, OFF, len(given))
        asked = self._prompts.read(given, texts)
        sampling = SamplingParams(max_tokens=0)
        submits = [
            Submit(str(i), one.ids, sampling, selection.serving(one.ids), pooling=pooling, seed=0)
            for i, (one, selection) in enumerate(zip(asked, selections, strict=True))
        ]
        most = self._engine.info.max_model_len
        for one, submit in zip(asked, submits, strict=True):
            check_fits(most, len(one.ids), one.place, submit.virtual_tokens)
        completions = self._run(submits, None, use_tqdm)
        return [
            embedded(str(i), one, completion, normalize)
            for i, (one, completion) in enumerate(zip(asked, completions, strict=True))
        ]

    def _selected(
        self, adapter: Adapter | Sequence[Adapter], turbo: str | Sequence[str], count: int
    ) -> tuple[Sequence[Selection], list[Text]]:
        """What serves each of `count` prompts, and the tokenizers that they are read with."""
        selections = self._adapters.selections(adapter, turbo, count)
        return selections, [self._texts.now(selection.tokenizer) for selection in selections]

    def _generate(
        self,
        asked: Sequence[AskedPrompt],
        params: SamplingParams | Sequence[SamplingParams],
        selections: Sequence[Selection],
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        each_params: list[SamplingParams] = each(params, len(asked), "params", (SamplingParams,))
        for selection in selections:
            selection.check_generates()
        choices = [
            self._answers.choices(index, *one)
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
            self._answers.output(
                str(index), one, params, [(c, next(completions)) for c in of_prompt]
            )
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


def _settings(**given: Any) -> Settings:
    try:
        return Settings(**given)
    except ValidationError as error:
        finding = error.errors()[0]
        name = str(finding["loc"][0])
        raise SettingError(
            f"{name}: {finding['msg']}; docs/settings.md lists the settings", param=name
        ) from error
