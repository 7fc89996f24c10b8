"""Embeddings as the engine sends them, and their normalisation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def vector(embedding: bytes) -> Floats:
    """The hidden state [H] of `Delta.embedding`."""
    return np.frombuffer(embedding, dtype="<f4")


def unit(vector: Floats) -> Floats:
    """The vector at length 1; a vector of zeros, which has no direction, as it is."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if length == 0 else (vector / length).astype("<f4")
