"""The proof at load: it refuses each kind of model that paged attention would compute wrongly,
names in what it differs, and leaves alone what is right."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scaled_models import LIMIT, make_scaled
from tiny_models import FAMILIES, make_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, LlamaConfig, LlamaForCausalLM

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model import fusion, paged_attention
from quickchange_server.model.architectures import position_scaling
from quickchange_server.model.fusion import FusedAttention, FusedDecoderLayer
from quickchange_server.model.loading import model_loader, model_proof
from quickchange_server.model.loading.model_loader import LoadedModel, prepare
from quickchange_server.model.loading.model_proof import shortened

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Plain(LlamaForCausalLM):
    """A model whose class is not transformers' own, without a fault."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        logits_to_keep: Any = 0,
        **_: Any,
    ) -> Any:
        return super().forward(
            input_ids=input_ids,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            use_cache=False,
        )


class CountsRows(Plain):
    """Counts positions itself, from the first row on."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **more: Any) -> Any:
        del position_ids
        own = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, own, **more)


class ReadsAhead(Plain):
    """Shows each token those behind it, wherever it is asked for a mask."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **more: Any) -> Any:
        if self.config._attn_implementation == "eager":
            rows = input_ids.shape[1]
            all_seen = torch.zeros(1, 1, rows, rows)
            return LlamaForCausalLM.forward(
                self, input_ids=input_ids, position_ids=position_ids, attention_mask=all_seen
            )
        return super().forward(input_ids, position_ids, **more)


class MixesNeighbours(Plain):
    """Adds to each token's embedding the one before, which a step need not hold."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(self._mix, with_kwargs=True)

    def _mix(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = self.model.embed_tokens(kwargs["input_ids"])
        positions = kwargs["position_ids"]
        if positions is None:
            positions = torch.arange(x.shape[1])[None]
        follows = positions.diff(dim=1, prepend=positions[:, :1] - 2) == 1
        mixed = x + torch.where(follows[..., None], x.roll(1, 1), 0)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": mixed}


class Fails(Plain):
    """Can't read more than one row."""

    def forward(self, input_ids: Tensor, *args: Any, **more: Any) -> Any:
        if input_ids.shape[1] > 1:
            raise IndexError("index 5 is out of bounds for dimension 1 with size 5")
        return super().forward(input_ids, *args, **more)


class AttendsTwice(Plain):
    """Adds up what two passes through each attention module give."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.forward = self._twice(layer.self_attn.forward)

    @staticmethod
    def _twice(attend: Any) -> Any:
        def forward(hidden_states: Tensor, **more: Any) -> Any:
            first, second = (attend(h, **more)[0] for h in (hidden_states, hidden_states.flip(-1)))
            return first + second, None

        return forward


class NeedsAllLayers(Plain):
    """Can't run with fewer layers than it was made with."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **more: Any) -> Any:
        if len(self.model.layers) < SIZES["num_hidden_layers"]:
            raise RuntimeError("a layer is missing")
        return super().forward(input_ids, position_ids, **more)


def made(kind: type[LlamaForCausalLM], dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **sizes})
    config._attn_implementation = paged_attention.NAME
    model = kind(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def of_family(name: str) -> Any:
    model = make_model(name)
    model.set_attn_implementation(paged_attention.NAME)
    return model


def refusal(model: nn.Module, **options: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(model, adapters=True, **options)
    return caught.value.message


def count(loaded: LoadedModel, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in loaded.module.modules())


@pytest.fixture(autouse=True)
def registered() -> None:
    paged_attention.register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (CountsRows, "where a text is computed in parts"),
        (ReadsAhead, "already for one text by itself"),
        (MixesNeighbours, "where a text is computed in parts"),
    ],
)
def test_a_fault_is_refused_with_what_calls_it_forth(
    kind: type[LlamaForCausalLM], reason: str, dtype: torch.dtype
) -> None:
    said = refusal(made(kind, dtype))
    assert said.startswith(f"{kind.__name__} can't be served: logits differ from eager")
    assert reason in said
    assert "--no-model-check" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_without_fault_is_served_fused(dtype: torch.dtype) -> None:
    loaded = prepare(made(Plain, dtype), adapters=True)
    assert count(loaded, FusedDecoderLayer) == SIZES["num_hidden_layers"]


def test_the_check_can_be_left_out() -> None:
    prepare(made(CountsRows), adapters=True, model_check=False)


