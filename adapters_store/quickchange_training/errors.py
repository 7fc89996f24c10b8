"""Errors of training; the command line prints their messages, which name the remedy.

TrainingError
├── DataError     an example that can't be used: file, line, field
├── RecipeError   an option that can't be trained with
├── ModelError    the base model can't be loaded
└── OutputError   the result can't be written where it should go
"""

from __future__ import annotations


class TrainingError(Exception):
    """Base class."""


class DataError(TrainingError):
    """Training data that can't be used; the message names file, line and field."""


class RecipeError(TrainingError):
    """A value that can't be trained with; the message names the option."""


class ModelError(TrainingError):
    """The base model or its tokenizer can't be loaded."""


def model_error(model: str, error: Exception) -> ModelError:
    """Error for a `--model` that transformers can't load."""
    said = " ".join(str(error).split())
    return ModelError(
        f"--model {model} can't be loaded ({said}); give a folder in transformers' layout, the id "
        "of a model in the hub's cache, or demo"
    )


class OutputError(TrainingError):
    """The folder for the adapter can't be used."""
