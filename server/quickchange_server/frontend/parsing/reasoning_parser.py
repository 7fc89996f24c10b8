"""A model's thoughts: the marks that its chat template puts around them, and their parser.

No model is known by name: the template renders sample messages, and what it writes around a
thought, or takes out of an earlier answer, marks thoughts from then on. Knows nothing of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from jinja2 import TemplateError

from quickchange_server.frontend.parsing.tool_learning import Messages

_ASK = {"role": "user", "content": "probe_question"}
_AGAIN = {"role": "user", "content": "probe_return"}
_SAID, _THOUGHT = "probe_content", "probe_thought"
_ANSWER = {"role": "assistant", "content": _SAID}
_CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00000",  # nine letters and digits, as the strictest template demands
            "type": "function",
            "function": {"name": "probe_tool", "arguments": {"probe_key": "probe_value"}},
        }
    ],
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe_description",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
_THOUGHT_FIELDS = ("reasoning", "reasoning_content", "tool_plan")  # transformers adds `thinking`

# What looks like the end of something, and how its beginning is written.
_CLOSERS = re.compile(
    r"</[^<>\s/{}%]{1,40}>|\[/[^\[\]\s{}%]{1,40}\]|<\|(?:END|end)_[^<>|\s]{1,40}\|>"
)
_ENDINGS = (("</", "<"), ("[/", "["), ("<|END_", "<|START_"), ("<|end_", "<|start_"))
_MARK = re.compile(r"[<\[][^<>\[\]\s]{1,60}[>\]]")
_LAST_MARK = re.compile(_MARK.pattern + "$")
_SPLIT_MARK = re.compile(r"[<\[][^<>\[\]]*$")
_PAIR = re.compile(r"<([^<>/\s]{1,40})>\s*(?:\.\.\.)?\s*</\1>")
_ABOUT = re.compile(r"think|thought|reason", re.IGNORECASE)
_PHRASE = re.compile(r"""['"`]([^'"`\n]{4,64}:)['"`]""")


class RenderProbe(Protocol):
    """The rendered template. Raises jinja2.TemplateError."""

    def __call__(
        self,
        messages: Messages,
        tools: Messages = (),
        add_generation_prompt: bool = False,
        /,
        **variables: Any,
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The form of an answer with a thought: `begin` thought `end` `again` `plain` text `last`."""

    begin: str
    end: str
    again: str = ""  # begins each message of an answer whose thoughts are messages of their own
    plain: str = ""  # stands before the text, with a thought or without
    last: str = ""  # stands behind the text
    taken: Literal["field", "part", "text"] = "text"  # how the template takes earlier thoughts

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.begin, self.end, self.again, self.plain, self.last)))

    def opened(self, prompt: str) -> bool:
        """True if the end of a prompt has begun a thought."""
        return prompt.rstrip().endswith(self.begin)

    def closed(self, prompt: str) -> bool:
        """True if the end of a prompt has ended a thought, or skipped it."""
        return prompt.rstrip().endswith((self.end, *filter(None, [self.plain])))

    def left_open(self, text: str) -> bool:
        """True if a message's own text, which goes on, is amid a thought."""
        return text.rfind(self.begin) > text.rfind(self.end)


def with_thought(
    message: Mapping[str, Any], thought: str, form: ReasoningFormat | None
) -> dict[str, Any]:
    """The message with its thought in the way that a template takes it."""
    if form is not None and form.taken == "part":
        content = message.get("content") or []
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{"type": "thinking", "thinking": thought}, *texts]
        return {**message, "content": parts}
    return {**message, **dict.fromkeys(_THOUGHT_FIELDS, thought)}


# --- learning the form ---------------------------------------------------------------------------


def reasoning_format(
    render: RenderProbe, source: str, variables: Collection[str]
) -> ReasoningFormat | None:
    """The form of thoughts in a chat template of this source; None if it has none.

    variables: names that the template reads, each of which may switch thoughts on.
    """
    if not _ABOUT.search(source):
        return None
    switches: list[dict[str, bool]] = [{}, *({name: True} for name in sorted(variables))]
    for switch in switches:
        probe = partial(render, **switch)
        found = _written(probe, "field") or _written(probe, "part") or _before_calls(probe)
        if found is not None:
            return found
    marks = _taken_out(render, source) or _begun(render)
    return _told(render, switches[1:]) if marks is None else ReasoningFormat(*marks)


def _written(render: RenderProbe, taken: Literal["field", "part"]) -> ReasoningFormat | None:
    """The form by what a template writes around a thought that it is given."""
    thinking = with_thought(_ANSWER, _THOUGHT, ReasoningFormat("", "", taken=taken))
    try:
        base = render([_ASK], (), False)
        whole = render([_ASK, thinking], (), False)
        asked = render([_ASK], (), True)
        answered = render([_ASK, _ANSWER], (), False)
        earlier = render([_ASK, _ANSWER, _AGAIN], (), False)
    except TemplateError:
        return None
    thought, said, asking = whole.find(_THOUGHT), whole.rfind(_SAID), _shared(base, whole)
    if not asking <= thought < said or _notation(whole):
        return None
    header = min(_shared(whole, other) for other in (asked, answered, earlier))
    header = max(asking, _whole_marks(whole[: min(header, thought)]))
    begin = whole[header:thought].strip()
    end = whole[thought + len(_THOUGHT) : said].strip()
    if not begin:  # every answer begins with it
        begin = next((b for b in _openers(end) if whole[asking:thought].rstrip().endswith(b)), "")
    plain, last = _around(asked, earlier, answered, begin, end)
    end = end.removesuffix(plain).rstrip()
    again = whole[asking:header].strip()
    if again and end.endswith(again):
        end = end.removesuffix(again).rstrip()
    else:
        again = ""
    if not begin or not end or begin == end:
        return None
    return ReasoningFormat(begin, end, again, plain, last, taken)


def _around(asked: str, earlier: str, answered: str, begin: str, end: str) -> tuple[str, str]:
    """The marks before and behind the text of an answer without a thought."""
    before, behind = earlier.partition(_SAID)[0], answered.partition(_SAID)[2]
    plain = before[_whole_marks(before[: _shared(asked, before)]) :].strip()
    if not plain.replace(begin, "", 1).replace(end, "", 1).strip():  # a thought that is empty
        plain = ""
    last = _MARK.match(behind.lstrip())
    return plain, last[0] if last else ""


def _notation(text: str) -> bool:
    """True if the thought stands in the text as a value of a list's or object's notation."""
    return re.search(rf"""['"](?:thinking|reasoning\w*)['"]: ['"]{_THOUGHT}""", text) is not None


def _before_calls(render: RenderProbe) -> ReasoningFormat | None:
    """The form by what a template writes around the thought before a tool call."""
    thinking = with_thought(_CALLED, _THOUGHT, None)
    try:
        asked = render([_ASK], (_TOOL,), True)
        called = render([_ASK, _CALLED], (_TOOL,), False)
        whole = render([_ASK, thinking], (_TOOL,), False)
        answered = render([_ASK, _ANSWER], (_TOOL,), False)
        earlier = render([_ASK, _ANSWER, _AGAIN], (_TOOL,), False)
    except TemplateError:
        return None
    before, thought, behind = whole.partition(_THOUGHT)
    if not thought or _notation(whole):
        return None
    begin = before[_whole_marks(before[: _shared(called, before)]) :].strip()
    end = behind[: len(behind) - _shared(called[::-1], behind[::-1])].strip()
    if not begin or not end:  # the marks stand there without a thought, too
        ending, beginning = _MARK.match(behind.lstrip()), _LAST_MARK.search(before.rstrip())
        if ending is None or beginning is None:
            return None
        begin, end = beginning[0], ending[0]
    around = _around(asked, earlier, answered, begin, end)
    return ReasoningFormat(begin, end, "", *around, "field")


def _taken_out(render: RenderProbe, source: str) -> tuple[str, str] | None:
    """The marks of what a template takes out of earlier answers."""
    for end in dict.fromkeys(_CLOSERS.findall(source)):
        for begin in _openers(end):
            answer = {**_ANSWER, "content": f"{begin}\n{_THOUGHT}\n{end}\n\n{_SAID}"}
            try:
                earlier = render([_ASK, answer, _AGAIN], (), False)
            except TemplateError:
                continue
            if _SAID in earlier and _THOUGHT not in earlier:
                return begin, end
    return None


def _begun(render: RenderProbe) -> tuple[str, str] | None:
    """The marks by what a template begins each answer with, and leaves out of earlier ones."""
    try:
        asked = render([_ASK], (), True)
        earlier = render([_ASK, _ANSWER, _AGAIN], (), False)
    except TemplateError:
        return None
    mark = asked[_whole_marks(asked[: _shared(asked, earlier)]) :].strip()
    if not _MARK.fullmatch(mark) or not _ABOUT.search(mark):
        return None
    closed = (e + mark.removeprefix(b) for e, b in _ENDINGS if mark.startswith(b))
    return next(((mark, end) for end in closed), None)


def _told(render: RenderProbe, switches: Collection[Mapping[str, bool]]) -> ReasoningFormat | None:
    """The form by the instructions that a switch adds to the prompt: marks or phrases."""
    try:
        usual = render([_ASK], (), True)
    except TemplateError:
        return None
    for switch in switches:
        try:
            told = render([_ASK], (), True, **switch)
        except TemplateError:
            continue
        start = _shared(usual, told)
        added = told[start : len(told) - _shared(usual[start:][::-1], told[start:][::-1])]
        names = list(dict.fromkeys(_PAIR.findall(added)))
        if names and _ABOUT.search(names[0]):
            plain, last = (f"<{names[1]}>", f"</{names[1]}>") if len(names) > 1 else ("", "")
            return ReasoningFormat(f"<{names[0]}>", f"</{names[0]}>", "", plain, last)
        phrases = list(dict.fromkeys(_PHRASE.findall(added)))
        if len(phrases) == 2 and _ABOUT.search(phrases[0]):
            return ReasoningFormat(*phrases)
    return None


def _openers(end: str) -> Iterator[str]:
    """The beginnings that belong to what ends so."""
    for closing, opening in _ENDINGS:
        if end.startswith(closing):
            yield opening + end.removeprefix(closing)


def _shared(left: str, right: str) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _whole_marks(text: str) -> int:
    """Length of the text without a mark that it cuts off."""
    cut = _SPLIT_MARK.search(text)
    return len(text) if cut is None else cut.start()


# --- reading answers -----------------------------------------------------------------------------


class ReasoningReader:
    """Incremental parser that separates the thoughts of one choice from its text."""

    def __init__(self, form: ReasoningFormat, *, opened: bool, closed: bool = False) -> None:
        """opened: the prompt has begun a thought. closed: it has ended or skipped it."""
        self._form = form
        self._held = ""
        self._at = 0  # characters of the choice's text before what is held
        self._thinking = opened
        self._thought = False  # something of this thought was told
        self._beginning = not closed  # a thought may begin here
        self._blank = closed and bool(form.plain)  # blanks here belong to the marks before them
        self.spans: list[tuple[int, int]] = [(0, 0)] if opened else []
        """Where thoughts stand in the choice's text, in characters; the last may still grow."""

    def push(self, text: str, *, final: bool) -> tuple[str, str]:
        """Add text, the last if `final`. Returns what the thought and the content grow by.

        What may be part of a mark is held back, as are blanks beside one.
        """
        self._held += text
        reasoning: list[str] = []
        content: list[str] = []
        more = True
        while more:
            if self._thinking:
                more = self._think(reasoning, final=final)
            elif self._beginning:
                more = self._begin(final=final)
            else:
                more = self._say(content, final=final)
        return "".join(reasoning), "".join(content)

    def _think(self, reasoning: list[str], *, final: bool) -> bool:
        """Consume a thought; true at its end."""
        start = self.spans[-1][0]
        if not self._thought:
            self._take(len(self._held) - len(self._held.lstrip()))
        end = self._held.find(self._form.end)
        if end >= 0:
            certain = self._held[:end].rstrip()
        else:
            kept = 0 if final else _overlap(self._held, self._form.end)
            certain = self._held[: len(self._held) - kept].rstrip()
        self._thought = self._thought or bool(certain)
        reasoning.append(certain)
        if end < 0:
            self._take(len(certain))
            self.spans[-1] = (start, self._at)
            return False
        self.spans[-1] = (start, self._at + end)
        self._take(end + len(self._form.end))
        self._thinking, self._beginning, self._blank = False, bool(self._form.again), True
        return True

    def _begin(self, *, final: bool) -> bool:
        """Consume what stands before a thought or a text; false if it needs more text."""
        begun = self._held.lstrip()
        blanks = len(self._held) - len(begun)
        form = self._form
        for mark in filter(None, (form.again, form.begin, form.plain)):
            if begun.startswith(mark):
                self._take(blanks + len(mark))
                self._thinking = mark == form.begin
                self._thought = False
                self._beginning = mark == form.again
                self._blank = True
                if self._thinking:
                    self.spans.append((self._at, self._at))
                return True
        marks = (form.again, form.begin, form.plain)
        if not final and any(mark and mark.startswith(begun) for mark in marks):
            return False
        self._beginning = False
        return True

    def _say(self, content: list[str], *, final: bool) -> bool:
        """Consume the content."""
        if self._blank:
            self._take(len(self._held) - len(self._held.lstrip()))
            plain = self._form.plain
            if plain and not final and self._held and plain.startswith(self._held):
                return False
            if plain and self._held.startswith(plain):
                self._take(len(plain))
                return True
            self._blank = not self._held
        last = self._form.last
        found = self._held.find(last) if last else -1
        if found >= 0:
            content.append(self._held[:found])
            self._take(found + len(last))
            return True
        kept = 0 if final or not last else _overlap(self._held, last)
        certain = self._held[: len(self._held) - kept]
        content.append(certain)
        self._take(len(certain))
        return False

    def _take(self, length: int) -> None:
        self._held = self._held[length:]
        self._at += length


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that begins the mark."""
    most = min(len(text), len(mark) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)
