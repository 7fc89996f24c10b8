"""The page's files: how they are served, and that they need nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from http_support import Live

from quickchange_server.api.page import FILES

FOLDER = Path(__file__).parents[2] / "server" / "quickchange_server" / "page"
NAMESPACES = ("http://www.w3.org/2000/svg",)  # names, never fetched


def test_every_file_of_the_folder_is_served_and_no_other() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_sent_as_what_it_is_and_kept_by_its_etag(live: Live, name: str) -> None:
    answer = live.http.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    kind = kinds.get(Path(name).suffix, "image/svg+xml")
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = live.http.get(f"/page/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_another_etag_gets_the_file(live: Live) -> None:
    answer = live.http.get("/", headers={"If-None-Match": '"another", W/"one"'})
    assert answer.status_code == 200


def test_the_policy_allows_this_server_alone(live: Live) -> None:
    policy = live.http.get("/").headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert not any("unsafe" in part or "http" in part or "*" in part for part in policy)


@pytest.mark.parametrize("path", ["/page/none.js", "/page/..%2Fapp.py", "/page/", "/page"])
def test_what_is_no_file_of_the_page_is_not_served(live: Live, path: str) -> None:
    assert live.http.get(path).status_code == 404


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_place(name: str) -> None:
    text = (FOLDER / name).read_text()
    for namespace in NAMESPACES:
        text = text.replace(namespace, "")
    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+|@import|url\(", text) == []


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_no_script_makes_markup_or_code_of_text(name: str) -> None:
    text = (FOLDER / name).read_text()
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser"
    assert re.findall(ways, text) == []


def test_the_document_has_no_inline_script_or_style() -> None:
    text = (FOLDER / "index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]* src=)", text) == []
