"""Files with any content in a store or an adapter's folder: read, or refused by file and remedy."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import CorruptStoreError, InvalidAdapterError, StoreError
from quickchange_store.importing import read_adapter
from quickchange_store.json_files import MAX_DEPTH, UnreadableFileError, read_object
from quickchange_store.store import Store

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUGE = "1" + "0" * 400
CONTENTS = {
    "nothing": b"",
    "not UTF-8": b"\xff\xfe{}",
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "rather deep": b'{"format": ' + b"[" * 300 + b"]" * 300 + b"}",
    "a huge number": b'{"format": ' + HUGE.encode() + b"}",
    "more digits than Python reads": b'{"format": ' + b"9" * 5000 + b"}",
    "NaN": b'{"format": NaN}',
    "infinity": b'{"format": -1e999}',
    "a key twice": b'{"format": 1, "format": 1}',
    "half a surrogate pair": b'{"format": "\\ud800"}',
    "another format": b'{"format": 99}',
    "a list for names": b'{"format": 1, "names": [], "aliases": {}}',
    "text for a number": b'{"format": 1, "names": {}, "aliases": {"a": {"name": 1}}}',
}


def adapter() -> CanonicalAdapter:
    update = LowRankUpdate(torch.ones(2, 8), torch.ones(8, 2), 1.0)
    return CanonicalAdapter("L", "tiny", {"m": update}, {})


def refused_index(root: Path) -> CorruptStoreError:
    with pytest.raises(CorruptStoreError) as caught:
        Store(root).snapshot()
    assert str(root / "index.json") in str(caught.value)
    assert caught.value.remedy
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_damaged_index_is_refused_with_its_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    refused_index(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_an_index_that_is_no_plain_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "index.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening one would wait for its writer
    else:
        path.symlink_to(path)
    refused_index(tmp_path)


def changed(tree: Any, place: tuple[str, ...], value: Any) -> None:
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("names", "a", "current"), 2),
        (("names", "a", "current"), True),
        (("names", "a", "next"), 1),
        (("names", "a", "versions"), {}),
        (("names", "a", "versions"), {"01": {"digest": "0" * 64, "created": 1.0}}),
        (("names", "a", "versions"), {"9" * 30: {"digest": "0" * 64, "created": 1.0}}),
        (("names", "a", "versions", "1", "digest"), "../../etc/passwd"),
        (("names", "a", "versions", "1", "created"), 1e300),
        (("names", "a", "versions", "1", "created"), -1),
        (("names", "a", "versions", "1", "turbo"), "yes"),
        (("names", "../a"), {"current": 1, "next": 2, "versions": {}}),
        (("aliases", "a"), {"name": "a", "version": None}),
        (("aliases", "b"), {"name": "c", "version": None}),
        (("aliases", "b"), {"name": "a", "version": 5}),
        (("aliases", "b"), {"name": "a", "version": None, "turbo": "a@7"}),
    ],
    ids=str,
)
def test_a_wrong_value_in_the_index_is_refused(
    tmp_path: Path, place: tuple[str, ...], value: Any
) -> None:
    Store(tmp_path).add("a", adapter())
    path = tmp_path / "index.json"
    tree = json.loads(path.read_bytes())
    changed(tree, place, value)
    path.write_text(json.dumps(tree))
    refused_index(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranks", "abc"),
        ("ranks", [[]]),
        ("parameters", "many"),
        ("created", 1e300),
        ("source", []),
        ("turbo", {"depth": 1}),
        ("kind", None),
    ],
)
def test_a_wrong_value_in_a_versions_figures_names_the_field(
    tmp_path: Path, field: str, value: Any
) -> None:
    store = Store(tmp_path)
    digest = store.add("a", adapter()).digest
    path = store.path(digest).with_name("info.json")
    tree = json.loads(path.read_bytes())
    del tree["checksum"]  # as earlier releases wrote it: the field itself is looked at
    path.write_text(json.dumps({**tree, field: value}))
    with pytest.raises(CorruptStoreError) as caught:
        store.info(digest)
    assert (caught.value.file, (caught.value.key or "").split(".")[0]) == (str(path), field)
    [problem] = store.verify()
    assert field in str(problem)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_object_or_are_refused(content: bytes) -> None:
    try:
        assert isinstance(read_object(content), dict)
    except UnreadableFileError as error:
        assert error.problem  # noqa: PT017


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5))
def test_what_is_read_can_be_written_again(tree: dict[str, Any]) -> None:
    try:
        read = read_object(json.dumps(tree).encode())
    except UnreadableFileError:
        return
    assert read_object(json.dumps(read, allow_nan=False).encode()) == read


def test_nesting_is_read_down_to_its_limit() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' * levels + b"1" + b"}" * levels

    assert read_object(nested(MAX_DEPTH))
    with pytest.raises(UnreadableFileError, match="levels deep"):
        read_object(nested(MAX_DEPTH + 1))


# --- adapters' folders --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    train("llama", folder, r=4, target_modules=["q_proj"])
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def refusal(folder: Path, base: BaseSpec) -> StoreError | None:
    """The store's own error for the folder, which has a remedy; None where it is read."""
    try:
        read_adapter(folder, base)
    except StoreError as error:
        if not error.remedy:
            raise
        return error
    return None


