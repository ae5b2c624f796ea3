"""The inputs and outputs of one graph, and how a module is called for it.

A module's signature differs from a graph's: caches are objects, masks are optional, an encoder–decoder is two graphs. A
Program is flat: named tensors in, named tensors out. Knows nothing of ONNX, files and weights.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from formats.spec import DType

FLOAT = "float"  # for inputs that have the model's dtype
Call = Callable[[Any, Mapping[str, Any]], dict[str, Any]]  # module, inputs by name → outputs by name, in order
Arrays = Mapping[str, Any]  # name → numpy array
# Sizes while tracing: not 0 or 1, which torch.export treats as constants, and all different, since it merges equal ones
_SIZES = {"batch": 2, "sequence": 8, "past_sequence": 5, "total_sequence": 13, "encoder_sequence": 7}
_OTHER_SIZES = (16, 11, 17, 19, 23, 29)


@dataclass(frozen=True)
class Input:
    """One input: its name, torch's name of its dtype (or FLOAT), and its axes; an axis that varies is a name."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    @property
    def parameter(self) -> str:
        """Its name as a Python parameter while tracing."""
        return self.name.replace(".", "__")


@dataclass(frozen=True)
class Program:
    """One graph of a model.

    Attributes:
        prefix: prefix of the file name; empty if the model has one graph.
        inputs: the inputs, in the graph's order.
        call: runs the module on tensors.
    """

    prefix: str
    inputs: tuple[Input, ...]
    call: Call

    def sizes(self) -> dict[str, int]:
        """For tracing, a size for every axis that varies."""
        names = dict.fromkeys(axis for each in self.inputs for axis in each.axes if isinstance(axis, str))
        others = iter(_OTHER_SIZES)
        return {name: _SIZES.get(name) or next(others) for name in names}


@dataclass(frozen=True)
class OutputComparison:
    """One output of one run, from torch and from the graph.

    Attributes:
        output: name of the output.
        shape: shape of the run's first input.
        reference, found: the arrays from torch and from the graph; if their shapes differ, the graph is wrong.
        valid: bool array over their first axes that selects the entries to compare; None for all.
    """

    output: str
    shape: tuple[int, ...]
    reference: Any
    found: Any
    valid: Any = None


class Runtime(Protocol):
    """Graphs that can be run."""

    def run(self, prefix: str, feed: Arrays) -> dict[str, Any]:
        """The outputs of the graph with that prefix, by name; floating-point inputs are cast to the graph's dtype."""

    def axes(self, prefix: str, output: str) -> tuple[int | str | None, ...]:
        """An output's axes as the graph declares them."""


class ModelKind(Protocol):
    """A way of using a model: its graphs, and how to compare them with torch."""

    @property
    def programs(self) -> tuple[Program, ...]:
        """The graphs."""

    def compare(self, module: Any, runtime: Runtime, seed: int) -> Iterator[OutputComparison]:
        """Runs both on the same random inputs: several shapes, with padding, and several steps where there is a cache.

        Args:
            module: the torch module with its weights.
            runtime: the graphs with their weights.
            seed: seed of the inputs.
        """


class Exportable(Protocol):
    """A model that can be built without weights, and loaded with them."""

    @property
    def where(self) -> Path:
        """The folder or file it comes from, for messages."""

    @property
    def name(self) -> str:
        """Its class, or the function that makes it."""

    @property
    def kind(self) -> ModelKind:
        """How it is used."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that the graph depends on besides names, dtypes and shapes; stored in the graph as JSON."""

    def build(self, dtype: DType) -> Any:
        """The torch module, with parameters allocated but never written: untouched pages cost no memory."""

    def load(self, dtype: DType) -> Any:
        """The torch module with its weights, loaded by the model's own library if it has one."""


@contextlib.contextmanager
def called(module: Any, program: Program) -> Iterator[None]:
    """Gives the module the program's signature during tracing, because a wrapper module would rename every weight."""

    own = module.forward

    def forward(**given: Any) -> dict[str, Any]:
        module.forward = own  # which the program calls
        try:
            return program.call(module, {each.name: given[each.parameter] for each in program.inputs})
        finally:
            module.forward = forward

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(each.parameter, kind) for each in program.inputs]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    module.forward = forward
    try:
        yield
    finally:
        module.forward = own


def tensors_of(output: Any) -> dict[str, Any]:
    """The tensors among a module's outputs, by field name, or by number if the fields have no names."""
    import torch

    if isinstance(output, torch.Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        pairs = list(output.items())
    else:
        pairs = [(f"output_{index}", each) for index, each in enumerate(output)]
    return {str(name): each for name, each in pairs if isinstance(each, torch.Tensor)}


def example(program: Program, dtype: DType) -> dict[str, Any]:
    """Tensors of ones to trace with, by parameter; floating-point ones in the model's dtype."""
    import torch

    from formats.tensors import torch_dtype

    sizes = program.sizes()
    return {
        each.parameter: torch.ones(
            [axis if isinstance(axis, int) else sizes[axis] for axis in each.axes],
            dtype=torch_dtype(dtype) if each.dtype == FLOAT else getattr(torch, each.dtype),
        )
        for each in program.inputs
    }


def as_tensors(feed: Arrays, module: Any) -> dict[str, Any]:
    """Arrays as tensors, floating-point ones in the module's dtype."""
    import torch

    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}


def as_arrays(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as arrays."""
    return {name: each.float().numpy() if each.is_floating_point() else each.numpy() for name, each in outputs.items()}
