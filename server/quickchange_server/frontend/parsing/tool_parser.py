"""Tool calls in a model's text, read piece by piece in any form that tool_forms.py describes.

The text is read a character at a time, so that how it was cut makes no difference. Knows nothing
of HTTP.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from quickchange_server.frontend.parsing.argument_reading import (
    CallPiece,
    ToldCalls,
    json_value,
    keywords,
    parameters,
)
from quickchange_server.frontend.parsing.characters import (
    Characters,
    NoCallError,
    Reading,
    is_named,
)
from quickchange_server.frontend.parsing.stop_strings import StopScanner
from quickchange_server.frontend.parsing.tool_forms import JsonCall, NamedCall, ToolForm, last_tag

_MOST_PASSED = 120  # characters between a name and the mark before its arguments


class ToolReader:
    """Incremental parser that separates the calls of one choice from its text.

    Text that may begin a call is held back, and becomes text again if it turns out to be none. From
    where a call's name is told there is no way back: what follows is its arguments as they are.
    """

    def __init__(self, form: ToolForm, tools: Mapping[str, Any]) -> None:
        """`tools`: the schemas of the functions' parameters, by the functions' names."""
        self._form = form
        self._told = ToldCalls(tools)
        self._content: list[str] = []
        self._behind_call = False  # no text was said since the last call
        self._blanks = ""  # behind a call: text only if more text follows
        self._scanner = StopScanner([form.mark])
        self._section: _Section | None = None
        if not form.mark:
            self._section = _Section(form, self._told)

    def push(self, text: str, *, final: bool) -> tuple[str, list[CallPiece]]:
        """Add text, the last if `final`. Returns text that is certain, and what calls grew by."""
        waiting = [*reversed(text)]  # characters to be read, the last first
        while waiting:
            if self._section is not None:
                self._inside(waiting.pop(), waiting)
            elif self._form.mark:
                self._outside(waiting.pop())
            else:  # the calls of an answer that has no marks are over
                self._say("".join(reversed(waiting)))
                break
        if final:
            self._finish()
        said, self._content = "".join(self._content), []
        return said, self._told.take()

    def _outside(self, character: str) -> None:
        scanned = self._scanner.push(character)
        self._say(scanned.text)
        if scanned.stop is not None:
            self._scanner = StopScanner([self._form.mark])
            self._section = _Section(self._form, self._told)

    def _inside(self, character: str, waiting: list[str]) -> None:
        """Read a character of a section ("": there are no more); what it leaves is read again."""
        section = self._section
        assert section is not None
        before = self._told.count
        left = section.push(character)
        if self._told.count > before:
            self._behind_call, self._blanks = True, ""
        if left is None:
            return
        self._section = None
        if not section.failed:
            waiting += reversed(left)
            return
        if self._form.mark and left.startswith(self._form.mark):
            self._say(self._form.mark)
            left = left[len(self._form.mark) :]
        if character:
            waiting += reversed(left)
        else:  # not read again: there may be much of it, over and over
            self._say(left)

    def _finish(self) -> None:
        waiting: list[str] = []
        while self._section is not None:
            self._inside("", waiting)
        self._say("".join(reversed(waiting)) + self._scanner.finish())

    def _say(self, text: str) -> None:
        """Add text outside of calls; blanks behind a call wait for what follows."""
        if self._behind_call and not text.strip():
            self._blanks += text
        else:
            self._content.append(self._blanks + text)
            self._behind_call, self._blanks = False, ""


class _Section:
    """A parser of calls that stand together, from behind their mark on."""

    def __init__(self, form: ToolForm, told: ToldCalls) -> None:
        self.failed = False
        self._form = form
        self._told = told
        self._characters = Characters()
        self._held = form.mark  # text since the mark, or since the last call
        self._reading = self._calls()
        next(self._reading)

    def push(self, character: str) -> str | None:
        """Read a character ("": there are no more). Returns the text that is left at the end.

        It is all the text since the last call if what follows that has `failed` to be one.
        """
        self._held += character
        try:
            self._reading.send(character)
        except StopIteration:
            return self._characters.drop()
        except NoCallError:
            self.failed = True
            return self._held
        return None

    def _complete(self) -> None:
        """Forget the text of a call that is told."""
        self._held = self._characters.back

    def _calls(self) -> Reading:
        form, characters = self._form, self._characters
        yield from characters.expect(form.head[len(form.mark) :])
        while True:
            if isinstance(form.call, JsonCall):
                yield from self._json_calls(form.call)
            else:
                yield from self._named_call(form.call)
            yield from characters.match(form.close, cut=True)
            self._complete()
            if not form.sectioned or not (yield from self._continues()):
                return

    def _continues(self) -> Generator[None, str, bool]:
        """True if another call follows in the section; the section's end is consumed."""
        form = self._form
        before = form.separator + form.open
        options = [text for text in (form.end, before) if text.strip()]
        found = yield from self._characters.match(*options, cut=True)
        if found is not None:
            return options[found] != form.end
        if self._characters.ended:
            self._characters.drop()  # half of what goes on or ends
        if before.strip():
            return False
        follows = yield from self._characters.peek()
        return is_named(follows) or follows in ("{", "[")

    def _json_calls(self, call: JsonCall) -> Reading:
        """Read JSON objects one behind the other, or a list of them."""
        characters = self._characters
        separators = [",", ";"]
        if (yield from characters.match("[")) is not None:
            separators.append("]")
        while True:
            found = _Found()
            yield from self._members(call, (), found)
            if not found.told:
                raise NoCallError
            self._complete()
            if (yield from characters.match(*separators)) == 2:
                return
            if (yield from characters.peek()) != "{":
                return

    def _members(self, call: JsonCall, path: tuple[str, ...], found: _Found) -> Reading:
        """Read an object that is a call, or a part of one."""
        characters = self._characters
        yield from characters.expect("{")
        while (yield from characters.match("}")) is None:
            key = (*path, (yield from characters.json_string()))
            yield from characters.expect(":")
            opens = yield from characters.peek()
            if key == call.name_path:
                found.name = yield from characters.json_string()
                if found.name not in self._told.tools:
                    raise NoCallError
            elif key == call.arguments_path:
                if opens != "{":
                    raise NoCallError
                if found.name is None:
                    found.arguments = yield from json_value(characters)
                elif not found.told:
                    found.told = True
                    self._told.open(found.name)
                    yield from json_value(characters, self._told)
                    self._complete()
            elif opens == "{" and _within(key, call):
                yield from self._members(call, key, found)
            else:
                yield from json_value(characters)
            if found.name is not None and found.arguments and not found.told:
                found.told = True
                self._told.open(found.name)
                self._told.grow(found.arguments)
                self._complete()
            if (yield from characters.match(",", "}")) != 0:
                return

    def _named_call(self, call: NamedCall) -> Reading:
        characters = self._characters
        name = yield from characters.name()
        if name not in self._told.tools:
            raise NoCallError
        yield from self._middle(call.middle)
        if call.arguments == "json":
            if (yield from characters.peek()) != "{":
                raise NoCallError
            self._told.open(name)
            yield from json_value(characters, self._told)
        elif call.arguments == "python":
            yield from keywords(characters, self._told, name)
        else:
            close = self._form.close or self._form.end
            yield from parameters(characters, self._told, name, call.arguments, close)

    def _middle(self, text: str) -> Reading:
        """Read the text between a name and its arguments. Raises NoCallError if another follows.

        Where it ends in a mark, models that write more or less before that are understood.
        """
        characters = self._characters
        if (yield from characters.match(text)) is not None:
            return
        mark = last_tag(text)
        passed = ""
        while mark and len(passed) < _MOST_PASSED and not passed.endswith(mark):
            character = yield from characters.next()
            if character in ("", "{", "\n"):
                raise NoCallError
            passed += character
        if not mark or not passed.endswith(mark):
            raise NoCallError


def _within(key: tuple[str, ...], call: JsonCall) -> bool:
    return key in (call.name_path[: len(key)], call.arguments_path[: len(key)])


@dataclass(slots=True)
class _Found:
    """What is known of a call that is being read."""

    name: str | None = None
    arguments: str = ""
    told: bool = False
