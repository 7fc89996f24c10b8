"""Names of a LoRA's tensors as trainers and wrappers save them, and PEFT's own for the same.

PEFT saves `base_model.model.PATH.lora_A.weight`. The state dict of a wrapped model has the name of
the adapter after `lora_A`, parts such as `_orig_mod` or `module` anywhere, other prefixes, or none.
A name is read as PEFT's where what remains is the path of one module of the base, of its experts,
or of a single expert as checkpoints of older versions have it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from quickchange_store.canonical.canonical_adapter import BaseSpec, ExpertPiece
from quickchange_store.errors import InvalidAdapterError

PREFIX = "base_model.model."

WRAPPERS = frozenset(
    {
        "_checkpoint_wrapped_module",  # activation checkpoints
        "_forward_module",  # Lightning's Fabric
        "_fpw_module",  # earlier FSDP
        "_fsdp_wrapped_module",
        "_orig_mod",  # torch.compile
        "module",  # DDP, DeepSpeed
    }
)
# What may stand before a path: PEFT's own, the model within a trainer's, and the language model
# within a multimodal one.
LEADING = frozenset(
    {
        "base_model",
        "language_model",
        "llm",  # XTuner
        "model",
        "pretrained_model",  # TRL's model with a value head
        "text_model",
    }
)
_SWIFT = "loramodule_"  # before an adapter's name, in ms-swift until 1.5
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|ia3_l)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
# Between a module's path and its parameters, in the state dict of a model that trains it whole.
_SAVED = re.compile(
    r"\.(?:modules_to_save|ln_tuning_layers)(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?=\.)"
)
_NESTED = re.compile(r"(?P<module>.+?)(?P<depth>(?:\.base_layer)*)")
_PARAMETER = re.compile(r"(?P<module>.+?)\.(?P<part>(?:base_layer\.)?(?:weight|bias))")


def unwrapped(key: str) -> str:
    """A tensor's name without the parts that wrappers of modules add."""
    parts = key.split(".")
    return ".".join(p for p in parts if p not in WRAPPERS and not p.startswith(_SWIFT))


def without_saving(text: str) -> str:
    """A tensor's name without the parts that PEFT adds where it trains a module whole."""
    return _SAVED.sub("", text, count=1)


class TensorNames:
    """PEFT's names for the tensors of one file, and what its modules were called in training."""

    def __init__(self, base: BaseSpec) -> None:
        self._paths = base.modules.keys()
        self._experts = {path.rpartition(".")[0] for path in base.experts}
        self._expert_modules = base.expert_modules
        self._of_expert: dict[str, str | None] = {}  # results of `_expert_path`
        self.expert_modules: dict[str, ExpertPiece] = {}  # in the file: of single experts
        tails = {path: _tails(path) for path in self._paths}
        counts = Counter(tail for each in tails.values() for tail in each)
        self._whole = {
            tail: path for path, each in tails.items() for tail in each if counts[tail] == 1
        }
        self._adapters: dict[str, str] = {}  # an adapter's name -> a tensor that has it
        self._trained: dict[str, str] = {}

    def plain(self, key: str) -> str | None:
        """PEFT's name for the tensor `key`; None where it belongs to no module of the base."""
        for text in (key, unwrapped(key)):  # a base may have a module of a wrapper's name
            named = self._plain(key, text)
            if named is not None:
                return named
        return None

    def _plain(self, key: str, text: str) -> str | None:
        found = _PART.fullmatch(text)
        if found is not None:
            path = self.path(found["module"])
            if path is None and found["part"] in ("lora_A", "lora_B"):
                path = self._of_expert.get(found["module"])
                if found["module"] not in self._of_expert:
                    path = self._of_expert[found["module"]] = self._expert_path(found["module"])
            if path is None:
                return None
            if found["adapter"] is not None:
                self._adapters.setdefault(found["adapter"], key)
            part = found["part"]
            ending = f".{found['kind'] or 'weight'}" if part in ("lora_A", "lora_B") else ""
            return f"{PREFIX}{path}.{part}{ending}"
        found = _PARAMETER.fullmatch(without_saving(text))
        path = None if found is None else self.path(found["module"])
        if found is None or path is None:
            return None
        saved = _SAVED.search(text)
        if saved is not None and saved["name"] is not None:
            self._adapters.setdefault(saved["name"], key)
        return f"{PREFIX}{path}.{found['part']}"

    @property
    def spellings(self) -> dict[str, str]:
        """The base's module paths by each name that is one module's alone."""
        return {path: path for path in self._paths} | self._whole

    def path(self, text: str) -> str | None:
        """The base's path of the module that a file calls `text`; None where there is not one."""
        cuts = _cuts(text.split("."))
        path = next((cut for cut in cuts if cut in self._paths), None)
        path = path or next((self._whole[cut] for cut in cuts if cut in self._whole), None)
        if path is not None:
            self._trained[path] = text.rpartition(PREFIX)[2]
        return path

    def _expert_path(self, text: str) -> str | None:
        """Name of what a file calls `text`: the module of all experts, nested or not, or of one.

        One expert's is the path of its matrix and the number of the piece within it.
        """
        nested = _NESTED.fullmatch(text)
        if not self._experts or nested is None:
            return None
        cuts = _cuts(nested["module"].split("."))
        for cut in cuts:
            if cut in self._experts:
                return f"{cut}{nested['depth']}"
        if nested["depth"] or self._expert_modules is None:
            return None
        for cut in cuts:
            piece = self._expert_modules.find(cut)
            if piece is not None:
                name = f"{piece.path}.{piece.index}"
                self.expert_modules[name] = piece
                self._trained[name] = text.rpartition(PREFIX)[2]
                return name
            path = self._expert_modules.module(cut)
            if path in self._paths:
                self._trained[path] = text.rpartition(PREFIX)[2]
                return path
        return None

    @property
    def of_experts(self) -> list[str]:
        """What the file calls single experts' modules."""
        return [self._trained[name] for name in self.expert_modules]

    def of_module(self, path: str) -> tuple[str, ...]:
        """What the configuration may call a module: its path, and its name in the file."""
        trained = self._trained.get(path, path)
        return (path,) if trained == path else (path, trained)

    def of_target(self, path: str) -> tuple[str, ...]:
        """Names of a module, and of its weight, either of which may be targeted."""
        return (*self.of_module(path), f"{path}.weight")

    def refuse_several(self, file: str) -> None:
        """Raise InvalidAdapterError where the tensors are of adapters with different names."""
        if len(self._adapters) > 1:
            first, second, *_ = sorted(self._adapters)
            raise InvalidAdapterError(
                f"the file holds several adapters: this tensor is of {second!r}, "
                f"{self._adapters[first]} of {first!r}",
                file=file,
                key=self._adapters[second],
                remedy="save one of them alone (save_pretrained's selected_adapters)",
            )


def _tails(path: str) -> set[str]:
    """What names a module without the parts that stand before a model, or a language model."""
    return {path.partition(".")[2], *_cuts(path.split("."))[1:]} - {""}


def _cuts(parts: Sequence[str]) -> list[str]:
    """The path, and what is left of it without its first parts that may stand before one."""
    cuts = [".".join(parts)]
    for number, part in enumerate(parts[:-1], 1):
        if part not in LEADING:
            break
        cuts.append(".".join(parts[number:]))
    return cuts
