"""Tables of API keys and of their usage."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, String, Table, Text

from quickchange_server.storage.tables import METADATA

KEYS = Table(
    "api_keys",
    METADATA,
    Column("id", String(16), primary_key=True),  # public
    Column("tenant", String(64), nullable=False),
    Column("scope", String(16), nullable=False),
    Column("label", Text, nullable=False),
    Column("names", Text, nullable=False),  # globs, a JSON list
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent_requests", BigInteger),
    Column("max_prompt_tokens", BigInteger),
    Column("max_new_tokens", BigInteger),
    Column("digest", String(64), nullable=False),  # SHA-256 of the secret, hexadecimal
    Column("retiring_digest", String(64)),  # digest of the secret before the last rotation
    Column("retiring_until", Double),  # times are Unix seconds
    Column("created", Double, nullable=False),
    Column("expires", Double),
    Column("revoked", Double),
)

# Only one process writes a row, and it writes totals, not increments: replicas never wait for each
# other's rows, and a change that is applied twice has no further effect.
USAGE = Table(
    "usage",
    METADATA,
    Column("hour", BigInteger, primary_key=True),  # its first Unix second
    Column("tenant", String(64), primary_key=True),
    Column("key", String(16), primary_key=True),
    Column("adapter", String(256), primary_key=True),
    Column("process", String(16), primary_key=True),  # random id of the server's process
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
)
