"""Secrets of API keys: their form, and what is kept of them."""

from __future__ import annotations

import hashlib

import pytest

from quickchange_server.tenants.key_secret import digest_of, id_of, matches, new_id, new_secret


def test_a_secret_carries_its_public_id() -> None:
    key_id = new_id()
    secret = new_secret(key_id)
    assert secret.startswith(f"qc-{key_id}-")
    assert id_of(secret) == key_id


def test_what_is_kept_is_the_sha_256_of_the_whole_secret() -> None:
    secret = new_secret(new_id())
    assert digest_of(secret) == hashlib.sha256(secret.encode()).hexdigest()


def test_secrets_of_one_key_differ() -> None:
    key_id = new_id()
    assert len({new_secret(key_id) for _ in range(100)}) == 100


def test_only_the_same_secret_matches() -> None:
    key_id = new_id()
    first, second = new_secret(key_id), new_secret(key_id)
    assert matches(first, digest_of(first))
    assert not matches(second, digest_of(first))


@pytest.mark.parametrize(
    "text",
    ["", "EMPTY", "qc-", "sk-abc", "qc-0123456789abcdef-", "qc-0123456789ABCDEF-" + "0" * 64],
)
def test_what_is_no_secret_has_no_id(text: str) -> None:
    assert id_of(text) is None


@pytest.mark.parametrize("change", [lambda s: s + "0", lambda s: s[:-1], lambda s: s + "\n"])
def test_a_changed_secret_has_no_id(change) -> None:  # type: ignore[no-untyped-def]
    assert id_of(change(new_secret(new_id()))) is None
