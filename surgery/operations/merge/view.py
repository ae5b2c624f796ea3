"""A merged checkpoint that is never written: the steps of a merge's plan compute each tensor when it is read.

This serves callers that need merged tensors one by one, such as an export that replaces a graph's weights. Reads only
the base and the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.open_files import OpenFiles
from formats.spec import TensorSpec
from surgery.exact.survival import Surviving
from surgery.operations.merge.figures import MergeFigures
from surgery.pipeline.plan import Plan, TakesOver

if TYPE_CHECKING:
    import torch


class MergedView:
    """The outputs of a merge's plan, as named tensors.

    Attributes:
        specs: every tensor, by name.
        surviving: for every tensor with a delta that has been read, how much of the delta is stored.
    """

    def __init__(self, plan: Plan, files: OpenFiles) -> None:
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in plan.outputs}
        self.surviving: dict[str, Surviving] = {}
        self._steps = {spec.name: (step, index) for step in plan.steps for index, spec in enumerate(step.outputs)}
        self._files = files

    def read(self, name: str) -> torch.Tensor:
        """Returns the merged tensor on the CPU, with exactly the bits that merge would write."""
        step, index = self._steps[name]
        inputs = [self._files.read(ref) for ref in step.inputs]
        if isinstance(step.op, TakesOver):
            return inputs[0]
        outcome = step.op(*inputs)
        if isinstance(outcome.figures, MergeFigures):
            self.surviving |= outcome.figures.surviving
        tensor = outcome.tensors[index]
        assert tensor is not None  # merging leaves out no tensor that it declares
        return tensor
