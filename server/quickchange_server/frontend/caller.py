"""The caller of a request and its permissions. Knows nothing of HTTP, secrets or storage."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Scope = Literal["infer", "manage", "admin"]
SCOPES: tuple[Scope, ...] = ("infer", "manage", "admin")  # each includes those before it


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of a request, from its API key."""

    tenant: str  # named in metrics and usage; with tenant_cache also the prefix cache's salt
    key: str | None  # the API key's public id; None: the server asks for no key
    scope: Scope
    names: tuple[str, ...] = ("*",)  # globs of the adapters, aliases and experiments it may see
    salt: str = ""  # salt of the prefix cache
    max_new_tokens: int | None = None  # limit per request, all choices; None: the model's

    def sees(self, name: str) -> bool:
        """True if a name (without version) exists for this caller."""
        return any(fnmatchcase(name, pattern) for pattern in self.names)

    def may(self, scope: Scope) -> bool:
        return SCOPES.index(scope) <= SCOPES.index(self.scope)


ANYONE = Caller(tenant="default", key=None, scope="admin")
