"""unmerge: W0 = W − ΣΔW, and what the receipt kept restored whole.

Subtraction gives the nearest stored value, not always the one that was there; the receipt's hashes tell which.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from formats.adapter import Adapter, AdapterModule
from formats.checkpoint import Checkpoint
from formats.paths import create_checkpoint, destination_like, open_checkpoint
from formats.spec import DType, TensorSpec
from surgery import engine
from surgery.checks import check_finite
from surgery.engine import Resources
from surgery.errors import NotMerged
from surgery.methods import check_modules, transforming
from surgery.operations.merge import Copy, apply_modules, output_digest, output_hashes
from surgery.operations.model_names import open_adapter_of
from surgery.plan import Fate, Outcome, Plan, Step, ledger
from surgery.provenance import Original, Receipt, fingerprint, tensor_hash
from surgery.report import Report, Stopwatch, peak_rss

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class UnmergeReport(Report):
    """What unmerge did.

    Attributes:
        digest: content address of the output's tensors; the base's own if bit_exact.
        bit_exact: whether every tensor has the hash that the receipt recorded of the base; None without a receipt.
        differing: tensors that have not.
    """

    digest: str
    bit_exact: bool | None
    differing: tuple[str, ...]


def unmerge(
    merged: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    weight: float | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> UnmergeReport:
    """Writes a merged model with the adapter taken off again.

    Args:
        merged: a safetensors file or a folder; the output has its shape.
        adapter: the adapter that was merged.
        out: a folder, or a `.safetensors`/`.st` file.
        weight: the factor it was merged with; by default the receipt's, or 1 without a receipt.
        force: replace what stands at `out`.
        resources: threads and memory.

    Raises:
        NotMerged: the receipt names another adapter, or the adapter replaced tensors that nothing can restore.
        SurgeryError, FormatError: see their trees.
    """
    watch = Stopwatch(loading="torch")
    with open_checkpoint(merged) as w:
        receipt = Receipt.read(w.metadata, merged)
        delta = open_adapter_of(merged, adapter, w.specs)
        plan = plan_unmerge(w, delta, receipt, weight=weight)
        destination = destination_like(merged, out, plan.outputs, inputs=(merged, adapter), force=force)
        with create_checkpoint(destination, plan.outputs, plan.metadata) as writer:
            outcomes = engine.run(plan, writer, resources)
    hashes = output_hashes(outcomes)
    expected = receipt.base_tensors if receipt else {}
    differing = tuple(name for name, known in expected.items() if hashes.get(name) != known)
    return UnmergeReport(
        operation="unmerge",
        output=str(out),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger=ledger(outcomes),
        notes=plan.notes,
        digest=output_digest(plan, outcomes),
        bit_exact=not differing if receipt else None,
        differing=differing,
    )


def plan_unmerge(merged: Checkpoint, adapter: Adapter, receipt: Receipt | None, *, weight: float | None = None) -> Plan:
    """Pairs every tensor with what is taken off it.

    Raises:
        NotMerged: the receipt names another adapter, or tensors were replaced and not kept.
    """
    digest, _ = fingerprint(adapter)
    if receipt is not None and receipt.adapter != digest:
        raise NotMerged(
            "the last merge into this file was of another adapter",
            where=merged.ref.path,
            expected=f"adapter {receipt.adapter[:16]}",
            found=f"adapter {digest[:16]}",
            then="take adapters off in the reverse order of their merging",
        )
    if receipt is not None and weight is not None and weight != receipt.weight:
        raise NotMerged("the receipt records another weight", expected=receipt.weight, found=weight)
    factor = receipt.weight if receipt else 1.0 if weight is None else weight
    by_target: dict[str, list[AdapterModule]] = {}
    for module in adapter.modules:
        if (method := transforming(module)) and method.forgets:
            raise NotMerged(
                f"{module.method} cannot be taken off: {method.forgets}",
                where=module.target,
                then="go back to the base itself",
            )
        by_target.setdefault(module.target, []).append(module)
    for target, modules in by_target.items():
        check_modules(modules, merged.specs[target], factor)
    originals = receipt.originals if receipt else {}
    replaced = {full.target for full in adapter.replacements if full.target not in by_target}
    added = set(receipt.added) if receipt else set()
    beyond = sorted((replaced - set(originals) - added) | set(receipt.lost if receipt else ()))
    if beyond:
        raise NotMerged(
            f"{len(beyond)} tensors were replaced by the adapter, and what they replaced is not in this file",
            where=merged.ref.path,
            found=", ".join(beyond[:5]),
            then="go back to the base itself" + ("" if receipt else "; this file has no receipt"),
        )
    steps = []
    for name, spec in merged.specs.items():
        if name in added:
            steps.append(Step(name, (), (), Drop(name)))
        elif name in originals:
            steps.append(Step(name, (), (originals[name].spec(name),), Restore(name, originals[name])))
        elif name in by_target:
            steps.append(_subtract_step(merged, spec, tuple(by_target[name]), -factor))
        else:
            steps.append(Step(name, (merged.tensor(name),), (spec,), Copy(name)))
    notes = () if receipt else ("no receipt in this file: nothing tells whether the base came back bit for bit",)
    metadata = receipt.base_metadata if receipt else merged.metadata
    return Plan("unmerge", tuple(steps), dict(metadata), notes)


def _subtract_step(merged: Checkpoint, spec: TensorSpec, modules: tuple[AdapterModule, ...], weight: float) -> Step:
    factors = [ref for module in modules for _, ref in sorted(module.factors.items())]
    workspace = sum(8 * ref.spec.size for ref in factors) + (4 << 20)
    op = Subtract(spec.name, spec.dtype, modules, weight)
    return Step(spec.name, (merged.tensor(spec.name), *factors), (spec,), op, workspace)


@dataclass(frozen=True)
class Subtract:
    """W minus the deltas of its modules. Inputs: the weight, then the factors as for merge; `weight` is negative."""

    name: str
    dtype: DType
    modules: tuple[AdapterModule, ...]
    weight: float

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Subtracts, rounds once, hashes."""
        result = apply_modules(inputs[0], self.modules, inputs[1:], self.weight, self.dtype)
        check_finite(result, self.name)
        figures = {"hashes": {self.name: tensor_hash(result)}}
        return Outcome((result,), {self.name: Fate.UNMERGED}, figures)


@dataclass(frozen=True)
class Restore:
    """A tensor that was replaced, taken from the receipt."""

    name: str
    original: Original

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Decodes and hashes; there is nothing to read."""
        tensor = self.original.tensor(self.name)
        return Outcome((tensor,), {self.name: Fate.FULL}, {"hashes": {self.name: tensor_hash(tensor)}})


@dataclass(frozen=True)
class Drop:
    """A tensor that the adapter had added."""

    name: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Leaves it out."""
        return Outcome((), {self.name: Fate.REMOVED})
