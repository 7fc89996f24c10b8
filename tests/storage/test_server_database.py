"""The server opens its database as it starts, counts what it does, and closes it at the end."""

from __future__ import annotations

from pathlib import Path

from http_support import live_server


def test_a_server_opens_the_database_of_its_settings(tmp_path: Path, database_url: str) -> None:
    with live_server(tmp_path / "store", database=database_url) as live:
        text = live.http.get("/metrics").text
    assert "\nquickchange_storage_queue 0.0\n" in text
    assert "\nquickchange_storage_lost_total 0.0\n" in text
    assert "\nquickchange_storage_commit_seconds_count 0.0\n" in text


def test_a_server_without_the_setting_keeps_its_file_beside_the_adapters(tmp_path: Path) -> None:
    with live_server(tmp_path / "store"):
        assert (tmp_path / "store" / "quickchange.sqlite3").stat().st_mode & 0o777 == 0o600
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert "quickchange.sqlite3-wal" not in names  # closing folds the log into the file
