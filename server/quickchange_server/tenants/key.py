"""An API key with its tenant, scope, limits and expiry. HTTP and storage are not known here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.caller import Scope
from quickchange_server.tenants.key_secret import matches

MAX_GLOBS = 64
MAX_GLOB_LENGTH = 256  # characters, as for names
MAX_LIMIT = 10**12
State = Literal["valid", "expired", "revoked"]
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_GLOB = re.compile(r"[A-Za-z0-9._/*?\[\]!-]+")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one key; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and new tokens together
    concurrent_requests: int | None = None
    max_prompt_tokens: int | None = None  # all prompts of one request together
    max_new_tokens: int | None = None  # all choices of one request together

    @property
    def of_several_requests(self) -> bool:
        """True if one request's admission depends on others."""
        several = (self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests)
        return several != (None, None, None)


@dataclass(frozen=True, slots=True)
class Terms:
    """The properties of a key that its creator chooses.

    Raises InvalidRequestError that names the field.
    """

    tenant: str
    scope: Scope
    names: tuple[str, ...]  # globs of the names that the key can see
    label: str = ""
    limits: Limits = field(default_factory=Limits)
    expires: float | None = None  # Unix seconds

    def __post_init__(self) -> None:
        check_tenant(self.tenant)
        if "\0" in self.label:  # PostgreSQL can't store it
            raise InvalidRequestError("label: holds the character NUL; remove it", param="label")
        _check_names(self.names)
        if self.scope == "admin" and self.names != ("*",):
            raise InvalidRequestError(
                "names: a key with the scope admin can make keys for all names, so it sees all; "
                "leave names out, or give another scope",
                param="names",
            )


def check_tenant(tenant: str) -> None:
    """Raise InvalidRequestError if `tenant` is not a valid tenant's name."""
    if _TENANT.fullmatch(tenant) is None:
        raise InvalidRequestError(
            f"tenant: {tenant[:80]!r} is not a valid tenant; use letters, digits, '.', '_' and "
            "'-', beginning with a letter or a digit, at most 64",
            param="tenant",
        )


def names_of(scope: Scope, names: Sequence[str] | None) -> tuple[str, ...]:
    """The globs of a new key. Raises InvalidRequestError if they are missing and required."""
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
    """A key as stored in the database."""

    id: str  # public
    terms: Terms
    digest: str  # SHA-256 of the secret, hexadecimal
    created: float  # Unix seconds
    revoked: float | None = None  # Unix seconds
    retiring: Retiring | None = None

    def accepts(self, secret: str, now: float) -> bool:
        """True if the secret is this key's, whatever the key's state."""
        current = matches(secret, self.digest)
        old = self.retiring is not None and matches(secret, self.retiring.digest)
        return current or (old and self.retiring is not None and now < self.retiring.until)

    def state(self, now: float) -> State:
        """The key's state at `now`, Unix seconds."""
        if self.revoked is not None:
            return "revoked"
        expires = self.terms.expires
        return "valid" if expires is None or now < expires else "expired"
