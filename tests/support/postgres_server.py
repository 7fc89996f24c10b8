"""A PostgreSQL server of the tests' own: a fresh folder, a Unix socket, ended by its own process.

A pytest plugin: `postgres` is one server for the whole run, `postgres_url` a fresh database on
it, and `database_url` a fresh database on SQLite and on PostgreSQL in turn.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from required_services import not_installed

USER = "quickchange"
LIMIT_SECONDS = 180.0
# Durable as a real server is. Small, and on no TCP port: several runs fit on one machine.
OPTIONS = {
    "listen_addresses": "",
    "fsync": "on",
    "shared_buffers": "16MB",
    "max_wal_size": "64MB",
}


class PostgresServer:
    """One server and its folder."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        if os.getuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
        self._run("initdb", "-D", str(folder / "data"), "-U", USER, "--auth=trust", "-E", "UTF8")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://{USER}@/{database}?host={self._folder}"

    def make_database(self) -> str:
        """The URL of a fresh, empty database."""
        self._databases += 1
        name = f"test{self._databases}"
        self._run("createdb", "-h", str(self._folder), "-U", USER, name)
        return self.url(name)

    def start(self) -> None:
        """Return when it takes connections. It ends with the thread that calls this."""
        settings = OPTIONS | {"unix_socket_directories": str(self._folder)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        with (self._folder.parent / f"{self._folder.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command("postgres"), "-D", str(self._folder / "data"), *options],
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        end = time.monotonic() + LIMIT_SECONDS
        while not self._answers():
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError(self.log())
            time.sleep(0.02)

    def start_again(self) -> None:
        """Start it where it does not run."""
        if self._process is None or self._process.poll() is not None:
            self.start()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT closes connections and ends in order, SIGQUIT at once as in a crash."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(LIMIT_SECONDS)

    def log(self) -> str:
        return (self._folder.parent / f"{self._folder.name}.log").read_text()

    def remove(self) -> None:
        """End it if it runs, at once, and delete all that it had."""
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder)
        (self._folder.parent / f"{self._folder.name}.log").unlink(missing_ok=True)

    def _answers(self) -> bool:
        asked = [str(self._programs / "pg_isready"), "-q", "-h", str(self._folder)]
        return subprocess.run(asked, check=False).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._command(program), *arguments]
        done = subprocess.run(command, capture_output=True, cwd=self._folder, check=False)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr.decode()}")

    def _command(self, program: str) -> list[str]:
        """The program as a user other than root, whom it refuses; it ends with these tests."""
        user = ["--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.getuid() == 0 else []
        return ["setpriv", *user, "--pdeathsig=INT", str(self._programs / program)]


def find_programs() -> Path | None:
    """The folder of PostgreSQL's programs: Debian's newest, or the one on the path."""
    debian = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    for found in sorted(debian, key=lambda path: float(path.parts[-3]), reverse=True):
        return found.parent
    on_path = shutil.which("postgres")
    return Path(on_path).resolve().parent if on_path else None


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server. Skips the test where PostgreSQL is not installed."""
    programs = find_programs()
    if programs is None or shutil.which("setpriv") is None:
        not_installed("PostgreSQL's programs are not installed")
    server = PostgresServer(programs, Path(tempfile.mkdtemp(prefix="quickchange-postgres-")))
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    return postgres.make_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.sqlite3'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.make_database()
