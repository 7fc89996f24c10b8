"""vLLM's options and this server's settings in Ray Serve LLM's `engine_kwargs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.cluster.llm.engine_settings import (
    ELSEWHERE,
    HINTS,
    TRANSLATED,
    UNSUPPORTED,
    engine_settings,
    lora_modules,
)
from quickchange_server.config import Settings
from quickchange_server.errors import SettingError


def made(**engine_kwargs: Any) -> Settings:
    return engine_settings(
        engine_kwargs, model="m", model_id="id", device="cuda", threads=None, store=Path("store")
    )


@pytest.mark.parametrize(
    ("given", "setting", "value"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel", 2),
        ({"max_num_seqs": 7}, "max_sequences", 7),
        ({"max_num_batched_tokens": 99}, "max_batch_tokens", 99),
        ({"enable_prefix_caching": False}, "prefix_cache", False),
        ({"enable_lora": False}, "adapters", False),
        ({"max_lora_rank": 128}, "max_adapter_rank", 128),
        ({"lora_dtype": "auto"}, "adapter_dtype", "model"),
        ({"lora_dtype": "half"}, "adapter_dtype", "float16"),
        ({"kv_cache_memory_bytes": 4096}, "kv_cache_bytes", 4096),
        ({"dtype": "half"}, "dtype", "float16"),
        ({"dtype": "float"}, "dtype", "float32"),
        ({"max_model_len": 4096}, "max_model_len", 4096),
        ({"max_model_len": -1}, "max_model_len", None),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization", 0.5),
        ({"seed": 3}, "seed", 3),
        ({"quantization": "bitsandbytes"}, "quantization", "none"),
        ({"adapter_host_bytes": 4096}, "adapter_host_bytes", 4096),
        ({"device": "cpu"}, "device", "cpu"),
        ({"store": "elsewhere"}, "store", "elsewhere"),
    ],
)
def test_an_option_becomes_its_setting(given: dict[str, Any], setting: str, value: Any) -> None:
    assert getattr(made(**given), setting) == value


def test_the_model_is_named_by_its_id() -> None:
    assert (made().model, made().served_model_name, made().store) == ("m", "id", "store")


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(HINTS)), st.integers() | st.booleans() | st.text()))
def test_hints_change_nothing(hints: dict[str, Any]) -> None:
    assert made(**hints) == made()


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_not_served_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(SettingError, match=rf"^engine_kwargs\.{name}: .*'x' is not supported; "):
        made(**{name: "x"})
    for neutral in (None, *UNSUPPORTED[name].neutral):
        assert made(**{name: neutral}) == made()


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_what_ray_sets_is_refused_with_where_it_is_set(name: str) -> None:
    with pytest.raises(SettingError, match=rf"engine_kwargs\.{name}: does not belong here"):
        made(**{name: "x"})


@settings(deadline=None)
@given(st.text(min_size=1))
def test_an_unknown_option_is_named(name: str) -> None:
    known = {*Settings.model_fields, *TRANSLATED, *HINTS, *UNSUPPORTED, *ELSEWHERE, "lora_modules"}
    if name not in known:
        with pytest.raises(SettingError) as error:
            made(**{name: 1})
        assert error.value.param == name
        assert str(error.value).startswith(f"engine_kwargs.{name}: unknown; ")


def test_a_misspelled_option_is_told_its_name() -> None:
    with pytest.raises(SettingError, match="did you mean 'max_num_seqs'"):
        made(max_num_seq=8)


def test_a_bad_value_is_told_under_the_name_that_it_came_by() -> None:
    with pytest.raises(SettingError, match=r"^engine_kwargs\.max_num_seqs: "):
        made(max_num_seqs=0)


def test_one_setting_under_two_names_is_refused() -> None:
    with pytest.raises(SettingError, match="max_sequences: is max_num_seqs under another name"):
        made(max_num_seqs=8, max_sequences=8)


def test_no_name_is_in_two_lists() -> None:
    lists = [set(Settings.model_fields), set(TRANSLATED), set(HINTS), set(UNSUPPORTED)]
    assert sum(map(len, lists)) == len(set.union(*lists))
    assert set(TRANSLATED.values()) <= set(Settings.model_fields)


def test_lora_modules_are_names_and_folders() -> None:
    modules = [{"name": "a", "path": "/a", "base_model_name": "b"}, {"name": "c", "path": "/c"}]
    assert lora_modules({"lora_modules": modules}) == {"a": "/a", "c": "/c"}
    assert lora_modules({"lora_modules": {"a": "/a"}}) == {"a": "/a"}
    assert lora_modules({}) == {}
    for wrong in ("a=/a", [{"name": "a"}], [1]):
        with pytest.raises(SettingError, match=r"engine_kwargs\.lora_modules"):
            lora_modules({"lora_modules": wrong})


def test_the_guide_names_what_is_translated() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "ray-serve-llm.md").read_text()
    for name, setting in TRANSLATED.items():
        assert f"`{name}`" in guide
        assert f"`{setting}`" in guide
