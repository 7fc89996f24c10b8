"""The model's chat template: chats to prompts.

What a template takes (parts of a content, a role, a variable) is read from its own code or from
what it makes of a probe; no model is known by name. Knows nothing of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import Environment, TemplateError, meta

from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.encoding.model_tokenizer import ModelTokenizer
from quickchange_server.frontend.parsing.reasoning_parser import (
    ReasoningFormat,
    reasoning_format,
    with_thought,
)
from quickchange_server.frontend.parsing.tool_forms import ToolForm
from quickchange_server.frontend.parsing.tool_learning import Messages, tool_form

MAX_ROLE = 64  # characters
USUAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

# Variables that are no client's to set: what the server passes, and transformers' own arguments.
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception"})
RESERVED = _GIVEN | {
    "self", "conversation", "conversations", "chat_template", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own
_QUESTION, _ANSWER = "probe_question", "probe_answer"


@dataclass(frozen=True, slots=True)
class Rendering:
    """The way a chat is rendered, besides its messages and tools."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the last message goes on, rather than a new one begin
    documents: Messages = ()
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the template


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        found = tokenizer.template or ""
        self.source: str = found if isinstance(found, str) else found.get("default", "")

    @property
    def exists(self) -> bool:
        return bool(self._tokenizer.template)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set, but for what every template gets."""
        try:
            parsed = Environment(
                extensions=["jinja2.ext.loopcontrols"],
                autoescape=True,  # of no consequence: nothing is rendered by it
            ).parse(_TAGS.sub("", self.source))
        except TemplateError:
            return frozenset()  # what renders it tells the error
        known = _GIVEN | set(self._tokenizer.marks)
        return frozenset(meta.find_undeclared_variables(parsed)) - known

    def tool_form(self, ends: Collection[str]) -> ToolForm | None:
        """The form of tool calls; None if the template takes no tools. `ends`: end-of-sequence
        tokens."""
        return tool_form(self.apply, ends) if self.exists else None

    @cached_property
    def reasoning_format(self) -> ReasoningFormat | None:
        """The form of thoughts; None if the template knows none."""
        return reasoning_format(self.apply, self.source, self.variables) if self.exists else None

    def render(self, messages: Messages, tools: Messages, how: Rendering, *, param: str) -> str:
        """The prompt of a chat, special tokens included.

        Raises InvalidRequestError if there is no template, or it refuses the messages (roles that
        must alternate, for example), or can't do what is asked.
        """
        if not self.exists:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions with the whole prompt",
                param=param,
            )
        if how.documents and not re.search(r"\bdocuments\b", self.source):
            raise InvalidRequestError(
                "documents: this model's chat template reads none; put them into the messages",
                param="documents",
            )
        formed = [self._formed(message) for message in messages]
        rest: dict[str, Any] = {**how.variables}
        if how.documents:
            rest["documents"] = [dict(document) for document in how.documents]
        if how.continue_final_message:
            rest["continue_final_message"] = self._continued(messages[-1], formed[-1])
        try:
            rendered = self.apply(formed, tools, how.add_generation_prompt, **rest)
        except TemplateError as error:
            if str(error).startswith("continue_final_message"):
                raise InvalidRequestError(
                    "continue_final_message: the model's chat template does not write the last "
                    "message so that it can go on; render the chat yourself and use "
                    "/v1/completions",
                    param="continue_final_message",
                ) from error
            raise InvalidRequestError(
                f"{param}: the model's chat template refuses these messages: {error}", param=param
            ) from error
        self._check_roles(messages, rendered, param)
        return rendered

    def apply(
        self,
        messages: Messages,
        tools: Messages = (),
        add_generation_prompt: bool = False,
        /,
        **rest: Any,
    ) -> str:
        """The rendered template. Raises jinja2.TemplateError for any error in its code."""
        try:
            return self._tokenizer.render(messages, tools or None, add_generation_prompt, **rest)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise TemplateError(str(error)) from error

    # --- messages in the form that the template takes -------------------------------------------

    def _formed(self, message: Mapping[str, Any]) -> dict[str, Any]:
        formed = dict(message)
        if formed["role"] == "developer" and not self._knows_developer:
            formed["role"] = "system"
        content = formed.get("content")
        texts, parts = self.takes.get(formed["role"], (True, False))
        if isinstance(content, list) and not parts:
            formed["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and content and not texts:
            formed["content"] = [{"type": "text", "text": content}]
        thought = formed.pop("reasoning", None)
        return with_thought(formed, thought, self.reasoning_format) if thought else formed

    @cached_property
    def _knows_developer(self) -> bool:
        return re.search(r"""["']developer["']""", self.source) is not None

    @cached_property
    def takes(self) -> dict[str, tuple[bool, bool]]:
        """For each usual role: true, true if it takes a content that is a text, one that is parts;
        texts alone from other roles."""
        asked = {"role": "user", "content": _QUESTION}
        probes: dict[str, tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]] = {
            "system": ((), (asked,)),
            "user": ((), ()),
            "assistant": ((asked,), ()),
        }
        found = {}
        usual = self._written([asked], _QUESTION)
        for role, (before, behind) in probes.items():
            if role != "user" and not usual:  # what is asked about must not fail for another reason
                parts = [{"type": "text", "text": _QUESTION}]
                before, behind = (
                    [{**one, "content": parts} for one in ones] for ones in (before, behind)
                )
            forms = _ANSWER, [{"type": "text", "text": _ANSWER}]
            texts, lists = (
                self._written([*before, {"role": role, "content": form}, *behind], _ANSWER)
                for form in forms
            )
            found[role] = (texts or not lists, lists)
        return found

    def _written(self, messages: Messages, wanted: str) -> bool:
        """True if the template writes the text, and not as a part of a list's own notation."""
        try:
            rendered = self.apply(messages)
        except TemplateError:
            return False
        return wanted in rendered and not re.search(rf"""['"]text['"]: ['"]{wanted}""", rendered)

    def _continued(self, message: Mapping[str, Any], formed: Mapping[str, Any]) -> bool | str:
        """Value of transformers' `continue_final_message`: true, or the field that goes on."""
        if formed.get("content"):
            return True
        if message.get("reasoning") and "reasoning_content" in formed:
            return "reasoning_content"
        raise InvalidRequestError(
            "continue_final_message: the last message has no text to go on with; give it content, "
            "or leave this out",
            param="continue_final_message",
        )

    def _check_roles(self, messages: Messages, rendered: str, param: str) -> None:
        """Raise for a message of a role of the client's own that the template leaves out."""
        for index, message in enumerate(messages):
            role, content = message["role"], message.get("content") or ""
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            if role not in USUAL_ROLES and not all(text.strip() in rendered for text in texts):
                place = f"{param}[{index}].role"
                raise InvalidRequestError(
                    f"{place}: the model's chat template leaves out messages of the role {role!r}; "
                    "use system, user, assistant or tool",
                    param=place,
                )
