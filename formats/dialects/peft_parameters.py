"""Reads LoRA on parameters that a peft config names (`target_parameters`), such as stacks of experts.

The keys name only the module. If several parameters of a module are adapted, peft nests them: the first in the module's
own order is innermost, with the most `.base_layer` in its keys. Neither that order nor the input side of an expert is
in any file, so both are inferred from the shapes; if these leave a choice, reading is refused. This module does no
mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

from formats.adapter import AdapterModule
from formats.dialects.peft_factors import Context, Factors, pair
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, owner
from formats.spec import TensorSpec, shape_text

WRAPPED = "base_layer"


@dataclass(frozen=True)
class ParameterFactors:
    """The factors of one module's parameters.

    Attributes:
        module: the module's path.
        names: the module's parameters that the config targets.
        levels: factors by their depth in peft's wrappers; 0 is the outermost.
    """

    module: str
    names: tuple[str, ...]
    levels: dict[int, Factors]

    @property
    def targets(self) -> list[str]:
        """The parameters' full names."""
        return [f"{self.module}.{name}" for name in self.names]


def unwrapped(path: str) -> tuple[str, int]:
    """The module that a path in a peft file stands for, and how deep in peft's wrappers the factors are."""
    parts = path.split(".")
    depth = 0
    while parts[-1 - depth :] == [WRAPPED] * (depth + 1):
        depth += 1
    return ".".join(part for part in parts if part != WRAPPED), depth


def take_parameters(
    modules: dict[str, Factors], config: Mapping[str, Any], base: Mapping[str, TensorSpec]
) -> list[ParameterFactors]:
    """Removes the factors of targeted parameters from `modules` and returns them. The remaining paths lose their
    wrappers."""
    tails = frozenset(_tail(name) for name in base)
    taken: dict[str, ParameterFactors] = {}
    for path in list(modules):
        module, depth = unwrapped(path)
        names = _targeted(module, config.get("target_parameters") or (), tails)
        if names:
            found = taken.setdefault(module, ParameterFactors(module, names, {}))
            found.levels[depth] = modules.pop(path)
        elif module != path:
            modules[module] = modules.pop(path)
    return [taken[module] for module in sorted(taken)]


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _targeted(module: str, entries: Iterable[str], tails: frozenset[str]) -> tuple[str, ...]:
    """The names of the module's parameters that the config targets. The config may name parameters that only other
    modules of the same name have; the tails of the base's names exclude these."""
    found = set()
    for entry in entries:
        holder, parameter = owner(entry), entry.rpartition(".")[2]
        if (not holder or module == holder or module.endswith(f".{holder}")) and _tail(
            f"{module}.{parameter}"
        ) in tails:
            found.add(parameter)
    return tuple(sorted(found))


def parameter_modules(found: ParameterFactors, context: Context) -> list[AdapterModule]:
    """The adapted parameters of one module.

    Raises:
        AdapterFormatError: the factors fit no parameter, several parameters, or one parameter in two layouts.
    """
    module, names, levels = found.module, found.names, found.levels
    specs = {name: context.base[context.rename(f"{module}.{name}")] for name in names}
    where = f"{context.where}: {module}"
    if sorted(levels) != list(range(len(names))):
        raise AdapterFormatError(
            "the adapter's factors are not one pair for each targeted parameter",
            where=where,
            expected=", ".join(names),
            found=f"{len(levels)} pairs",
            then="use the adapter_config.json that was saved with these weights",
        )
    shapes = {}
    for level, factors in levels.items():
        a, b = pair(factors, ("lora_A", "lora_B"), where)
        shapes[level] = (a.spec.shape, b.spec.shape)
    ranks = {name: context.rank(f"{module}.{name}") for name in names}
    ways = [False, True] if any(len(spec.shape) == 3 for spec in specs.values()) else [False]
    solutions = [
        (order, transposed)
        for order, transposed in product(permutations(names), ways)
        if all(_fits(shapes[level], specs[name], transposed, ranks[name]) for level, name in enumerate(order))
    ]
    if len({order for order, _ in solutions}) == 1 and len(solutions) == 2:
        told = _told_by_bias(module, context)
        solutions = [solution for solution in solutions if told is None or solution[1] is told]
    if len(solutions) != 1:
        raise _undecided(where, specs, shapes, solutions)
    order, transposed = solutions[0]
    return [
        AdapterModule(
            context.rename(f"{module}.{name}"),
            "lora",
            LayerKind.PARAMETER,
            {role: levels[level][role] for role in ("lora_A", "lora_B")},
            ranks[name],
            context.alpha(f"{module}.{name}"),
            context.rslora,
            transposed and len(specs[name].shape) == 3,
        )
        for level, name in enumerate(order)
    ]


def _fits(shapes: tuple[tuple[int, ...], tuple[int, ...]], spec: TensorSpec, transposed: bool, rank: int) -> bool:
    """Whether factors of these shapes can belong to this parameter."""
    if len(spec.shape) not in (2, 3):
        return False
    experts = spec.shape[0] if len(spec.shape) == 3 else 1
    out, into = spec.shape[-2:]
    if transposed and len(spec.shape) == 3:
        out, into = into, out
    return shapes == ((experts * rank, into), (out, rank * experts))


def _told_by_bias(module: str, context: Context) -> bool | None:
    """Whether the module's experts store (experts, in, out), if a bias (experts, out) shows it; else None."""
    told = set()
    prefix = context.rename(f"{module}.")
    for name, spec in context.base.items():
        bias = context.base.get(f"{name}_bias")
        if name.startswith(prefix) and bias is not None and len(spec.shape) == 3 and spec.shape[1] != spec.shape[2]:
            told |= {spec.shape[0::2] == bias.shape} if bias.shape in (spec.shape[0::2], spec.shape[:2]) else set()
    return told.pop() if len(told) == 1 else None


def _undecided(
    where: str,
    specs: Mapping[str, TensorSpec],
    shapes: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]],
    solutions: list[tuple[tuple[str, ...], bool]],
) -> AdapterFormatError:
    expected = ", ".join(f"{name} {shape_text(spec.shape)}" for name, spec in specs.items())
    found = "; ".join(f"lora_A {shape_text(a)}, lora_B {shape_text(b)}" for a, b in shapes.values())
    if not solutions:
        return AdapterFormatError(
            "the factors fit none of the parameters that the config targets",
            where=where,
            expected=f"{expected}, with the config's rank",
            found=found,
            then="check that the adapter was made for this base",
        )
    if len({order for order, _ in solutions}) > 1:
        return AdapterFormatError(
            "these parameters have the same shape, and the file does not say which factors belong to which",
            where=where,
            found=expected,
            then="merge this adapter with peft, which knows their order from the model",
        )
    return AdapterFormatError(
        "these experts are square, and the file does not say which side is their input",
        where=where,
        found=expected,
        then="merge this adapter with peft, which knows it from the model",
    )
