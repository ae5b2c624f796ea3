"""verify: checks whether a file holds exactly the merge of these adapters into this base. It repeats the merge tensor
by tensor and compares; nothing is written.

A file that peft merged cannot agree bit for bit: peft rounds the delta to the stored dtype and then the sum, while
merge rounds once. In a file without a receipt that difference is accepted, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from formats.adapter import NOTHING_TOLD, Told
from formats.checkpoint import Checkpoint
from formats.open_files import OpenFiles
from formats.spec import DType, TensorSpec
from surgery.hashes import tensor_hash
from surgery.methods import transforming
from surgery.model.base_model import BaseModel
from surgery.model.stored_dtype import dtype_in
from surgery.operations.merge.adapters import AdapterPaths, adapter_files, adapter_paths, open_for_merge
from surgery.operations.merge.figures import Compared
from surgery.operations.merge.ops import Merge
from surgery.operations.merge.plan import plan_merge
from surgery.operations.merge.rows import MergeRows
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.pipeline.plan import Op, Outcome, Plan, Step, TakesOver
from surgery.receipts.receipt import RECEIPT, Receipt
from surgery.report import Report, Stopwatch

if TYPE_CHECKING:
    import torch

EXACT, ROUNDING, DIFFERS = "exact", "within PEFT's rounding", "differs"
# Largest error of peft's float32 sum over the rank, relative to the largest entry of the delta.
_SUM_ERROR = 2.0**-20
_ALONG = 0.25  # how far a whole tensor may be off, as a fraction of the way from base to merge
_DORA_UNITS = 4.0  # peft computes norm, ratio and product in the stored dtype, each rounded


@dataclass(frozen=True, kw_only=True)
class VerifyReport(Report):
    """Whether a file is the merge in question. The ledger counts tensors by how they compare.

    Attributes:
        merged: the file that was checked.
        verdict: "exact"; "within PEFT's rounding"; or "differs".
        rounded: tensors that differ by no more than peft's rounding.
        differing: tensors that differ by more, are missing or are unexpected, in the base's order.
    """

    merged: str
    verdict: str
    rounded: tuple[str, ...]
    differing: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether the file is the merge, exactly or within peft's rounding."""
        return self.verdict != DIFFERS


