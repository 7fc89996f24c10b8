"""JSON of a response: what came of the request, and what the request asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.chat.chat_route import Chat
from quickchange_server.api.openai.responses import predictions
from quickchange_server.api.responses.response_requests import (
    ResponseRequest,
    ResponseToolChoice,
)
from quickchange_server.errors import QuickchangeError
from quickchange_server.frontend.request_base import Json

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


def failure_of(error: QuickchangeError) -> Json:
    """The response's field `error`."""
    codes = {429: "rate_limit_exceeded"}
    code = "server_error" if error.status >= 500 else codes.get(error.status, "invalid_prompt")
    return {"code": code, "message": error.message}


@dataclass(frozen=True, slots=True)
class ResponseObject:
    """Writer of one response's JSON at any time of its life."""

    body: ResponseRequest
    chat: Chat
    stored: bool

    def told(
        self,
        status: Status,
        output: list[Json],
        *,
        reasoning_spans: Sequence[tuple[int, int]],
        error: QuickchangeError | None = None,
        completed_at: float | None = None,
    ) -> Json:
        body, opened = self.body, self.chat.generation.account.opened
        sampling = body.sampling_params()
        response: Json = {
            "id": opened.request_id,
            "object": "response",
            "created_at": int(opened.at),
            "status": status,
            "background": False,
            "completed_at": None if completed_at is None else int(completed_at),
            "error": None if error is None else failure_of(error),
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": opened.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self.stored,
            "temperature": sampling.temperature,
            "text": _text(body),
            "tool_choice": _choice(body.tool_choice),
            "tools": [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                    "strict": tool.strict,
                }
                for tool in body.tools
            ],
            "top_logprobs": body.top_logprobs,
            "top_p": sampling.top_p,
            "truncation": body.truncation,
            "usage": None if status == "in_progress" else self._usage(reasoning_spans),
            "user": body.user,
            "metadata": body.metadata,
        }
        if opened.assignment is not None:
            response["quickchange"] = request_selection.shown(opened.assignment)
        return response

    def _usage(self, reasoning_spans: Sequence[tuple[int, int]]) -> Json:
        made = self.chat.generation
        prompt_tokens = made.account.opened.prompt_tokens
        details: Json = {"reasoning_tokens": made.choices[0].tokens_within(reasoning_spans)}
        if self.chat.drafting:
            counts = predictions(made.drafted_tokens, made.accepted_tokens)
            details |= counts["completion_tokens_details"]
        return {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": made.cached_tokens,
                "cache_write_tokens": 0,  # of a cache that is paid for
            },
            "output_tokens": made.completion_tokens,
            "output_tokens_details": details,
            "total_tokens": prompt_tokens + made.completion_tokens,
        }


def _text(body: ResponseRequest) -> Json:
    wanted = body.text.format
    if wanted.type == "json_schema":
        shown: Json = {
            "type": "json_schema",
            "name": wanted.name,
            "description": wanted.description,
            "schema": wanted.schema_,
            "strict": True,  # a schema is always enforced
        }
    else:
        shown = {"type": wanted.type}
    text = {"format": shown}
    return text if body.text.verbosity is None else {**text, "verbosity": body.text.verbosity}


def _choice(choice: ResponseToolChoice) -> Json | str:
    match choice.type:
        case "function":
            return {"type": "function", "name": choice.name}
        case "allowed_tools":
            tools = [tool.model_dump() for tool in choice.tools]
            return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
        case mode:
            return mode
