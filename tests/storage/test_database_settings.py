"""A database that can't be used is refused by the setting's name, in words that help."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import threading
from pathlib import Path

import pytest

from quickchange_server.config import Settings
from quickchange_server.entrypoints import serve
from quickchange_server.errors import SettingError
from quickchange_server.storage.database import Database


def refusal(url: str) -> str:
    with pytest.raises(SettingError, match=r"^database: ") as raised:
        Database.open(url)
    assert raised.value.param == "database"
    return raised.value.message


@pytest.mark.parametrize("url", ["", "nonsense", "postgresql+psycopg://u:secret@host:port/x"])
def test_a_malformed_url_is_refused_without_being_repeated(url: str) -> None:
    message = refusal(url)
    assert "sqlite:///FILE" in message
    assert "secret" not in message


@pytest.mark.parametrize("url", ["mysql://u:secret@host/x", "postgresql+asyncpg://u:secret@h/x"])
def test_other_databases_and_drivers_are_refused_by_name(url: str) -> None:
    message = refusal(url)
    assert f"{url.split(':')[0]} is not supported" in message
    assert "secret" not in message


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true"])
def test_sqlite_without_a_plain_file_is_refused(url: str) -> None:
    assert "needs a plain file" in refusal(url)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 100)
    assert "file is not a database" in refusal(f"sqlite:///{path}")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(f"sqlite:///{tmp_path / 'file' / 'test.sqlite3'}")
    assert "can't be written" in message


def test_a_missing_driver_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "pip install 'quickchange[postgres]'" in refusal("postgresql://u@localhost/x")


def test_a_server_that_does_not_answer_is_refused_without_the_password(tmp_path: Path) -> None:
    message = refusal(f"postgresql://user:secret@/x?host={tmp_path}")
    assert "can't be used" in message
    assert "secret" not in message


def test_postgresql_may_be_named_without_its_driver(postgres_url: str) -> None:
    url = postgres_url.replace("postgresql+psycopg", "postgresql")
    asyncio.run(Database.open(url).close())


def test_a_sqlite_file_and_its_logs_are_their_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "test.sqlite3"
    database = Database.open(f"sqlite:///{path}")
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    asyncio.run(database.close())
    assert modes == dict.fromkeys(("test.sqlite3", "test.sqlite3-wal", "test.sqlite3-shm"), 0o600)


def test_the_default_is_sqlite_in_the_stores_folder(tmp_path: Path) -> None:
    settings = Settings(model="unused", store=tmp_path / "store")
    assert settings.database_url == f"sqlite:///{tmp_path}/store/quickchange.sqlite3"
    given = Settings(model="unused", store=tmp_path, database="sqlite:///x")
    assert given.database_url == "sqlite:///x"


def test_a_file_that_another_process_uses_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "test.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE theirs (x)")
    other.execute("BEGIN IMMEDIATE")
    ending = threading.Timer(0.3, other.execute, ["COMMIT"])
    ending.start()
    asyncio.run(Database.open(f"sqlite:///{path}").close())
    ending.join()
    other.close()


def test_serve_refuses_in_one_line_with_status_1(tmp_path: Path) -> None:
    given = {"model": "unused", "store": tmp_path, "port": 0, "database": "mysql://host/x"}
    with pytest.raises(SystemExit, match=r"^quickchange: database: mysql is not supported[^\n]*$"):
        serve.serve(given, demo=False)