@pytest.mark.parametrize("quantization", ["none", "int8", "int8-exact", "int4"])
def test_rounded_weights_are_proved_too(quantization: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    prepare(made(Plain, **sizes), adapters=False, quantization=quantization)  # type: ignore[arg-type]
    assert "position_ids" in refusal(made(CountsRows, **sizes), quantization=quantization)


def test_an_error_of_the_model_names_the_architecture_and_the_reason() -> None:
    said = refusal(made(Fails))
    assert said.startswith("Fails can't be served")
    assert "IndexError: index 5 is out of bounds" in said


def test_a_window_that_the_attention_interface_is_not_told_of_is_refused() -> None:
    whole = paged_attention._interface

    def untold(*args: Any, sliding_window: int | None = None, **more: Any) -> Any:
        del sliding_window
        return whole(*args, **more)

    AttentionInterface.register(paged_attention.NAME, untold)
    try:
        assert "already for one text by itself" in refusal(of_family("mistral"))
    finally:
        paged_attention.register()


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_window_that_is_off_by_one_is_not_fused(
    off_by: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made_by = FusedAttention.__init__

    def other(self: FusedAttention, *args: Any) -> None:
        made_by(self, *args)
        self.window += off_by

    monkeypatch.setattr(FusedAttention, "__init__", other)
    loaded = prepare(of_family("mistral"), adapters=True)
    assert count(loaded, FusedAttention) == 0
    assert "MistralForCausalLM: its attention are not fused" in caplog.text


def test_a_fused_module_that_swallows_an_argument_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fusion, "_goes_by_positions", lambda *_: False)
    caplog.set_level(logging.WARNING)
    loaded = prepare(make_scaled("ministral3", paged_attention.NAME), adapters=True)
    assert count(loaded, FusedAttention) == 0
    assert "Ministral3ForCausalLM" in caplog.text


def test_ministral_is_not_fused_in_the_first_place(caplog: pytest.LogCaptureFixture) -> None:
    loaded = prepare(make_scaled("ministral3", paged_attention.NAME), adapters=True)
    assert count(loaded, FusedAttention) == 0
    assert not caplog.text


@pytest.mark.parametrize("kind", ["phi3", "phimoe", "llama-longrope", "llama-dynamic"])
def test_frequencies_chosen_for_a_whole_batch_are_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_loader, "scale_by_text", lambda *_: None)
    assert "where several texts share a step" in refusal(make_scaled(kind, paged_attention.NAME))


def test_a_limit_that_is_off_by_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two_sets = position_scaling._TwoSets
    monkeypatch.setattr(
        position_scaling, "_TwoSets", lambda limit, *sets: two_sets(limit + 2 * LIMIT, *sets)
    )
    assert "already for one text by itself" in refusal(make_scaled("phi3", paged_attention.NAME))


def test_attention_that_is_called_twice_in_a_layer_is_refused_by_name() -> None:
    said = refusal(made(AttendsTwice))
    assert "AttendsTwice" in said
    assert "more than once" in said


def test_attention_tempered_by_rows_of_a_call_is_refused() -> None:
    """Llama 4 counts the rows of a call, and sees its effect from position 8,192 on."""
    config = AutoConfig.for_model(
        "llama4_text",
        **{**SIZES, "intermediate_size_mlp": 80, "num_local_experts": 2, "head_dim": 12},
        num_key_value_heads=2,
    )
    config.layer_types = ["full_attention"] * SIZES["num_hidden_layers"]
    config.no_rope_layers = [0] * SIZES["num_hidden_layers"]
    config._attn_implementation = paged_attention.NAME
    from transformers import Llama4ForCausalLM

    model = Llama4ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert "Llama4ForCausalLM can't be served: logits differ" in refusal(model)


def test_bidirectional_models_are_refused_by_name() -> None:
    model = make_model("roc_bert")
    model.config.is_decoder = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    model.set_attn_implementation(paged_attention.NAME)
    assert "RoCBert" in refusal(model)


def test_only_the_first_layer_of_each_kind_runs() -> None:
    ran: set[int] = set()
    model = made(Plain, num_hidden_layers=9)
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.add(index))
    model_proof.ModelProof(model, rounded=False)
    assert ran == {0}


def test_a_model_that_needs_all_its_layers_is_proved_with_all() -> None:
    sizes = {"num_hidden_layers": SIZES["num_hidden_layers"]}
    loaded = prepare(made(NeedsAllLayers, **sizes), adapters=True)
    assert count(loaded, FusedDecoderLayer) == SIZES["num_hidden_layers"]


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_proof_leaves_the_model_and_the_generator_as_they_were(
    family: str, fails: bool
) -> None:
    model = of_family(family)
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if fails and calls > 1:
            raise RuntimeError

    model.lm_head.register_forward_pre_hook(fail)
    before = snapshot(model)
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    proof = model_proof.ModelProof(model, rounded=False)
    assert (proof._failed is not None) == fails
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("kind", ["phi3", "llama-dynamic"])
def test_frequencies_stay_as_they_were(kind: str) -> None:
    model = make_scaled(kind, paged_attention.NAME)
    before = snapshot(model)
    model_proof.ModelProof(model, rounded=False)
    assert snapshot(model) == before


def snapshot(model: nn.Module) -> list[tuple[str, str, object]]:
    """Plain attributes and buffers of all modules, layers' order, and the configuration."""
    found: list[tuple[str, str, object]] = [("", "config", repr(model.config.to_dict()))]  # type: ignore[operator, union-attr]
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, str, float))}
        found += [(path, name, value) for name, value in sorted(plain.items())]
        found += [(path, k, b.tolist()) for k, b in module._buffers.items() if b is not None]
    return found


class TestShortened:
    sizes: ClassVar[Any] = st.sets(st.integers(1, 10_000), max_size=8)

    @given(sizes=sizes)
    def test_sizes_keep_their_order_and_grow_no_longer(self, sizes: set[int]) -> None:
        short = shortened(sizes)
        ordered = [short[size] for size in sorted(sizes)]
        assert ordered == sorted(set(ordered))
        assert all(short[size] <= size for size in sizes)

    @given(sizes=sizes)
    def test_sizes_that_differ_by_one_go_on_doing_so(self, sizes: set[int]) -> None:
        short = shortened(sizes)
        for size in sizes:
            assert ((size + 1) in sizes) <= (short.get(size + 1, 0) - short[size] == 1)

    @given(size=st.integers(9, 10_000))
    def test_one_window_is_shorter_than_a_text(self, size: int) -> None:
        assert shortened({size})[size] < model_proof._LENGTH


def test_every_family_of_the_tests_is_proved() -> None:
    for family in sorted(FAMILIES):
        prepare(of_family(family), adapters=False)