EXTREMES = [
    *(2**63, -(2**63), 10**30, -1, 0, 1.5, True, "8", [], [8], {}, {"a": 1}, None),
    *(1e300, -1e300, float("nan"), float("inf"), "x" * 100_000, "\n", "\ud800"),
]
FIELDS = [
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("target_modules", "exclude_modules", "bias", "use_rslora", "use_dora", "peft_type"),
    *("base_model_name_or_path", "task_type", "init_lora_weights", "lora_dropout", "auto_mapping"),
]


@pytest.mark.parametrize("field", FIELDS)
def test_any_value_of_a_field_is_read_or_refused_by_a_store_error(
    folder: Path, bases: Any, field: str
) -> None:
    path = folder / CONFIG
    before = json.loads(path.read_text())
    values = [*EXTREMES, *({"q_proj": value} for value in EXTREMES)]
    for value in values:
        path.write_text(json.dumps({**before, field: value}))
        refused = refusal(folder, bases("llama").spec)
        if refused is not None:
            assert len(str(refused)) < 5000
            assert str(refused).isprintable()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", HUGE),
        ("lora_alpha", "1e300"),
        ("r", HUGE),
        ("r", "9223372036854775808"),
        ("rank_pattern", f'{{"q_proj": {HUGE}}}'),
        ("alpha_pattern", '{"q_proj": -1e200}'),
        ("layers_to_transform", "[-1]"),
        ("layers_to_transform", HUGE),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_field(
    folder: Path, bases: Any, field: str, value: str
) -> None:
    path = folder / CONFIG
    config = json.dumps({**json.loads(path.read_text()), field: "HERE"})
    path.write_text(config.replace('"HERE"', value))
    with pytest.raises(InvalidAdapterError) as caught:
        read_adapter(folder, bases("llama").spec)
    assert (caught.value.key or "").split(".")[0] == field


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: object, end: object, shape: object = (2,), dtype: str = "F32") -> bytes:
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return json.dumps({"a": tensor}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header(b"", length=2**63),
        header(b"", length=2**64 - 1),
        header(b"{", length=1),
        header(b"[" * 5000),
        header(b'{"a": ' * 300),
        header(b"\xff"),
        header(entry(-4, 4)),
        header(entry(0, 2**63)),
        header(entry(0, 10**30)),
        header(entry(8, 0), b"\0" * 8),
        header(entry(0, 8), b"\0" * 4),
        header(entry(0, 8, [2**62, 2**62]), b"\0" * 8),
        header(entry(0, 0, [0, 2**63 - 1])),
        header(entry(0, 4, [1] * 100), b"\0" * 4),
        header(entry(0, 8, dtype="F4"), b"\0" * 8),
        header(entry(0, 8, dtype="nonsense"), b"\0" * 8),
        header(entry(0, 8, [-2]), b"\0" * 8),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_damaged_weights_file_is_refused(folder: Path, bases: Any, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, bases("llama").spec)
    assert caught.value.remedy


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(at=st.integers(0, 2000), bits=st.integers(1, 255))
def test_a_flipped_byte_is_read_or_refused_by_a_store_error(
    folder: Path, saved: Path, bases: Any, at: int, bits: int
) -> None:
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[at % len(content)] ^= bits
    (folder / WEIGHTS).write_bytes(content)
    refusal(folder, bases("llama").spec)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling"])
def test_what_is_no_plain_file_in_an_adapters_folder_is_refused_at_once(
    folder: Path, bases: Any, file: str, kind: str
) -> None:
    path = folder / file
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else "nowhere")
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, bases("llama").spec)
    assert caught.value.file == file


def test_heads_without_number_are_refused_before_they_are_counted(
    tmp_path: Path, bases: Any
) -> None:
    save_file({"0.0.linear.weight": torch.zeros(2, 2)}, tmp_path / "medusa_lm_head.safetensors")
    for number in (10**15, 65, -1, 0, True, "3"):
        (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": number}))
        with pytest.raises(InvalidAdapterError) as caught:
            read_adapter(tmp_path, bases("llama").spec)
        assert caught.value.key == "medusa_num_heads"
