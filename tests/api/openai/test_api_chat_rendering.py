"""A chat becomes a prompt: variables of the template, documents, roles, parts, a last message
that goes on; the same on /tokenize."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_template_files import chat_template
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server
from text_support import END, byte_text
from transformers import PreTrainedTokenizerBase

from quickchange_server.frontend.templates.chat_template import RESERVED

URL = "/v1/chat/completions"
ASK = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rendering") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    behaviour = Behaviour(says=(*b" there", END), journal=journal)
    text = byte_text(chat_template("reads_parts_and_variables"))
    with live_server(journal.parent / "store", behaviour, text) as live:
        yield live


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose template takes nothing of the kind."""
    with live_server(tmp_path_factory.mktemp("plain"), Behaviour()) as live:
        yield live


def prompt(live: Live, journal: Path, *messages: dict[str, Any], **fields: Any) -> str:
    """The prompt's text, which is the same on /tokenize."""
    chat = {"model": BASE, "messages": list(messages), **fields}
    response = live.post(URL, {**chat, "max_tokens": 1})
    assert response.status_code == 200, response.text
    ids = entries(journal, "Submit")[-1]["prompt"]
    if "tools" not in fields and "echo" not in fields:
        assert live.post("/tokenize", chat).json()["tokens"] == ids
    return live.post("/detokenize", {"tokens": ids}).json()["prompt"]


