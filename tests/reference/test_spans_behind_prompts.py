"""Spans of a LoRA in a text behind virtual tokens: positions are the text's, and a span from its
begin on has the virtual tokens too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from engine_driver import Driver, make_engine, request
from prompt_adapters import LORA, TOKENS, Prompts, learn
from tiny_models import make_model

KIND = "prompt tuning"
SPANS: tuple[tuple[tuple[int, int | None], ...], ...] = (
    ((0, None),),
    ((0, 5),),
    ((3, None),),
    ((0, 2), (6, None)),
    ((1, 4), (9, 30)),
    ((40, None),),  # begins in no token of the text
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return learn("llama", tmp_path_factory.mktemp("prompts"), (KIND,))


@torch.inference_mode()
def expected(
    made: Prompts, text: Sequence[int], spans: Sequence[tuple[int, int | None]]
) -> list[int]:
    """Greedy tokens of transformers' model with hooks, each from the whole text."""
    model = make_model("llama")
    prompt = made.adapters[KIND].prompt
    assert prompt is not None
    front = prompt.values.float()
    modules = dict(model.named_modules())
    for path, update in made.adapters[LORA].updates.items():
        module = modules[path]

        def add(
            _module: torch.nn.Module,
            inputs: tuple[torch.Tensor],
            y: torch.Tensor,
            update: object = update,
        ) -> None:
            for begin, end in spans:
                rows = slice(
                    begin and begin + len(front), None if end is None else end + len(front)
                )
                low = inputs[0][:, rows] @ update.a.T  # type: ignore[attr-defined]
                y[:, rows] += update.scale * (low @ update.b.T)  # type: ignore[attr-defined]

        module.register_forward_hook(add)
    tokens = list(text)
    for _ in range(TOKENS):
        vectors = model.get_input_embeddings()(torch.tensor([tokens]))
        logits = model(inputs_embeds=torch.cat([front[None], vectors], 1)).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(text) :]


@pytest.mark.parametrize(("block_size", "batch"), [(4, 16), (8, 64)])
def test_a_span_is_of_the_text_and_not_of_what_stands_in_front(
    made: Prompts, block_size: int, batch: int
) -> None:
    text = made.texts[KIND]
    virtual = made.virtual_tokens(KIND)
    engine = make_engine(
        made.path, made.adapters.__getitem__, block_size=block_size, max_batch_tokens=batch
    )
    drive = Driver(engine)
    for again in ("", " again"):  # the second time from cached blocks
        for number, spans in enumerate(SPANS):
            adapters = [(KIND, 1.0, 0, None, virtual), *((LORA, 1.0, b, e) for b, e in spans)]
            engine.submit(request(f"{number}{again}", text, adapters, max_tokens=TOKENS))
        drive.finish(*(f"{number}{again}" for number in range(len(SPANS))))
        for number, spans in enumerate(SPANS):
            assert drive.tokens[f"{number}{again}"] == expected(made, text, spans), spans
    engine.close()


def test_the_spans_differ(made: Prompts) -> None:
    answers = {tuple(expected(made, made.texts[KIND], spans)) for spans in SPANS}
    assert len(answers) > len(SPANS) // 2
