"""Finds the configurations that ship, and compiles one of them for one target."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import quickchange_kernels
from quickchange_kernels import dispatch
from quickchange_kernels.aot.targets import Target
from quickchange_kernels.compilation import Compilation


def kernel_modules() -> list[str]:
    """Modules of Triton kernels in the package and its folders: those named `*_triton`."""
    package = quickchange_kernels
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [module.name for module in found if module.name.endswith("_triton")]


def compilations_of(module: str) -> Iterator[Compilation]:
    """Configurations of a module. Raises ValueError for none, RuntimeError if interpreted."""
    if dispatch.triton_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it to compile kernels")
    imported = importlib.import_module(module)
    if not hasattr(imported, "compilations"):
        raise ValueError(f"{module} has no compilations(): add it, so that its kernels are checked")
    yield from imported.compilations()


def compiled(one: Compilation, target: Target) -> Any:
    """triton.compiler.CompiledKernel of a configuration. Raises what Triton's compiler raises."""
    import triton
    from triton.compiler import ASTSource

    names = list(one.kernel.arg_names)
    _check_arguments(one, names)
    types = {name: one.signature.get(name, "constexpr") for name in names}
    attributes = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in one.kernel.params
        if not parameter.do_not_specialize
        and (types[parameter.name].startswith("*") or parameter.name in one.divisible_by_16)
    }
    source = ASTSource(
        fn=one.kernel, signature=types, constexprs=dict(one.constants), attrs=attributes
    )
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, **one.options}
    return triton.compile(source, target=target.triton_target(), options=options)


def _check_arguments(one: Compilation, names: list[str]) -> None:
    given = {*one.signature, *one.constants}
    if set(one.signature) & set(one.constants) or given != set(names):
        raise ValueError(
            f"{one.name}: signature and constants must name each argument of the kernel once; "
            f"wrong: {', '.join(sorted(given ^ set(names)) or sorted(one.constants))}"
        )
