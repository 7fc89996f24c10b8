"""Who sends a request and what they may do. Knows nothing of HTTP, of secrets or of storage."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Scope = Literal["infer", "manage", "admin"]
SCOPES: tuple[Scope, ...] = ("infer", "manage", "admin")  # each includes those before it


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of a request."""

    tenant: str  # in metrics, in usage, and where asked for as salt of the prefix cache
    key: str | None  # the API key's public id; None: the server asks for no key
    scope: Scope
    names: tuple[str, ...] = ("*",)  # globs of the adapters, aliases and experiments that exist
    salt: str = ""  # of the prefix cache
    max_new_tokens: int | None = None  # of one request, all choices; None: what the model allows

    def sees(self, name: str) -> bool:
        """Whether a name (without version) exists for this caller."""
        return any(fnmatchcase(name, pattern) for pattern in self.names)

    def may(self, scope: Scope) -> bool:
        return SCOPES.index(scope) <= SCOPES.index(self.scope)


ANYONE = Caller(tenant="default", key=None, scope="admin")
