"""Checks that a graph with a LoRA in it computes the same as the merged weights.

torch runs the model with merged weights and ONNX Runtime runs the grafted graphs, on the inputs that the model's kind
defines. This module does not know how adapters are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats.spec import DType, TensorSpec
from surgery.errors import VerificationFailed
from surgery.onnx.against_torch.model import errors_of, limit_of, sessions
from surgery.onnx.trace.architecture import checkpoint_specs
from surgery.onnx.trace.program import Arrays, Exportable, Runtime

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Case:
    """One comparison: the inputs of the grafted graphs, and the model's weights that should give the same outputs.

    Attributes:
        name: name for messages.
        factors: A and B for a graph that takes them as inputs; empty if there are none.
        merged: the adapted weights with the adapter merged in, by the checkpoint's names; empty for the base's own
            weights.
    """

    name: str
    factors: Arrays
    merged: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Agreement:
    """The result of the comparison over all cases. Fields are those of `against_torch.model.Verification`."""

    max_abs_error: float
    max_rel_error: float
    tolerance: float
    nodes_run: Mapping[str, int]


@dataclass(frozen=True)
class _Filled:
    """A Runtime that passes every graph the factors for which it has inputs."""

    runtime: Runtime
    factors: Arrays
    inputs: Mapping[str, frozenset[str]]

    def run(self, prefix: str, feed: Arrays) -> dict[str, Any]:
        """As in Runtime."""
        taken = {name: array for name, array in self.factors.items() if name in self.inputs[prefix]}
        return self.runtime.run(prefix, {**feed, **taken})

    def axes(self, prefix: str, output: str) -> tuple[int | str | None, ...]:
        """As in Runtime."""
        return self.runtime.axes(prefix, output)


def check_graft(
    model: Exportable,
    graphs: Mapping[str, bytes],
    payload: Mapping[str, int],
    dtype: DType,
    specs: Mapping[str, TensorSpec],
    case: Case,
) -> Agreement:
    """Compares one case.

    Args:
        model: the model and how it is used.
        graphs: the grafted graphs by prefix; they refer to the payload.
        payload: descriptors of the weights' files, open for reading, by the names that the graphs use.
        dtype: the dtype in which the graphs compute.
        specs: the model's tensors.
        case: the case to compare.

    Raises:
        VerificationFailed: the outputs differ by more than rounding explains.
        Unsupported: a graph does not load.
    """
    import onnx

    module = model.load(dtype)
    _put(module, case.merged, specs, model)
    inputs = {
        prefix: frozenset(value.name for value in onnx.load_model_from_string(graph).graph.input)
        for prefix, graph in graphs.items()
    }
    with sessions(model, graphs, payload) as runtime:
        found = errors_of(model, module, _Filled(runtime, case.factors, inputs), 0)
        nodes = runtime.nodes_run()
    limit = limit_of(dtype, graphs)
    if not found.relative <= limit:
        raise VerificationFailed(
            "the graph's outputs differ from those of the merged weights; nothing was written",
            where=f"{model.where}, {case.name}: {found.worst}",
            expected=f"a relative difference of at most {limit:.2g}",
            found=f"{found.relative:.2g} (absolute {found.largest:.2g})",
            then="merge the adapter instead, and please report the model's class and the adapter's config",
        )
    return Agreement(found.largest, found.relative, limit, nodes)


def _put(module: Any, merged: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], model: Exportable) -> None:
    """Copies the merged weights into the module."""
    state = module.state_dict(keep_vars=True)
    for name, spec in checkpoint_specs(module, specs, model.where).items() if merged else ():
        if spec.name in merged:
            state[name].data.copy_(merged[spec.name])


def worst(found: Sequence[Agreement]) -> Agreement:
    """Combines the results of all cases: the largest errors."""
    return Agreement(
        max(each.max_abs_error for each in found),
        max(each.max_rel_error for each in found),
        found[0].tolerance,
        found[0].nodes_run,
    )
