"""Secrets of API keys: their format, and the digest that is stored.

Format: `qc-ID-RANDOM`. ID, 16 hexadecimal digits, is the key's public id; RANDOM, 64 hexadecimal
digits, holds 256 bits from the system's generator. Only the SHA-256 of the whole secret is stored.
A slow hash (bcrypt, Argon2) protects secrets that people choose; 256 random bits can't be guessed
at any speed, and a slow hash would only delay every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

_ID = re.compile(r"[0-9a-f]{16}")
_SECRET = re.compile(rf"qc-({_ID.pattern})-[0-9a-f]{{64}}")


def new_id() -> str:
    """A public id for a new key."""
    return secrets.token_hex(8)


def is_id(text: str) -> bool:
    """True if `text` has the form of a public id."""
    return _ID.fullmatch(text) is not None


def new_secret(key_id: str) -> str:
    """A new secret of the key with this public id."""
    return f"qc-{key_id}-{secrets.token_hex(32)}"


def id_of(secret: str) -> str | None:
    """The public id in a secret; None if it does not have a secret's form."""
    found = _SECRET.fullmatch(secret)
    return None if found is None else found[1]


def digest_of(secret: str) -> str:
    """The SHA-256 of a secret, 64 hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(secret: str, digest: str) -> bool:
    """True if the secret has this digest, compared in constant time."""
    return hmac.compare_digest(digest_of(secret), digest)
