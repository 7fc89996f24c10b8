"""Conversion and normalisation of the embeddings that the engine sends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def vector(embedding: bytes) -> Floats:
    """The pooled hidden state, float32 [H], from the bytes of `Delta.embedding`."""
    return np.frombuffer(embedding, dtype="<f4")


def unit(vector: Floats) -> Floats:
    """The vector scaled to L2 norm 1; a zero vector stays as it is."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if length == 0 else (vector / length).astype("<f4")
