"""A device whose values can't be looked at, with copies to and from it counted and judged.

The device is torch's "meta": tensors with shapes and dtypes, without values. A copy that would hold
up the host, and any operation that would wait for a value, raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
# Operations whose results' shapes or values the host would have to wait for.
_WAITING = (
    "aten.nonzero",
    "aten._local_scalar_dense",
    "aten.item",
    "aten.masked_select",
    "aten._unique",
    "aten.unique",
    "aten.repeat_interleave.Tensor",
    "aten.equal",
    "aten.is_nonzero",
)


class _NothingSentAtOnce(TorchFunctionMode):
    """Refuses tensors made there of the host's values, which no dispatch mode sees."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        made = func in (torch.tensor, torch.as_tensor, torch.asarray)
        if made and (kwargs or {}).get("device") == META:
            raise RuntimeError(f"torch.{func.__name__} on the device waits for its copy there")
        return func(*args, **(kwargs or {}))


class FarDevice(TorchDispatchMode):
    """Counts copies; refuses those that block and operations that wait.

    Pinned memory is asked for and not made: there is no device to pin it for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0
        self.downloads = 0
        self.operations: Counter[str] = Counter()
        self._pinned: dict[int, Tensor] = {}  # by storage; held, so that none is used again
        self._calls = _NothingSentAtOnce()

    def __enter__(self) -> FarDevice:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        name = str(func)
        if kwargs.pop("pin_memory", False):
            made: Tensor = func(*args, **kwargs)
            self._pinned[made.untyped_storage().data_ptr()] = made
            return made
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        far = any(tensor.device == META for tensor in tensors)
        if far and name.startswith(_WAITING):
            raise RuntimeError(f"{name} waits for the device")
        if far and name.startswith(("aten.index.", "aten.index_put")):
            for leaf in tree_leaves(args[1]):
                if isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8):
                    raise RuntimeError(f"{name} by a mask waits for the device")
        if name.startswith(("aten._to_copy", "aten.to.")):
            return self._moved(func, args, kwargs)
        if name.startswith("aten.copy_"):
            to, source = args[0], args[1]
            if to.device != source.device:
                waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                self._count(source, to, blocking=waits)
                return to
        if far:
            self.operations[name] += 1
            near = [t for t in tensors if t.device != META and t.dim()]
            if near:
                raise RuntimeError(f"{name} with tensors here and on the device")
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """In inference mode `to` comes as it was called, elsewhere as the copy that it makes."""
        source: Tensor = args[0]
        given = [*args[1:], *kwargs.values()]
        device = next((torch.device(one) for one in given if isinstance(one, torch.device)), None)
        if device is None or device == source.device:
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        dtype = next((one for one in given if isinstance(one, torch.dtype)), source.dtype)
        out = torch.empty_like(source, device=device, dtype=dtype)
        waits = not kwargs.get("non_blocking", len(args) > 3 and args[3])
        self._count(source, out, blocking=waits)
        return out

    def _count(self, source: Tensor, to: Tensor, *, blocking: bool) -> None:
        up = to.device == META
        here = source if up else to
        pinned = here.untyped_storage().data_ptr() in self._pinned
        if blocking or not pinned:
            why = "is blocking" if blocking else "is from or to memory that is not pinned"
            raise RuntimeError(f"a copy of {list(source.shape)} to {to.device} {why}")
        if up:
            self.uploads += 1
        else:
            self.downloads += 1
            to.zero_()


def there(tensor: Tensor) -> Tensor:
    """The tensor's place on the device."""
    return torch.empty_like(tensor, device=META)
