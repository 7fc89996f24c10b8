"""Reader of Medusa heads in the layout of vLLM's Medusa model and MedusaConfig.

Blocks without a bias have a bias of zero (`medusa_fc_bias` false, or absent). `token_map` with
`truncated_vocab_size` is the draft vocabulary: an LM head has a row for each of its tokens, in its
order, or for every token of the base model. With `original_lm_head` all heads share one LM head,
lm_heads.0: where it is a copy of the base model's, it is not stored. Any name may begin with
"medusa_heads.".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import flag
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.turbo.turbo_common import HEADS_CONFIG_FILE, LmHead, is_index

if TYPE_CHECKING:
    import torch

_PREFIX = "medusa_heads."


def read_vllm(
    tensors: AdapterTensors, config: Mapping[str, Any], base: BaseSpec, heads: int, layers: int
) -> TurboHeads:
    """Read the heads in `tensors`. Raises as `read_medusa`."""
    reader = _Reader(tensors, config, base)
    reader.check_config()
    blocks = [reader.block(f"blocks.{i}.layers.{j}") for i in range(heads) for j in range(layers)]
    tokens = reader.tokens()
    order = None if tokens is None else tokens.argsort()
    outputs = reader.outputs(heads, tokens)
    return TurboHeads(
        blocks=tuple(blocks),
        heads=tuple(tuple(range(i * layers, (i + 1) * layers)) for i in range(heads)),
        vocabulary=None if tokens is None or order is None else tokens[order].int(),
        outputs=outputs if order is None else tuple(output[order] for output in outputs),
    )


class _Reader:
    """One folder's tensors, by name without vLLM's optional prefix."""

    def __init__(self, tensors: AdapterTensors, config: Mapping[str, Any], base: BaseSpec) -> None:
        self._tensors = tensors
        self._config = config
        self._base = base
        self._head = LmHead.of(base)

    def check_config(self) -> None:
        for field, asked in (
            ("hidden_size", self._head.hidden),
            ("vocab_size", self._head.vocabulary),
        ):
            value = self._config.get(field, asked)
            if value != asked:
                raise BaseMismatchError(
                    f"{value!r}, while the base model has {asked}",
                    file=HEADS_CONFIG_FILE,
                    key=field,
                    remedy="use heads of this base model",
                )
        if self._config.get("logit_scale", 1.0) != 1.0:
            raise UnsupportedFeatureError(
                f"logits scaled by {self._config['logit_scale']!r} are not supported",
                file=HEADS_CONFIG_FILE,
                key="logit_scale",
                remedy="use heads whose logit_scale is 1, and the base's LM head as it is",
            )

    def block(self, prefix: str) -> DraftBlock:
        import torch

        weight, bias = self._key(f"{prefix}.weight"), self._key(f"{prefix}.bias")
        hidden, module = self._head.hidden, self._head.module
        taken = self._tensors.take_shaped(weight, module, (hidden, hidden))
        if flag(self._config, "medusa_fc_bias", HEADS_CONFIG_FILE):
            return DraftBlock(taken, self._tensors.take_shaped(bias, module, (hidden,)))
        if bias in self._tensors:
            raise InvalidAdapterError(
                f"the tensor is there, while {HEADS_CONFIG_FILE} says that blocks have no bias",
                file=self._tensors.file_of(bias),
                key=bias,
                remedy="set medusa_fc_bias to true where the heads were trained with it",
            )
        return DraftBlock(taken, torch.zeros(hidden, dtype=taken.dtype))

    def tokens(self) -> torch.Tensor | None:
        """[D] int64 in the file's order; None where every token is drafted."""
        key, field = self._key("token_map"), "truncated_vocab_size"
        drafted = self._config.get(field)
        drafted = self._head.vocabulary if drafted is None else drafted
        if key not in self._tensors and drafted == self._head.vocabulary:
            return None
        if not is_index(drafted) or key not in self._tensors:
            raise InvalidAdapterError(
                f"{drafted!r} of {self._head.vocabulary} tokens, and "
                + ("a" if key in self._tensors else "no")
                + " token_map",
                file=HEADS_CONFIG_FILE,
                key=field,
                remedy="set it to the length of the tensor token_map, or drop both",
            )
        tokens = self._head.take_tokens(self._tensors, key)
        if len(tokens) != drafted:
            raise InvalidAdapterError(
                f"{len(tokens)} tokens, while {field} in {HEADS_CONFIG_FILE} is {drafted}",
                file=self._tensors.file_of(key),
                key=key,
                remedy="correct truncated_vocab_size, or save the heads again",
            )
        return tokens

    def outputs(self, heads: int, tokens: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Own LM heads [D or V, H], rows in `tokens`'s order; none where they are the base's."""
        if not flag(self._config, "original_lm_head", HEADS_CONFIG_FILE):
            return tuple(self._output(f"lm_heads.{i}.weight", tokens) for i in range(heads))
        keys = [name for name in ("lm_head.weight", "lm_heads.0.weight") if self._has(name)]
        output = self._output(keys[0] if keys else "lm_heads.0.weight", tokens)
        key = self._key(keys[0])
        for other in (self._key(f"lm_heads.{i}.weight") for i in range(1, heads)):
            if other in self._tensors:  # written by some tools, and not read by vLLM
                self._tensors.take(other)
        base = self._tensors.base_tensor(self._base, f"{self._head.module}.weight", key)
        rows = base if tokens is None else base[tokens]
        if bool((rows.to(output.dtype) == output).all()):
            return ()
        return (output,) * heads

    def _output(self, name: str, tokens: torch.Tensor | None) -> torch.Tensor:
        key, (vocabulary, hidden) = self._key(name), (self._head.vocabulary, self._head.hidden)
        tensor = self._tensors.take(key)
        if tokens is None or tensor.shape[0] == vocabulary:
            whole = self._tensors.take_shaped(key, self._head.module, (vocabulary, hidden))
            return whole if tokens is None else whole[tokens]
        return self._tensors.take_shaped(key, self._head.module, (len(tokens), hidden))

    def _has(self, name: str) -> bool:
        return self._key(name) in self._tensors

    def _key(self, name: str) -> str:
        prefixed = _PREFIX + name
        return prefixed if prefixed in self._tensors else name
