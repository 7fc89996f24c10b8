"""A chat's thoughts: whether its prompt has begun one, their parser, constraints behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quickchange_server.api.openai.chat.chat_requests import ChatRequest
from quickchange_server.api.openai.chat.lark_rules import BLANKS, lark_mark, lark_marks
from quickchange_server.frontend.parsing.reasoning_parser import ReasoningFormat, ReasoningReader
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.structured_output.validator import Asked

_TAIL = 64  # tokens at a prompt's end that tell whether it has begun a thought


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The thoughts of a chat's answers."""

    form: ReasoningFormat
    opened: bool  # the prompt has begun one
    closed: bool  # the prompt has ended one, or skipped it

    @classmethod
    def of(
        cls, text: Text, form: ReasoningFormat, body: ChatRequest, prompt: Sequence[int]
    ) -> Thoughts:
        """The thoughts of answers to this prompt."""
        if body.continue_final_message:
            last = body.messages[-1]
            opened = form.left_open(last.text) if last.text else bool(last.reasoning_content)
            return cls(form, opened, not opened)
        end = text.decode(prompt[-_TAIL:])
        return cls(form, form.opened(end), form.closed(end))

    def reader(self) -> ReasoningReader:
        return ReasoningReader(self.form, opened=self.opened, closed=self.closed)

    def before(self, text: Text, asked: Asked) -> Asked:
        """The constraint, which holds from where the answer's own text begins."""
        form = self.form
        plain = f"({lark_mark(text, form.plain)} BLANKS?)? " if form.plain else ""
        last = f" (BLANKS? {lark_mark(text, form.last)})?" if form.last else ""
        again = f"({lark_mark(text, form.again)})? " if form.again else ""
        thought = f"thought BLANKS? {again}"
        if self.closed:
            start = plain
        elif self.opened:
            start = thought + plain
        else:
            start = f"(BLANKS? {lark_mark(text, form.begin)} {thought})? {plain}"
        if not start and not last:
            return asked
        grammar = f"start: {start}@answer{last}\n{BLANKS}"
        if "thought" in start:
            parts = text.special_parts(form.end)
            special = next((at for at, part in enumerate(parts) if isinstance(part, int)), None)
            lazy = "[lazy]" if special is None else ""  # no text is mistaken for a special token
            grammar += f"thought{lazy}: ANY {lark_marks(parts[special or 0 :])}\nANY: /(?s:.*)/\n"
        return replace(asked, constraint=replace(asked.constraint, before=grammar))
