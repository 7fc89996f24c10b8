"""The native library's build: once, whole or not at all, and dispensable."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quickchange_kernels import native


def ensure_again() -> bool:
    """`native.ensure` as a fresh process would run it."""
    return native.ensure.__wrapped__()


def test_without_a_compiler_plain_torch_serves_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not ensure_again()
    assert "no C++ compiler: 'no-such-compiler'" in caplog.text
    assert "Install a C++ compiler" in caplog.text


def test_a_failed_build_leaves_plain_torch_and_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    assert not ensure_again()
    assert "can't be built" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("variable", [("QUICKCHANGE_NATIVE", "0"), ("TRITON_INTERPRET", "1")])
def test_it_can_be_turned_off(
    variable: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(tmp_path))
    monkeypatch.setenv(*variable)
    assert not ensure_again()
    assert not list(tmp_path.iterdir())


def test_plain_torch_serves_in_a_process_without_native_kernels() -> None:
    program = (
        "import torch\n"
        "from quickchange_kernels import native\n"
        "from quickchange_kernels.linear.linear_float import linear\n"
        "assert not native.ensure()\n"
        "assert linear(torch.ones(1, 3), torch.ones(2, 3)).tolist() == [[3.0, 3.0]]\n"
    )
    environment = {"QUICKCHANGE_NATIVE": "0", "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


def test_two_builders_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def compile_slowly(folder: Path, library: Path) -> None:
        builds.append(folder)
        time.sleep(0.1)
        library.write_bytes(b"built")

    monkeypatch.setattr(native, "_compile", compile_slowly)
    threads = [threading.Thread(target=native.build, args=(tmp_path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert native.build(tmp_path).read_bytes() == b"built"


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/a", "/b", "/a"),
        (None, "/b", "/b/quickchange"),
        (None, None, "/home/x/.cache/quickchange"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    own: str | None, shared: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    for name, value in [("QUICKCHANGE_CACHE", own), ("XDG_CACHE_HOME", shared)]:
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert native.cache_folder() == Path(expected)


def test_the_fingerprint_follows_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    (tmp_path / "a.cpp").write_text("one")
    before = native.fingerprint()
    (tmp_path / "a.cpp").write_text("two")
    assert native.fingerprint() != before


def test_a_prebuilt_library_is_taken_without_writing_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "image" / "native" / native.fingerprint()
    folder.mkdir(parents=True)
    (folder / f"{native.LIBRARY_NAME}.so").write_bytes(b"built before")
    monkeypatch.setenv("QUICKCHANGE_PREBUILT", str(tmp_path / "image"))
    assert native.prebuilt() == folder / f"{native.LIBRARY_NAME}.so"
    assert [path.name for path in folder.iterdir()] == [f"{native.LIBRARY_NAME}.so"]


def test_a_prebuilt_library_of_other_sources_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "native" / "another-fingerprint"
    folder.mkdir(parents=True)
    (folder / f"{native.LIBRARY_NAME}.so").write_bytes(b"built before")
    monkeypatch.setenv("QUICKCHANGE_PREBUILT", str(tmp_path))
    assert native.prebuilt() is None
