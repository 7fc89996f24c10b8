"""docs/http.md names every field, every route and every error code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from http_support import BASE_SPEC
from pydantic import BaseModel
from text_support import byte_text

from quickchange_server import errors
from quickchange_server.api.admin.adapter_adding import AddFromPath, Compose, ComposedTerm
from quickchange_server.api.admin.adapters import PointAlias, PrefetchTo, Rollback
from quickchange_server.api.admin.keys import ChangedKey, KeyLimits, NewKey, Rotation
from quickchange_server.api.anthropic.message_blocks import ToolResultBlock, ToolUseBlock, Turn
from quickchange_server.api.anthropic.message_requests import (
    CountRequest,
    MessageRequest,
    MessageSender,
    MessageTool,
    MessageToolChoice,
    OutputConfig,
    OutputFormat,
    Thinking,
)
from quickchange_server.api.openai.chat.chat_requests import ChatRequest, Message
from quickchange_server.api.openai.requests import CompletionRequest
from quickchange_server.api.responses.response_items import (
    CallItem,
    CallOutput,
    InputMessage,
    ItemReference,
    ReasoningItem,
)
from quickchange_server.api.responses.response_requests import (
    ReasoningOptions,
    ResponseRequest,
    ResponseTool,
    TextOptions,
)
from quickchange_server.api.vllm.routes import Detokenize, LoadLora, Tokenize, UnloadLora
from quickchange_server.config import Settings
from quickchange_server.entrypoints.app import create_app
from quickchange_server.frontend.request_base import WeightedAdapter

FOLDER = Path(__file__).parents[2] / "docs"
DOCS = (FOLDER / "http.md").read_text()
BODIES: list[type[BaseModel]] = [
    CompletionRequest,
    ChatRequest,
    Message,
    ResponseRequest,
    InputMessage,
    CallItem,
    CallOutput,
    ReasoningItem,
    ItemReference,
    ReasoningOptions,
    ResponseTool,
    TextOptions,
    WeightedAdapter,
    AddFromPath,
    Compose,
    ComposedTerm,
    Rollback,
    PrefetchTo,
    PointAlias,
    LoadLora,
    UnloadLora,
    Tokenize,
    Detokenize,
    NewKey,
    KeyLimits,
    ChangedKey,
    Rotation,
]

ANTHROPICS: list[type[BaseModel]] = [
    *(MessageRequest, CountRequest, Turn, MessageTool, MessageToolChoice, Thinking),
    *(OutputConfig, OutputFormat, MessageSender, ToolUseBlock, ToolResultBlock),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_field_is_documented(body: type[BaseModel]) -> None:
    missing = [f for f in body.model_fields if not re.search(rf"[`\"]{f}[`\"]", DOCS)]
    assert missing == []


@pytest.mark.parametrize("body", ANTHROPICS, ids=lambda body: body.__name__)
def test_every_field_of_anthropics_routes_is_documented(body: type[BaseModel]) -> None:
    docs = (FOLDER / "anthropic.md").read_text()
    names = [field.alias or name for name, field in body.model_fields.items()]
    assert [name for name in names if not re.search(rf"[`\"]{name}[`\"]", docs)] == []


def test_every_route_is_documented() -> None:
    settings = Settings(model="unused", store=Path("unused"))
    app = create_app(settings, text=byte_text(), base=lambda: BASE_SPEC)
    for path in app.openapi()["paths"]:
        documented = re.sub(r"\{[a-z_]+\}", "", path).rstrip("/")
        assert documented.rpartition("/")[2] in DOCS, path


def test_every_error_code_is_documented() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {getattr(kind, "code", None) for kind in kinds} - {None}
    assert [code for code in codes if f"`{code}`" not in DOCS] == []
