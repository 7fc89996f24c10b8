"""The secret of an API key: its form, and how it is held at rest.

`qc-ID-RANDOM`: ID, 16 hexadecimal digits, finds the key without a search; RANDOM, 64 hexadecimal
digits, are 256 bits from the system's generator. What is kept is the SHA-256 of the whole secret. A
slow hash (bcrypt, Argon2) makes guessing expensive where people chose the secret; 256 random bits
can't be guessed at any speed, and a slow hash would only cost every request its time.
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
    """Whether a key could have it as its public id."""
    return _ID.fullmatch(text) is not None


def new_secret(key_id: str) -> str:
    """A new secret of the key with this public id."""
    return f"qc-{key_id}-{secrets.token_hex(32)}"


def id_of(secret: str) -> str | None:
    """The public id in a secret; None where it is not one of this server's secrets."""
    found = _SECRET.fullmatch(secret)
    return None if found is None else found[1]


def digest_of(secret: str) -> str:
    """What is kept of a secret: 64 hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(secret: str, digest: str) -> bool:
    """Whether the secret has this digest, in a time that tells nothing of either."""
    return hmac.compare_digest(digest_of(secret), digest)