def prepare_verify(
    merged: str | Path,
    base: str | Path,
    adapters: AdapterPaths,
    *,
    weight: float = 1.0,
    told: Told = NOTHING_TOLD,
    resources: Resources | None = None,
) -> Job[VerifyReport]:
    """Prepares a job that repeats a merge in memory and compares a file with it.

    Args:
        merged: the file or folder to check.
        base: the base into which it should have been merged.
        adapters: as for merge.
        weight: a factor of every delta.
        told: as for merge.
        resources: workers, memory and device.

    Raises:
        SurgeryError, FormatError: as for merge; a file that holds another merge is not an error but a verdict.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    w0, w = BaseModel.open(base, files), files.checkpoint(merged)
    more = w.specs.keys() - w0.specs.keys()
    untie = bool(more) and not more.isdisjoint(w0.tied_head())
    receipt = Receipt.read(w.metadata, merged)
    stored = dtype_in(w, w0.checkpoint) if receipt is None else DType[receipt.dtype] if receipt.dtype else None
    plan, _ = plan_merge(
        w0, *open_for_merge(w0, adapter_files(adapters, files), weight, told, untie=untie), stored=stored
    )
    replay, odd = plan_verify(plan, w)

    def finish(done: Done) -> Callable[[Header], VerifyReport]:
        verdicts: dict[str, str] = dict.fromkeys(odd, DIFFERS)
        for outcome in done.outcomes:
            verdicts |= outcome.figures.verdicts
        names = [spec.name for spec in plan.outputs]
        names += sorted(set(odd) - set(names))
        found = {kind: tuple(name for name in names if verdicts[name] == kind) for kind in (EXACT, ROUNDING, DIFFERS)}
        return lambda header: VerifyReport(
            **{**header, "ledger": {kind: len(tensors) for kind, tensors in found.items()}},
            merged=str(merged),
            verdict=next(kind for kind in (DIFFERS, ROUNDING, EXACT) if found[kind] or kind == EXACT),
            rounded=found[ROUNDING],
            differing=found[DIFFERS],
        )

    inputs = (merged, base, *(path for path, _ in adapter_paths(adapters)))
    return step_by_step(replay, files=files, watch=watch, inputs=inputs, finish=finish, resources=resources)


verify = runs(prepare_verify)


def plan_verify(plan: Plan, merged: Checkpoint) -> tuple[Plan, tuple[str, ...]]:
    """Turns a merge's plan into one that compares outputs instead of writing them; also returns the names whose specs
    already differ."""
    tolerant = RECEIPT not in merged.metadata
    steps = []
    odd = [name for name in merged.specs if name not in {spec.name for spec in plan.outputs}]
    for step in plan.steps:
        unlike = [spec.name for spec in step.outputs if merged.specs.get(spec.name) != spec]
        if unlike:
            odd += [spec.name for spec in step.outputs]
            continue
        if not step.outputs:
            continue
        inputs = (*step.inputs, *(merged.tensor(spec.name) for spec in step.outputs))
        if isinstance(step.op, TakesOver):
            steps.append(Step(step.name, inputs, (), Same(step.outputs[0].name)))
            continue
        workspace = step.workspace + sum(spec.nbytes + (40 * spec.size if tolerant else 0) for spec in step.outputs)
        steps.append(Step(step.name, inputs, (), Replay(step.op, step.outputs, tolerant), workspace))
    return replace(plan, operation="verify", steps=tuple(steps)), tuple(odd)


@dataclass(frozen=True)
class Same:
    """Compares a tensor that merging copies unchanged. Inputs: the source tensor, then the tensor to check."""

    name: str

    def unchanged(self) -> Outcome:
        """The outcome for equal bytes."""
        return Outcome((), {}, Compared({self.name: EXACT}))

    def __call__(self, *_: torch.Tensor) -> Outcome:
        """The outcome for different bytes."""
        return Outcome((), {}, Compared({self.name: DIFFERS}))


@dataclass(frozen=True)
class Replay:
    """Runs a merge's op and compares. Inputs: those of the op, then the tensors to check."""

    op: Op
    specs: tuple[TensorSpec, ...]
    tolerant: bool

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Equal bytes are exact; differences are measured where rounding is tolerated."""
        own, found = inputs[: -len(self.specs)], inputs[-len(self.specs) :]
        verdicts = {}
        for spec, ours, theirs in zip(self.specs, self.op(*own).tensors, found, strict=True):
            assert ours is not None  # merging writes everything it declares
            verdict = EXACT if tensor_hash(ours) == tensor_hash(theirs) else DIFFERS
            if verdict is DIFFERS and self.tolerant and isinstance(self.op, (Merge, MergeRows)) and self.op.modules:
                units = _DORA_UNITS if any(transforming(module) for module, _ in self.op.modules) else 1.0
                verdict = ROUNDING if is_within_rounding(theirs, ours, own[0], units) else DIFFERS
            verdicts[spec.name] = verdict
        return Outcome((), {}, Compared(verdicts))


def is_within_rounding(found: torch.Tensor, ours: torch.Tensor, base: torch.Tensor, units: float = 1.0) -> bool:
    """Whether peft could have written this tensor for the same merge.

    peft rounds the product, its scaling and the sum to the stored dtype. This moves an element by at most one unit in
    the last place of the result and two of the delta. It also sums the product in float32. If deltas are as small as
    a unit, this bound alone would accept the base itself or another adapter's merge. So the tensor as a whole must
    also have moved along the delta as far as the merge does, to within a quarter.

    Args:
        found, ours, base: tensors of the same shape and floating dtype; ours is rounded once.
        units: tolerated units in the last place of the result.
    """
    import torch

    if base.shape != ours.shape or not ours.is_floating_point():
        return False
    exact, start = ours.to(torch.float64), base.to(torch.float64)
    delta = exact - start
    moved = float(((found.to(torch.float64) - start) * delta).sum())
    goal = float(delta.square().sum())
    if abs(moved - goal) > _ALONG * goal:
        return False
    delta.abs_()
    eps = torch.finfo(ours.dtype).eps
    allowed = exact.abs().mul_(units).add_(delta, alpha=2).mul_(eps)
    allowed += _SUM_ERROR * delta.max() + torch.finfo(ours.dtype).smallest_normal * eps
    return bool(((found.to(torch.float64) - exact).abs_() <= allowed).all())