def refusal(live: Live, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    chat = {"model": BASE, "messages": list(messages) or [ASK], **fields}
    for url in (URL, "/tokenize"):
        response = live.post(url, chat)
        assert response.status_code == 400, (url, response.text)
    return response.json()["error"]


def test_variables_reach_the_template(live: Live, journal: Path) -> None:
    assert prompt(live, journal, ASK).startswith("plain")
    told = prompt(live, journal, ASK, chat_template_kwargs={"style": "terse", "unread": {"a": [1]}})
    assert told.startswith("terse")


def test_reasoning_effort_is_a_variable(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    text = byte_text(chat_template("thinks_in_channels"))
    with live_server(tmp_path / "store", Behaviour(says=(END,), journal=journal), text) as live:
        assert prompt(live, journal, ASK).startswith("Reasoning: medium")
        assert prompt(live, journal, ASK, reasoning_effort="high").startswith("Reasoning: high")
        told = prompt(live, journal, ASK, reasoning_effort="high",
                      chat_template_kwargs={"reasoning_effort": "low"})  # fmt: skip
        assert told.startswith("Reasoning: low")
        assert refusal(live, reasoning_effort="extra_high")["param"] == "reasoning_effort"


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_reserved_variable_is_refused_by_name(plain: Live, name: str) -> None:
    error = refusal(plain, chat_template_kwargs={name: True})
    assert error["param"] == f"chat_template_kwargs.{name}"


def test_every_argument_of_transformers_is_reserved() -> None:
    known = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert known.keys() - {"kwargs"} <= RESERVED


@pytest.mark.parametrize(
    "value",
    [
        {str(i): 1 for i in range(65)},
        {"a": "x" * 70_000},
        {"a": ["x" * 100] * 1_000},
        {"a": "\ud800"},
        {"\ud800": 1},
        [1],
        "enable_thinking",
    ],
    ids=["many", "long", "much", "surrogate", "surrogate's name", "list", "text"],
)
def test_variables_are_bounded(plain: Live, value: Any) -> None:
    assert refusal(plain, chat_template_kwargs=value)["param"].startswith("chat_template_kwargs")


def test_variables_have_few_levels(plain: Live) -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    assert "levels" in refusal(plain, chat_template_kwargs={"a": deep})["message"]


def test_documents_reach_a_template_that_reads_them(live: Live, journal: Path) -> None:
    told = prompt(live, journal, ASK, documents=[{"title": "T", "text": "body"}])
    assert "doc T: body" in told


def test_documents_are_refused_where_the_template_reads_none(plain: Live) -> None:
    error = refusal(plain, documents=[{"title": "T", "text": "body"}])
    assert error["param"] == "documents"
    assert "put them into the messages" in error["message"]


def test_a_last_message_goes_on(live: Live, journal: Path) -> None:
    last = {"role": "assistant", "content": "Well"}
    for fields in ({}, {"add_generation_prompt": False}):
        told = prompt(live, journal, ASK, last, continue_final_message=True, **fields)
        assert told.endswith("<|im_start|>assistant\nWell")
    told = prompt(live, journal, {"role": "user", "content": "An apple a"},
                  continue_final_message=True)  # fmt: skip
    assert told.endswith("<|im_start|>user\nAn apple a")


def test_a_message_can_not_both_go_on_and_begin(plain: Live) -> None:
    error = refusal(plain, continue_final_message=True, add_generation_prompt=True)
    assert error["param"] == "continue_final_message"
    assert (
        "Cannot set both `continue_final_message` and `add_generation_prompt` to True"
        in (error["message"])
    )


def test_a_last_message_without_text_can_not_go_on(plain: Live) -> None:
    error = refusal(plain, ASK, {"role": "assistant", "content": ""}, continue_final_message=True)
    assert error["param"] == "continue_final_message"


def test_a_template_that_cuts_the_last_message_can_not_let_it_go_on(tmp_path: Path) -> None:
    text = byte_text("{% for m in messages %}{{ m.content[:3] }}{% endfor %}")
    with live_server(tmp_path, Behaviour(), text) as live:
        error = refusal(live, {"role": "user", "content": "secret"}, continue_final_message=True)
        assert error["param"] == "continue_final_message"
        assert "sec" not in error["message"]


def test_the_generation_prompt_can_be_left_out(live: Live, journal: Path) -> None:
    assert prompt(live, journal, ASK).endswith("<|im_start|>assistant\n")
    assert prompt(live, journal, ASK, add_generation_prompt=False).endswith("Hi<|im_end|>")


def test_special_tokens_can_be_added(live: Live) -> None:
    chat = {"model": BASE, "messages": [ASK], "max_tokens": 1}
    for special in (False, True):  # this tokenizer adds none, as most
        assert live.post(URL, {**chat, "add_special_tokens": special}).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_echo_puts_the_last_message_before_the_answer(live: Live, streamed: bool) -> None:
    def said(*messages: dict[str, Any]) -> str:
        body = {"model": BASE, "messages": messages, "echo": True, "n": 2,
                "continue_final_message": True}  # fmt: skip
        if not streamed:
            choices = live.post(URL, body).json()["choices"]
            assert choices[0]["message"] == choices[1]["message"]
            return choices[0]["message"]["content"]
        deltas = [e["choices"][0] for e in live.events(URL, body)[:-1] if e["choices"]]
        told = ["".join(d["delta"].get("content") or "" for d in deltas if d["index"] == i)
                for i in range(2)]  # fmt: skip
        assert told[0] == told[1]
        return told[0]

    assert said(ASK, {"role": "assistant", "content": "Well"}) == "Well there"
    assert said(ASK, {"role": "assistant", "content": [{"type": "text", "text": "W"},
                                                       {"type": "text", "text": "e"}]}) == "W\ne there"  # fmt: skip # noqa: E501
    assert said(ASK) == " there"  # the answer's role is another


def test_a_role_of_the_clients_own_reaches_the_template(live: Live, journal: Path) -> None:
    told = prompt(live, journal, {"role": "my-custom-role", "content": "x", "name": "Ada"})
    assert "<|im_start|>my-custom-role Ada\nx<|im_end|>" in told


def test_a_role_that_the_template_refuses_is_400(live: Live) -> None:
    error = refusal(live, ASK, {"role": "refused", "content": "x"})
    assert error["param"] == "messages"
    assert "no such role" in error["message"]


def test_a_role_that_the_template_leaves_out_is_400(live: Live) -> None:
    error = refusal(live, ASK, {"role": "dropped", "content": "secret"})
    assert error["param"] == "messages[1].role"
    assert "'dropped'" in error["message"]


@pytest.mark.parametrize("role", ["", "x" * 65, 5, None])
def test_a_role_is_a_short_text(plain: Live, role: Any) -> None:
    assert refusal(plain, {"role": role, "content": "x"})["param"] == "messages[0].role"


def test_developer_is_system_unless_the_template_knows_it(
    live: Live, journal: Path, tmp_path: Path
) -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert "<|im_start|>system\nBe brief." in prompt(live, journal, developer, ASK)
    knows = "{% for m in messages %}{% if m.role == 'developer' %}!{% endif %}{{ m.content }}{% endfor %}"  # noqa: E501
    own = tmp_path / "journal"
    with live_server(
        tmp_path / "store", Behaviour(says=(END,), journal=own), byte_text(knows)
    ) as it:
        assert prompt(it, own, developer, ASK) == "!Be brief.Hi"


PARTS = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "a\nb"),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}",
            "(a)(b)",
        ),
        (
            "{% for m in messages %}{% for p in m.content %}[{{ p['text'] }}]{% endfor %}"
            "{% endfor %}",
            "[a][b]",
        ),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", '"a\\nb"'),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", "a\nb"),
    ],
    ids=["text", "either", "parts alone", "as JSON", "trimmed"],
)
def test_parts_are_handed_to_a_template_that_takes_them(
    tmp_path: Path, template: str, written: str
) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(says=(END,), journal=journal)
    with live_server(tmp_path / "store", behaviour, byte_text(template)) as live:
        assert prompt(live, journal, {"role": "user", "content": PARTS}) == written
        one = prompt(live, journal, {"role": "user", "content": "a"})
        assert one == {"[a][b]": "[a]", '"a\\nb"': '"a"'}.get(written, "a")


def test_fields_of_a_chat_are_refused_beside_a_prompt(plain: Live) -> None:
    for name, value in {"documents": [{"text": "x"}], "chat_template_kwargs": {"a": 1},
                        "continue_final_message": True}.items():  # fmt: skip
        response = plain.post("/tokenize", {"prompt": "x", name: value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


def test_a_template_of_the_clients_own_is_refused(plain: Live) -> None:
    error = plain.post(URL, {"model": BASE, "messages": [ASK], "chat_template": "x"}).json()
    assert error["error"]["param"] == "chat_template"
