"""What people may write for a store, and what the errors say of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickchange_store.errors import StoreLocationError
from quickchange_store.store import Store


def test_a_file_url_is_the_folder_that_it_names(tmp_path: Path, small_adapter: Any) -> None:
    folder = tmp_path / "with space"
    Store(folder).add("a", small_adapter(1))
    url = folder.as_uri()
    assert "%20" in url
    assert Store(url).names() == ("a",)
    assert Store(url).location == str(folder)


@pytest.mark.parametrize("text", ["file://host/folder", "file://", "file:///x?y"])
def test_a_file_url_of_no_folder_here_is_refused(text: str) -> None:
    with pytest.raises(StoreLocationError, match="file://"):
        Store(text)


@given(
    scheme=st.sampled_from(["s3", "gs", "memory", "https", "ftp", "nothing"]),
    user=st.text("abc", min_size=1, max_size=6),
    secret=st.text("0123456789", min_size=4, max_size=12),
    rest=st.sampled_from(["bucket", "bucket/prefix", "bucket:9000/x?y=1"]),
)
def test_a_url_with_a_password_is_refused_and_never_repeated(
    scheme: str, user: str, secret: str, rest: str
) -> None:
    with pytest.raises(StoreLocationError) as refused:
        Store(f"{scheme}://{user}:{secret}@{rest}")
    assert secret not in str(refused.value)
    assert refused.value.remedy


@pytest.mark.parametrize("text", ["s3://b/x?token=s3cr3t", "s3://b/x#s3cr3t", "s3://b/../s3cr3t"])
def test_a_url_with_other_parts_is_refused_and_never_repeated(text: str) -> None:
    with pytest.raises(StoreLocationError) as refused:
        Store(text)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "sftp", "hdfs", "webhdfs", "data", "x"])
def test_a_service_without_exclusive_creation_is_refused(scheme: str) -> None:
    with pytest.raises(StoreLocationError, match=r"only where there is none.*s3://"):
        Store(f"{scheme}://place/folder")


@pytest.mark.parametrize("text", ["s3://", "s3:///prefix", "gs://"])
def test_a_url_without_a_bucket_is_refused(text: str) -> None:
    with pytest.raises(StoreLocationError, match="names no bucket"):
        Store(text)


@pytest.mark.parametrize(
    ("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")]
)
def test_a_missing_library_is_one_line_that_names_its_extra(
    scheme: str, module: str, extra: str
) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from quickchange_store.cli import app\n"
        f"app(['list', '--store', '{scheme}://bucket/x'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 1
    assert f"pip install 'quickchange[{extra}]'" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_cache_size_that_is_no_number_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKCHANGE_STORE_CACHE_BYTES", "20G")
    with pytest.raises(StoreLocationError, match="QUICKCHANGE_STORE_CACHE_BYTES"):
        Store("memory://bucket/x")
