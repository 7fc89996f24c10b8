"""An API key: whose it is, what it may do, and until when. Knows nothing of HTTP or storage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.caller import Scope
from quickchange_server.tenants.key_secret import matches

MAX_GLOBS = 64
MAX_GLOB_LENGTH = 256  # characters, as a name's
MAX_LIMIT = 10**12
State = Literal["valid", "expired", "revoked"]
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_GLOB = re.compile(r"[A-Za-z0-9._/*?\[\]!-]+")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may use on one replica; None: as much as it likes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together
    concurrent_requests: int | None = None
    max_prompt_tokens: int | None = None  # of one request, all its prompts together
    max_new_tokens: int | None = None  # of one request, all its choices together


@dataclass(frozen=True, slots=True)
class Terms:
    """What the maker of a key decides. Raises InvalidRequestError that names the field."""

    tenant: str
    scope: Scope
    names: tuple[str, ...]  # globs of the names that exist for it
    label: str = ""
    limits: Limits = field(default_factory=Limits)
    expires: float | None = None  # Unix seconds

    def __post_init__(self) -> None:
        check_tenant(self.tenant)
        if "\0" in self.label:  # PostgreSQL keeps none
            raise InvalidRequestError("label: holds the character NUL; remove it", param="label")
        _check_names(self.names)
        if self.scope == "admin" and self.names != ("*",):
            raise InvalidRequestError(
                "names: a key with the scope admin can make keys for all names, so it sees all; "
                "leave names out, or give another scope",
                param="names",
            )


def check_tenant(tenant: str) -> None:
    """Raises InvalidRequestError where it is not a tenant's name."""
    if _TENANT.fullmatch(tenant) is None:
        raise InvalidRequestError(
            f"tenant: {tenant[:80]!r} is not a valid tenant; use letters, digits, '.', '_' and "
            "'-', beginning with a letter or a digit, at most 64",
            param="tenant",
        )


def names_of(scope: Scope, names: Sequence[str] | None) -> tuple[str, ...]:
    """The globs of a new key. Raises InvalidRequestError where they must be given and are not."""
    if names is not None:
        return tuple(names)
    if scope == "admin":
        return ("*",)
    raise InvalidRequestError(
        'names: is required; give globs of the names that exist for the key, "*" for all',
        param="names",
    )


def _check_names(names: Sequence[str]) -> None:
    fitting = [n for n in names if len(n) <= MAX_GLOB_LENGTH and _GLOB.fullmatch(n) is not None]
    if not names or len(names) > MAX_GLOBS or len(fitting) < len(names):
        raise InvalidRequestError(
            f'names: give 1 to {MAX_GLOBS} globs such as "acme/*", each of at most '
            f"{MAX_GLOB_LENGTH} letters, digits and ._/*?[]!-",
            param="names",
        )


@dataclass(frozen=True, slots=True)
class Retiring:
    """The secret before the last rotation, while it still works."""

    digest: str
    until: float  # Unix seconds


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept."""

    id: str  # public
    terms: Terms
    digest: str  # of the secret
    created: float  # Unix seconds
    revoked: float | None = None  # Unix seconds
    retiring: Retiring | None = None

    def accepts(self, secret: str, now: float) -> bool:
        """Whether the secret is this key's, whatever has become of the key."""
        current = matches(secret, self.digest)
        old = self.retiring is not None and matches(secret, self.retiring.digest)
        return current or (old and self.retiring is not None and now < self.retiring.until)

    def state(self, now: float) -> State:
        """What has become of it."""
        if self.revoked is not None:
            return "revoked"
        expires = self.terms.expires
        return "valid" if expires is None or now < expires else "expired"
