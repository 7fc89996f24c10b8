"""Pickled weights (`.bin`, `.pt`) as safetensors, made by a process of its own.

A pickle is a program. The process runs it with torch's `weights_only`, which knows tensors and
plain containers and nothing else, within limits of memory, disk and time, and writes what it finds;
this process reads safetensors alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from quickchange_store.errors import InvalidAdapterError, StoreError, UnsupportedFeatureError
from quickchange_store.formats.weight_files import conversion

LIMIT_SECONDS = 120.0
MAX_BYTES = 8 << 30  # of a file: more than any adapter's, less than most models'
MAX_GROWTH = 2  # bytes of tensors by bytes of the file: tensors may share one storage
_ROOM = 4 << 30  # bytes of memory for torch itself
_KEPT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")  # of the environment; the rest may hold secrets

# Prints one JSON object: {} or what is wrong. A state dict may lie in a checkpoint, by its name.
_CHILD = """
import json, resource, sys
source, target = sys.argv[1:3]
memory, disk, seconds, growth = map(int, sys.argv[3:])
for limit, most in (("DATA", memory), ("FSIZE", disk), ("CPU", seconds), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
import torch
from safetensors.torch import save_file

def fail(**problem):
    print(json.dumps(problem))
    sys.exit(0)

try:
    found = torch.load(source, map_location="cpu", weights_only=True)
except Exception as error:
    fail(code=type(error).__name__, said=" ".join(str(error).split())[:4000])
place = []
while isinstance(found, dict) and not any(isinstance(v, torch.Tensor) for v in found.values()):
    inner = [key for key in NAMES if isinstance(found.get(key), dict)]
    if len(inner) != 1 or len(place) > 3:
        break
    place.append(inner[0])
    found = found[inner[0]]
if not isinstance(found, dict) or not found:
    fail(content=type(found).__name__)
for key, value in found.items():
    if type(key) is not str or type(value) not in (torch.Tensor, torch.nn.Parameter):
        fail(key=str(key)[:300], kind=type(value).__name__)
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        fail(key=key[:300], kind=f"tensor of {value.layout} on {value.device}")
if sum(value.numel() * value.element_size() for value in found.values()) > disk - (1 << 20):
    fail(size=True)
try:
    save_file({key: value.detach().clone().contiguous() for key, value in found.items()}, target)
except Exception as error:
    fail(code=type(error).__name__, said=" ".join(str(error).split())[:4000])
print("{}")
""".replace(
    "NAMES",
    repr(("state_dict", "module", "model", "model_state_dict", "adapter", "lora", "network")),
)


@contextmanager
def as_safetensors(path: Path) -> Iterator[Path]:
    """A safetensors file with the tensors of the pickle at `path`, there until the end.

    Raises InvalidAdapterError and UnsupportedFeatureError.
    """
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise UnsupportedFeatureError(
            f"a pickle of {size} bytes is not read (uploads leave pickles empty; the most is "
            f"{MAX_BYTES >> 30} GiB)",
            file=path.name,
            remedy="convert it where you trust it: "
            + conversion(path.name, f"{path.stem}.safetensors"),
        )
    disk = MAX_GROWTH * size + (2 << 20)
    with TemporaryDirectory(prefix="quickchange-") as scratch:
        target = Path(scratch) / "weights.safetensors"
        limits = (_ROOM + 3 * disk, disk, int(LIMIT_SECONDS), MAX_GROWTH)
        arguments = [str(path.absolute()), str(target), *map(str, limits)]
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _CHILD, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=LIMIT_SECONDS,
                check=True,
                cwd=scratch,
                env=environment,
            )
            problem = json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError) as error:
            raise InvalidAdapterError(
                f"reading it takes more than {LIMIT_SECONDS:g} s, or more memory or disk than "
                f"{MAX_GROWTH} times its {size} bytes",
                file=path.name,
                remedy="save the adapter alone, as safetensors",
            ) from error
        if problem:
            raise _refusal(path, problem)
        yield target


def _refusal(path: Path, problem: dict[str, str]) -> StoreError:
    """What the process said is wrong with the pickle at `path`."""
    remedy = "save the adapter's tensors alone, as safetensors"
    if "code" in problem:
        return UnsupportedFeatureError(
            "no pickle that holds tensors alone: torch.load with weights_only=True says "
            f"{problem['code']}: {_reason(problem['said'])}",
            file=path.name,
            remedy=f"{remedy}, where you trust the file; where it is sound, "
            + conversion(path.name, f"{path.stem}.safetensors"),
        )
    if "key" in problem:
        found = f"it is a {problem['kind']}, while a file of weights holds plain tensors alone"
        return UnsupportedFeatureError(found, file=path.name, key=problem["key"], remedy=remedy)
    found = f"it holds a {problem.get('content')} without tensors"
    if "size" in problem:
        found = f"its tensors are more than {MAX_GROWTH} times as large as the file"
    return InvalidAdapterError(found, file=path.name, remedy=remedy)


def _reason(said: str) -> str:
    """What torch says is wrong, without its advice."""
    for mark in ("WeightsUnpickler error:", "Unsupported"):
        _, found, rest = said.partition(mark)
        if found:
            said = rest if mark.endswith(":") else found + rest
            break
    return said.split(". ")[0].strip()[:300]
