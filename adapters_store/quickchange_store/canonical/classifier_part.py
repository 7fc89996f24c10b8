"""The classification head of an adapter: class scores of a text from its last hidden state.

The state is the one that enters the LM head, of the text's last token, with the adapter's updates.
Scores are `weight · state + bias`; what is told of them are probabilities by `activation`, as the
head was trained: softmax over classes of which one holds, a sigmoid of each where several may, the
score itself for a regression. In numpy, so that a process without torch can apply a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from quickchange_store.errors import InvalidAdapterError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
ClassActivation = Literal["softmax", "sigmoid", "identity"]
CLASS_ACTIVATIONS: tuple[ClassActivation, ...] = get_args(ClassActivation)
MAX_CLASSES = 10_000
MAX_LABEL = 1_000  # characters
WEIGHT, BIAS = "classifier.weight", "classifier.bias"  # tensors in the canonical bytes


def default_labels(count: int) -> tuple[str, ...]:
    """The names that transformers gives to classes without names."""
    return tuple(f"LABEL_{number}" for number in range(count))


def usual_activation(classes: int) -> ClassActivation:
    """The activation of a head that was trained without a problem_type."""
    return "softmax" if classes > 1 else "sigmoid"


@dataclass(frozen=True, eq=False)
class ClassifierHead:
    """Weight [classes, H] and bias [classes] or None, float32; a label for each class.

    Raises InvalidAdapterError where they do not fit together.
    """

    weight: Floats
    bias: Floats | None
    labels: tuple[str, ...]
    activation: ClassActivation

    def __post_init__(self) -> None:
        shape = self.weight.shape
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_CLASSES or not shape[1]:
            raise InvalidAdapterError(
                f"a classification head with weight {list(shape)}",
                key="weight",
                remedy=f"it must be [classes, hidden size], of 1 to {MAX_CLASSES} classes",
            )
        if self.bias is not None and self.bias.shape != shape[:1]:
            raise InvalidAdapterError(
                f"a classification head with weight {list(shape)} and bias {list(self.bias.shape)}",
                key="bias",
                remedy="it must be [classes]",
            )
        longest = max(map(len, self.labels), default=0)
        if len(self.labels) != shape[0] or longest > MAX_LABEL:
            raise InvalidAdapterError(
                f"{len(self.labels)} labels for a classification head of {shape[0]} classes",
                key="id2label",
                remedy=f"give each class a label of at most {MAX_LABEL} characters, or none one",
            )
        if self.activation not in CLASS_ACTIVATIONS:
            raise InvalidAdapterError(
                f"activation {self.activation!r} is not known",
                key="activation",
                remedy=f"use one of {', '.join(CLASS_ACTIVATIONS)}",
            )

    @property
    def classes(self) -> int:
        return int(self.weight.shape[0])

    @property
    def hidden(self) -> int:
        return int(self.weight.shape[1])

    @property
    def parameters(self) -> int:
        return self.weight.size + (0 if self.bias is None else self.bias.size)

    @property
    def tensors(self) -> dict[str, Floats]:
        """The head's tensors by their stored names."""
        return {WEIGHT: self.weight, **({} if self.bias is None else {BIAS: self.bias})}

    def encode(self) -> dict[str, Any]:
        """The head's entry in the header of the canonical bytes."""
        return {"activation": self.activation, "labels": list(self.labels)}

    def scores(self, states: Floats) -> Doubles:
        """Scores [n, classes] of hidden states [n, H], before the activation."""
        found: Doubles = states.astype(np.float64) @ self.weight.T.astype(np.float64)
        return found if self.bias is None else found + self.bias

    def probabilities(self, scores: Doubles) -> Doubles:
        """The activation of scores [n, classes]."""
        match self.activation:
            case "identity":
                return scores
            case "sigmoid":  # by the exponential that can't overflow
                small = np.exp(-np.abs(scores))
                told: Doubles = np.where(scores >= 0, 1, small) / (1 + small)
            case "softmax":
                powers = np.exp(scores - scores.max(axis=1, keepdims=True))
                told = powers / powers.sum(axis=1, keepdims=True)
        return told


def assemble(
    entry: Mapping[str, Any], names: Sequence[str] | set[str], tensor: Callable[[str], Floats]
) -> ClassifierHead:
    """The head of a header's entry and tensors by name.

    Raises InvalidAdapterError, and KeyError or TypeError where the entry is damaged.
    """
    bias = tensor(BIAS) if BIAS in names else None
    return ClassifierHead(tensor(WEIGHT), bias, tuple(entry["labels"]), entry["activation"])
