"""The page at /: static files without data, served to anyone, with or without an API key.

The content security policy lets the browser load nothing from elsewhere and run only these
scripts; Trusted Types refuse text as markup, so a model's output can't become part of the page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from quickchange_server.api.openapi.route_responses import Responses, lorax_errors

router = APIRouter(tags=["page"])

INDEX = "index.html"
FILES = (
    INDEX,
    "icon.svg",
    "theme.css",
    "results.css",
    "sections.css",
    "main.js",
    "api.js",
    "sse.js",
    "key.js",
    "dom.js",
    "format.js",
    "tabs.js",
    "models.js",
    "chat.js",
    "pane.js",
    "message.js",
    "samples.js",
    "adapters.js",
    "manage.js",
    "dialog.js",
    "tiers.js",
    "experiments.js",
    "result.js",
    "outcome.js",
    "usage.js",
    "replicas.js",
    "refresh.js",
    "table.js",
    "intervals.js",
)
PATHS = {"/": INDEX} | {f"/page/{name}": name for name in FILES}

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # revalidated by ETag: no stale mix of files
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page with its headers."""

    content: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        """The file, or 304 if the client has it."""
        headers = {**_HEADERS, "ETag": self.etag}
        known = request.headers.get("if-none-match", "")
        if self.etag in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


@cache
def assets(root_path: str) -> Mapping[str, Asset]:
    """All files of the page, read once. Its links begin with `root_path`, if there is one."""
    folder = files("quickchange_server") / "page"
    content = {name: (folder / name).read_bytes() for name in FILES}
    if root_path:  # which is plain letters; else links count from where the page was found
        base = f'<head>\n    <base href="{root_path}/" />'
        content[INDEX] = content[INDEX].replace(b"<head>", base.encode(), 1)
    return {name: _asset(name, content[name]) for name in FILES}


def _asset(name: str, content: bytes) -> Asset:
    media_type = f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"
    return Asset(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _sender(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        """A file of the page."""
        root_path = request.app.state.services.settings.root_path or ""
        return assets(root_path)[name].answer(request)

    return send


_ANSWERS: Responses = {
    200: {"content": {"text/html": {"schema": {"type": "string"}}}},
    304: {"description": "The client has it"},
    **lorax_errors(403),  # the path's other method is LoRAX's
}

# One route per file, so that exactly these need no API key.
for _path, _name in PATHS.items():
    router.add_api_route(
        _path,
        _sender(_name),
        methods=["GET"],
        name="page",
        include_in_schema=_path == "/",  # the path has another method, which is in the document
        response_class=Response,
        responses=_ANSWERS,
    )
