"""extract: tuned − base, as low-rank factors where that is possible and in full where it is not.

The plan pairs the tensors of both files, module by module; what changed is known only once they are read, so the
config is written last. Knows no file's bytes and no printing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.checkpoint import Checkpoint
from formats.dialects import CONFIG_KEY
from formats.dialects.peft_writing import Extracted, factor_keys, full_key, lora_config
from formats.errors import ShapeMismatch, UnsupportedDType
from formats.layers import LayerKind, layer_kinds, owner
from formats.paths import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Destination,
    create_checkpoint,
    open_checkpoint,
)
from formats.spec import DType, TensorSpec, shape_text
from surgery import engine
from surgery.engine import Resources
from surgery.errors import NothingToDo, SurgeryError
from surgery.linalg import workspace
from surgery.operations.carry import Factorise, KeepWhole, LeaveBehind, ModuleReport
from surgery.plan import Fate, Outcome, Plan, Step, ledger
from surgery.provenance import TOOL
from surgery.report import Report, Stopwatch, peak_rss


@dataclass(frozen=True, kw_only=True)
class ExtractReport(Report):
    """What extract did. `rank` is the one asked for; `energy` and `residual` are over all factored weights."""

    rank: int
    modules: tuple[ModuleReport, ...]
    energy: float
    residual: float


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    rank: int,
    dtype: str | None = None,
    allow_removed: bool = False,
    force: bool = False,
    seed: int = 0,
    resources: Resources | None = None,
) -> ExtractReport:
    """Writes tuned − base as a PEFT adapter: LoRA factors for changed matrices, the rest of the change in full.

    Args:
        base, tuned: a safetensors file or a folder each.
        out: a folder, or a `.safetensors`/`.st` file; by default a folder named after tuned.
        rank: of the factors; clamped to a matrix's smaller side.
        dtype: of the factors, "float32", "float16" or "bfloat16"; by default each tuned weight's own.
        allow_removed: accept that tensors of base which tuned lacks cannot be taken away by an adapter.
        force: replace what stands at `out`.
        seed: of the random start of the SVD.
        resources: threads and memory.

    Raises:
        SurgeryError, FormatError: see their trees; everything the headers tell is refused before any payload is read.
    """
    watch = Stopwatch(loading="torch")
    target = Path(out) if out is not None else default_output(tuned, rank)
    with open_checkpoint(base) as before, open_checkpoint(tuned) as after:
        plan = plan_extract(
            before, after, rank=rank, dtype=dtype, allow_removed=allow_removed, seed=seed, config=model_config(base)
        )
        destination = Destination(target, weights=ADAPTER_WEIGHTS, inputs=(Path(base), Path(tuned)), force=force)
        metadata = {"format": "pt", "surgery": f"{TOOL} extract"}
        with create_checkpoint(destination, plan.outputs, metadata) as writer:
            outcomes = engine.run(plan, writer, resources)
            _check_anything(outcomes, base, tuned)
            extracted = _describe(plan, outcomes, after, rank, str(base))
            config = json.dumps(lora_config(extracted), indent=2)
            if destination.is_folder:
                writer.attach(ADAPTER_CONFIG, config.encode() + b"\n")
            else:
                writer.seal({**metadata, CONFIG_KEY: config})
    modules = tuple(outcome.figures["module"] for outcome in outcomes if "module" in outcome.figures)
    changed = sum(module.delta_norm**2 for module in modules)
    left_out = sum((module.delta_norm * module.residual) ** 2 for module in modules)
    return ExtractReport(
        operation="extract",
        output=str(target),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger=ledger(outcomes),
        notes=plan.notes,
        rank=rank,
        modules=modules,
        energy=1.0 - left_out / changed if changed else 1.0,
        residual=(left_out / changed) ** 0.5 if changed else 0.0,
    )


def default_output(tuned: str | Path, rank: int) -> Path:
    """Where extract writes if it is not told: a folder named after tuned, in the working directory."""
    path = Path(tuned).absolute()
    return Path(f"{path.name if path.is_dir() else path.stem}-lora-r{rank}")


def plan_extract(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int,
    dtype: str | None = None,
    allow_removed: bool = False,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """Pairs the tensors of both files and decides how each would be carried.

    `config` is the model's config.json; it tells whether an embedding is also the head.

    Raises:
        SurgeryError: a rank below 1.
        ShapeMismatch: tensors of one name and different shapes, all of them listed.
        NothingToDo: no names in common.
    """
    if rank < 1:
        raise SurgeryError("the rank must be at least 1", found=rank, then="choose it with --rank")
    factor_dtype = _factor_dtype(dtype)
    removed = _check_pairs(base, tuned, allow_removed)
    kinds = layer_kinds(tuned.specs)
    saved = _saved_modules(base, tuned, kinds)
    modules: dict[str, list[str]] = {}
    for name in tuned.specs:
        modules.setdefault(owner(name), []).append(name)
    steps: list[Step] = []
    clamped = 0
    tied: list[str] = []
    for module, names in modules.items():
        weight = f"{module}.weight"
        kind = kinds.get(module)
        if kind is LayerKind.EMBEDDING and _is_tied(module, tuned, config or {}):
            tied.append(module)
            kind = None
        if kind and weight in base.specs and _is_weight(base, tuned, weight):
            steps.append(_factor_step(base, tuned, module, names, kind, rank, factor_dtype, seed))
            clamped += min(tuned.specs[weight].shape) < rank
        elif module in saved:
            steps.append(_whole_step(base, tuned, module, names, together=True))
        else:
            steps += [_whole_step(base, tuned, name, [name], together=False) for name in names]
    if removed:
        steps.append(Step("removed from tuned", (), (), LeaveBehind(removed)))
    notes = [
        f"{module} is also the head: carried in full if it changed, since peft, which merges the factors of tied "
        "weights twice, could not both load and merge them"
        for module in tied
    ]
    if clamped:
        notes.append(f"rank {rank} is larger than the smaller side of {clamped} matrices: clamped there")
    if removed:
        notes.append(f"{len(removed)} tensors of base are not in tuned; an adapter cannot remove them")
    return Plan("extract", tuple(steps), notes=tuple(notes))


def _factor_dtype(dtype: str | None) -> DType | None:
    names = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}
    if dtype is not None and dtype not in names:
        raise UnsupportedDType("factors cannot be stored like that", expected=", ".join(names), found=dtype)
    return names[dtype] if dtype else None


def _check_pairs(base: Checkpoint, tuned: Checkpoint, allow_removed: bool) -> tuple[str, ...]:
    """Refuses what headers alone show to be wrong; returns the tensors that only base has."""
    where = f"{base.ref.path} and {tuned.ref.path}"
    common = [name for name in tuned.specs if name in base.specs]
    if not common:
        raise NothingToDo(
            "base and tuned have no tensor names in common",
            where=where,
            expected=", ".join(list(base.specs)[:2]),
            found=", ".join(list(tuned.specs)[:2]),
            then="save both from the same model class",
        )
    differing = [
        f"{name}: base {shape_text(base.specs[name].shape)}, tuned {shape_text(tuned.specs[name].shape)}"
        for name in common
        if base.specs[name].shape != tuned.specs[name].shape
    ]
    if differing:
        raise ShapeMismatch(
            f"{len(differing)} tensors differ in shape between base and tuned",
            where=where,
            found="\n            ".join(differing),
            then="base must be the very model that was tuned, with the same vocabulary",
        )
    homes = {owner(name) for name in base.specs}
    grown = [name for name in tuned.specs if name not in base.specs and owner(name) in homes]
    if grown:
        raise SurgeryError(
            "tuned has tensors in modules of base that base itself lacks; no adapter can add them",
            where=where,
            found=", ".join(grown[:5]),
        )
    removed = tuple(name for name in base.specs if name not in tuned.specs)
    if removed and not allow_removed:
        raise SurgeryError(
            f"{len(removed)} tensors of base are not in tuned, and no adapter can remove them",
            where=where,
            found=", ".join(removed[:5]),
            then="--allow-removed extracts the rest and leaves them as they are in base",
        )
    return removed


def _is_weight(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    return base.specs[name].dtype.is_weight and tuned.specs[name].dtype.is_weight


def _saved_modules(base: Checkpoint, tuned: Checkpoint, kinds: Mapping[str, LayerKind]) -> frozenset[str]:
    """Modules that peft's `modules_to_save` can carry: leaves, without factors of their own, whose name it cannot
    mistake for another's tail."""
    holders = {owner(name) for name in (*tuned.specs, *base.specs)}
    parents = {prefix for module in holders for prefix in _prefixes(module)}
    leaves = {module for module in holders if module and module not in parents}
    plain = {module for module in leaves if module not in kinds or f"{module}.weight" not in base.specs}
    # peft compares ends of names without regard to dots: `norm` would take `input_layernorm` too.
    return frozenset(
        module for module in plain if not any(other != module and other.endswith(module) for other in holders | parents)
    )


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _factor_step(
    base: Checkpoint,
    tuned: Checkpoint,
    module: str,
    names: list[str],
    kind: LayerKind,
    rank: int,
    dtype: DType | None,
    seed: int,
) -> Step:
    weight = f"{module}.weight"
    spec = tuned.specs[weight]
    rank = min(rank, *spec.shape)
    out, into = spec.shape if kind is LayerKind.LINEAR else spec.shape[::-1]
    key_a, key_b = factor_keys(module, kind)
    stored = dtype or spec.dtype
    outputs = [TensorSpec(key_a, stored, (rank, into)), TensorSpec(key_b, stored, (out, rank))]
    others = [name for name in names if name != weight]
    for name in others:
        for adapted in (True, False):
            outputs.append(_renamed(tuned.specs[name], full_key(name, adapted=adapted)))
    inputs = [checkpoint.tensor(name) for name in (weight, *others) for checkpoint in (base, tuned)]
    op = Factorise(weight, tuple(others), kind, rank, stored, seed)
    return Step(module, tuple(inputs), tuple(outputs), op, workspace=4 * spec.size + workspace(out, into, rank))


