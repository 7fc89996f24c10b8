"""API keys in the database: functions for `Database.read` and `Database.write`.

Every change bumps the topic's revision in its transaction, so that all replicas notice it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, Row, select

from quickchange_server.errors import ConflictError, NotFoundError
from quickchange_server.storage.revisions import bump
from quickchange_server.storage.tables_tenants import KEYS
from quickchange_server.tenants.key import Key, Limits, Retiring, Terms
from quickchange_server.tenants.key_secret import digest_of, is_id, new_id, new_secret

TOPIC = "api_keys"


def create(connection: Connection, terms: Terms, now: float) -> tuple[Key, str]:
    """Create a key. Returns it and its secret, which is stored nowhere."""
    key_id = new_id()
    secret = new_secret(key_id)
    key = Key(key_id, terms, digest_of(secret), created=now)
    connection.execute(KEYS.insert().values(_row(key)))
    bump(connection, TOPIC)
    return key, secret


def every(connection: Connection) -> list[Key]:
    """All keys, revoked and expired ones too, oldest first."""
    rows = connection.execute(select(KEYS).order_by(KEYS.c.created, KEYS.c.id))
    return [_key(row) for row in rows]


def one(connection: Connection, key_id: str) -> Key:
    """One key, its row locked if the database can. Raises NotFoundError."""
    # Locked, since the same transaction may write back what it has read here.
    query = select(KEYS).where(KEYS.c.id == key_id).with_for_update()
    row = connection.execute(query).first() if is_id(key_id) else None
    if row is None:
        raise NotFoundError(f"id: there is no API key {key_id[:80]!r}; GET /v1/keys lists all")
    return _key(row)


def change(connection: Connection, key_id: str, changed: Callable[[Terms], Terms]) -> Key:
    """Change a key's terms. Raises NotFoundError, ConflictError if the key is revoked, and what
    `changed` raises."""
    key = _living(connection, key_id)
    return _save(connection, replace(key, terms=changed(key.terms)))


def revoke(connection: Connection, key_id: str, now: float) -> Key:
    """Revoke a key and both its secrets. Idempotent. Raises NotFoundError."""
    key = one(connection, key_id)
    if key.revoked is not None:
        return key
    return _save(connection, replace(key, revoked=now, retiring=None))


def rotate(connection: Connection, key_id: str, overlap: float, now: float) -> tuple[Key, str]:
    """Give a key a new secret. The current one works for another `overlap` seconds, earlier ones
    no longer. Raises NotFoundError, and ConflictError if the key is revoked."""
    key = _living(connection, key_id)
    secret = new_secret(key_id)
    retiring = Retiring(key.digest, now + overlap) if overlap > 0 else None
    return _save(connection, replace(key, digest=digest_of(secret), retiring=retiring)), secret


def _living(connection: Connection, key_id: str) -> Key:
    key = one(connection, key_id)
    if key.revoked is not None:
        raise ConflictError(f"id: the API key {key_id} is revoked for good; create another")
    return key


def _save(connection: Connection, key: Key) -> Key:
    connection.execute(KEYS.update().where(KEYS.c.id == key.id).values(_row(key)))
    bump(connection, TOPIC)
    return key


def _row(key: Key) -> dict[str, Any]:
    terms = key.terms
    return {
        "id": key.id,
        "tenant": terms.tenant,
        "scope": terms.scope,
        "label": terms.label,
        "names": json.dumps(terms.names),
        **asdict(terms.limits),
        "digest": key.digest,
        "retiring_digest": None if key.retiring is None else key.retiring.digest,
        "retiring_until": None if key.retiring is None else key.retiring.until,
        "created": key.created,
        "expires": terms.expires,
        "revoked": key.revoked,
    }


def _key(row: Row[Any]) -> Key:
    limits = Limits(
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        concurrent_requests=row.concurrent_requests,
        max_prompt_tokens=row.max_prompt_tokens,
        max_new_tokens=row.max_new_tokens,
    )
    names = tuple(json.loads(row.names))
    terms = Terms(row.tenant, row.scope, names, row.label, limits, row.expires)
    retiring = None
    if row.retiring_digest is not None:
        retiring = Retiring(row.retiring_digest, row.retiring_until)
    return Key(row.id, terms, row.digest, row.created, row.revoked, retiring)
