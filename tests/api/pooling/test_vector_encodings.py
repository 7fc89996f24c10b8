"""Bytes of vectors in vLLM's dtypes: torch's own conversions."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.api.pooling.vector_encodings import EmbedDtype, encoded, to_bytes

DTYPES: dict[EmbedDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def by_torch(vector: np.ndarray, dtype: EmbedDtype) -> bytes:
    narrow = torch.from_numpy(vector).to(DTYPES[dtype])
    return narrow.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@given(numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_any_numbers_are_converted_as_torch_converts_them(
    dtype: EmbedDtype, numbers: list[float]
) -> None:
    vector = np.array(numbers, dtype=np.float32)
    assert to_bytes(vector, dtype, "little") == by_torch(vector, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_8_bit_value_its_neighbours_and_the_middles_between(dtype: EmbedDtype) -> None:
    values = [
        number
        for kind in (torch.float8_e4m3fn, torch.float8_e5m2)
        for number in torch.arange(256, dtype=torch.uint8).view(kind).double().tolist()
        if np.isfinite(number)
    ]
    ordered = np.unique(np.array([*values, 464.0, 480.0, 61440.0, 65536.0]))
    middles = (ordered[1:] + ordered[:-1]) / 2
    exact = np.concatenate([ordered, middles]).astype(np.float32)
    vector = np.concatenate(
        [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    )
    assert to_bytes(vector, dtype, "native") == by_torch(vector, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_big_endian_numbers_have_their_bytes_turned(dtype: EmbedDtype) -> None:
    vector = np.array([0.1, -2.5, 3.0], dtype=np.float32)
    width = DTYPES[dtype].itemsize
    little = np.frombuffer(by_torch(vector, dtype), np.uint8).reshape(3, width)
    assert to_bytes(vector, dtype, "big") == little[:, ::-1].tobytes()


def test_json_has_the_numbers_or_base64_of_the_bytes() -> None:
    vector = np.array([0.5, -0.25], dtype=np.float32)
    assert encoded(vector, "float", "bfloat16", "big") == [0.5, -0.25]
    text = encoded(vector, "base64", "float16", "little")
    assert isinstance(text, str)
    assert base64.b64decode(text) == by_torch(vector, "float16")
