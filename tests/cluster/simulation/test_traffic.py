"""Traces: what is read of files, what is drawn, and what is said of mistakes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from quickchange_server.cluster.simulation.traffic import TracedRequest, traffic
from quickchange_server.errors import SettingError

TWO = [TracedRequest(0.5, "a b", 10, 2), TracedRequest(1.0, "", 20, 3, "system", 8)]


def test_json_lines_are_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(one._asdict()) + "\n" for one in reversed(TWO)))
    assert traffic(str(path)) == TWO


def test_csv_is_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "\ufeffadapter,time,prompt,output,prefix,prefix_tokens\na b,0.5,10,2,,\n,1,20,3,system,8\n",
        encoding="utf-8",
    )
    assert traffic(str(path)) == TWO


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"time": 0, "adapter": "a", "prompt": 1}', "line 2: output: is missing"),
        ('{"time": 0, "adapter": "a", "prompt": 0, "output": 1}', "line 2: prompt: 0 is not"),
        ('{"time": 0, "adapter": "a", "prompt": 1.5, "output": 1}', "line 2: prompt: 1.5 is not"),
        ('{"time": "x", "adapter": "a", "prompt": 1, "output": 1}', "line 2: time: 'x' is not"),
        ('{"time": NaN, "adapter": "a", "prompt": 1, "output": 1}', "line 2: time: nan is not"),
        ('{"time": 0, "adapter": [], "prompt": 1, "output": 1}', "line 2: adapter: [] is not"),
        ('{"time": true, "adapter": "a", "prompt": 1, "output": 1}', "line 2: time: True is not"),
        ('{"time": 0, "adapter": "a", "prompt": 1, "output": 1, "prefix": "p"}', "prefix_tokens"),
        (
            '{"time": 0, "adapter": "a", "prompt": 1, "output": 1, "prefix": "p", '
            '"prefix_tokens": 2}',
            "prefix_tokens: 2 exceeds prompt, 1",
        ),
        ("[1, 2]", "line 2: is not a JSON object"),
        ("{", "line 2: is not JSON"),
    ],
)
def test_a_mistake_is_named_by_line_and_field(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time": 0, "adapter": null, "prompt": 1, "output": 1}\n' + line)
    with pytest.raises(SettingError) as caught:
        traffic(str(path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time,adapter,prompt\n0,a,1\n", "line 1: the header lacks output"),
        ("time,adapter,prompt,output\n0,a,1\n", "line 2: has more or fewer fields"),
        ("time,adapter,prompt,output\n0,a,x,1\n", "line 2: prompt: 'x' is not a whole number"),
        ("", "the header lacks"),
        ("time,adapter,prompt,output\n", "has no request"),
    ],
)
def test_a_mistake_in_csv_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(SettingError, match=said):
        traffic(str(path))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("zipf:users=1", "'users' is none of adapters, alpha"),
        ("zipf:adapters=0", "adapters: '0' is not a whole number of at least 1"),
        ("zipf:rate=x", "rate: 'x' is not a number"),
        ("zipf:rate=0.001,seconds=0.001", "has no request"),
    ],
)
def test_a_mistake_in_drawn_traffic_is_named(given: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        traffic(given)


def test_drawn_traffic_is_the_same_each_time_and_follows_zipf() -> None:
    given = "zipf:adapters=50,alpha=1,rate=100,seconds=60,prompt=40,output=20,prefixes=3"
    requests = traffic(given)
    assert requests == traffic(given)
    assert len(requests) == pytest.approx(6000, rel=0.05)
    counts = Counter(request.adapter for request in requests)
    assert counts["adapter-0"] / counts["adapter-9"] == pytest.approx(10, rel=0.35)
    own = [request.prompt - request.prefix_tokens for request in requests]
    assert sum(own) / len(own) == pytest.approx(40, rel=0.05)
    assert all(request.prefix.split("/")[0] == request.adapter[8:] for request in requests)
