"""What a key may be made with, and when it holds."""

from __future__ import annotations

import pytest

from quickchange_server.errors import InvalidRequestError
from quickchange_server.tenants.key import Key, Retiring, Terms, names_of
from quickchange_server.tenants.key_secret import digest_of

OLD, NEW = "qc-old", "qc-new"


def key(**changes: object) -> Key:
    given = {"revoked": None, "retiring": None, "expires": None, **changes}
    terms = Terms("acme", "infer", ("acme/*",), expires=given.pop("expires"))  # type: ignore[arg-type]
    return Key("0" * 16, terms, digest_of(NEW), 0.0, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("tenant", ["", "a b", "-acme", "a" * 65, "ä", "a\n", "a/b"])
def test_a_bad_tenant_is_refused_by_name(tenant: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        Terms(tenant, "infer", ("*",))
    assert raised.value.param == "tenant"


@pytest.mark.parametrize("names", [(), ("",), ("a b",), ("x" * 257,), ("*",) * 65, ("a\n",)])
def test_bad_globs_are_refused_by_name(names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        Terms("acme", "infer", names)
    assert raised.value.param == "names"


def test_an_admin_that_sees_part_is_refused_since_it_could_make_keys_for_all() -> None:
    with pytest.raises(InvalidRequestError, match="names"):
        Terms("acme", "admin", ("acme/*",))


def test_names_must_be_given_but_for_an_admin() -> None:
    assert names_of("admin", None) == ("*",)
    assert names_of("infer", ["a", "b"]) == ("a", "b")
    with pytest.raises(InvalidRequestError, match="names: is required"):
        names_of("manage", None)


def test_a_key_accepts_its_secret_alone() -> None:
    assert key().accepts(NEW, 0.0)
    assert not key().accepts(OLD, 0.0)


def test_a_rotated_key_accepts_the_old_secret_until_the_overlap_ends() -> None:
    rotated = key(retiring=Retiring(digest_of(OLD), until=100.0))
    assert rotated.accepts(OLD, 99.9)
    assert not rotated.accepts(OLD, 100.0)
    assert rotated.accepts(NEW, 99.9)
    assert rotated.accepts(NEW, 100.0)


def test_a_key_is_valid_until_it_expires_or_is_revoked() -> None:
    assert key().state(1e12) == "valid"
    assert key(expires=100.0).state(99.9) == "valid"
    assert key(expires=100.0).state(100.0) == "expired"
    assert key(revoked=50.0).state(0.0) == "revoked"
    assert key(revoked=50.0, expires=10.0).state(60.0) == "revoked"
