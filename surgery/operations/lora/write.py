"""Runs a plan of new factors and writes them as a peft adapter, a folder or a single file, with its config."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from formats.destination import Destination, create_checkpoint, destination_like
from formats.dialects import CONFIG_KEY
from formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from surgery.errors import NothingToDo
from surgery.operations.lora.ops import RecastModule
from surgery.operations.lora.plan import Casting
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import Plan, ledger
from surgery.receipts.receipt import TOOL


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        ledger: how many tensors met each fate.
        modules: every weight's new factors.
        energy, residual: over all of them: the share of Σ‖ΔW‖² they hold, and the relative error.
        nbytes_before, nbytes: of the weights' files, read and written.
    """

    ledger: dict[str, int]
    modules: tuple[RecastModule, ...]
    energy: float
    residual: float
    nbytes_before: int
    nbytes: int


def destination(out: str | Path, paths: list[Path], *, force: bool) -> Destination:
    """Where to write. What lies beside a single adapter's weights comes along: a tokenizer, a model card."""
    if len(paths) == 1 and paths[0].is_dir():
        return replace(destination_like(paths[0], out, (), inputs=paths, force=force), weights=ADAPTER_WEIGHTS)
    return Destination(Path(out), weights=ADAPTER_WEIGHTS, inputs=tuple(paths), force=force)


def write_recast(plan: Plan, casting: Casting, target: Destination, resources: Resources | None) -> Written:
    """Runs the plan.

    Raises:
        NothingToDo: all that comes out is zero.
        OutputExists, WriteFailed: as `create_checkpoint`.
    """
    metadata = {"format": "pt", "surgery": f"{TOOL} {plan.operation}"}
    with create_checkpoint(target, plan.outputs, metadata, reserve=not plan.shrinks) as writer:
        outcomes = engine.run(plan, writer, resources)
        modules = tuple(outcome.figures["module"] for outcome in outcomes if "module" in outcome.figures)
        total = sum(module.delta_norm**2 for module in modules)
        if not total and not casting.copied:
            raise NothingToDo(
                "all of the new adapter is zero", where=", ".join(each.adapter.ref.path for each in casting.adapters)
            )
        config = json.dumps(casting.config({module.name: module.rank for module in modules}), indent=2)
        if target.is_folder:
            writer.attach(ADAPTER_CONFIG, config.encode() + b"\n")
        else:
            writer.seal({**metadata, CONFIG_KEY: config})
    left_out = sum((module.delta_norm * module.residual) ** 2 for module in modules)
    return Written(
        ledger=ledger(outcomes),
        modules=modules,
        energy=1.0 - left_out / total if total else 1.0,
        residual=math.sqrt(left_out / total) if total else 0.0,
        nbytes_before=sum(Path(each.adapter.ref.path).stat().st_size for each in casting.adapters),
        nbytes=(target.path / ADAPTER_WEIGHTS if target.is_folder else target.path).stat().st_size,
    )
