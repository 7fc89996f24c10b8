"""Work in a child process, and memory that is given back."""

from __future__ import annotations

import os

import pytest

from quickchange_server.errors import WorkerFailedError
from quickchange_server.workers.process_memory import unchanged
from quickchange_server.workers.torch_worker import TorchWorker
from quickchange_store.errors import InvalidAdapterError
from quickchange_store.names import check_name

_SMAPS = """\
1000-2000 r-xp 00000000 08:01 1 /lib/code.so
Rss: 4 kB
Anonymous: 0 kB
2000-3000 r--p 00000000 08:01 1 /lib/relocated.so
Rss: 4 kB
Anonymous: 4 kB
3000-4000 rw-p 00000000 08:01 1 /lib/data.so
Rss: 4 kB
4000-5000 r--p 00000000 00:00 0
Rss: 4 kB
"""


def test_a_workers_results_and_errors_come_back_and_its_death_is_told() -> None:
    with TorchWorker() as worker:
        first = worker.run(os.getpid)
        assert first != os.getpid()
        with pytest.raises(Exception, match="name") as caught:
            worker.run(check_name, "no such/name")
        assert type(caught.value).__module__ == InvalidAdapterError.__module__
        assert worker.run(os.getpid) == first
        with pytest.raises(WorkerFailedError):
            worker.run(os._exit, 3)
        assert worker.run(os.getpid) != first


def test_only_files_pages_that_never_changed_are_given_back() -> None:
    assert list(unchanged(_SMAPS.splitlines())) == [(0x1000, 0x2000)]