def _whole_step(base: Checkpoint, tuned: Checkpoint, label: str, names: list[str], *, together: bool) -> Step:
    known = tuple(name in base.specs for name in names)
    inputs = []
    for name, paired in zip(names, known, strict=True):
        inputs += [base.tensor(name)] if paired else []
        inputs += [tuned.tensor(name)]
    outputs = tuple(_renamed(tuned.specs[name], full_key(name, adapted=False)) for name in names)
    op = KeepWhole(tuple(names), known, label if together else None)
    return Step(label, tuple(inputs), outputs, op)


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.shape)


def _check_anything(outcomes: tuple[Outcome, ...], base: str | Path, tuned: str | Path) -> None:
    if all(fate in (Fate.IDENTICAL, Fate.REFUSED) for outcome in outcomes for fate in outcome.fates.values()):
        raise NothingToDo(
            "base and tuned are identical: there is nothing to extract",
            where=f"{base} and {tuned}",
            then="check that tuned is the model after training",
        )


def model_config(base: str | Path) -> Mapping[str, Any]:
    """The base's config.json, empty if there is none beside the weights."""
    path = Path(base) / "config.json"
    if not path.is_file():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return document if isinstance(document, dict) else {}


def _describe(
    plan: Plan,
    outcomes: tuple[Outcome, ...],
    tuned: Checkpoint,
    rank: int,
    name: str,
) -> Extracted:
    """What the adapter's config must say, from what really changed."""
    kinds = layer_kinds(tuned.specs)
    ranks = {step.name: o.figures["rank"] for step, o in zip(plan.steps, outcomes, strict=True) if "rank" in o.figures}
    adapted = {kinds[module] for module in ranks}
    full = [entry for outcome in outcomes for entry in outcome.figures.get("full", ())]
    common = max(ranks.values(), default=rank)
    modules = {prefix for entry in tuned.specs for prefix in [owner(entry), *_prefixes(owner(entry))]}
    return Extracted(
        ranks=ranks,
        saved=tuple(sorted(o.figures["saved"] for o in outcomes if o.figures.get("saved"))),
        biases=any(entry.endswith(".bias") and owner(entry) in kinds for entry in full),
        transposed=LayerKind.TRANSPOSED in adapted,
        modules=frozenset(modules),
        rank=common,
        base=name,
    )


def _is_tied(module: str, tuned: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether an embedding is also a language model's head: the config ties them and no other weight has its shape."""
    shape = tuned.specs[f"{module}.weight"].shape
    alone = not any(spec.shape == shape for name, spec in tuned.specs.items() if owner(name) != module)
    generates = re.search("LM|ConditionalGeneration", " ".join(map(str, config.get("architectures") or ())))
    vocabulary = config.get("vocab_size", shape[0]) == shape[0]
    return alone and vocabulary and generates is not None and config.get("tie_word_embeddings", True) is True
