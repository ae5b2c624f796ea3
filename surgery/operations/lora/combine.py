"""combine: several LoRA adapters into one, exactly or at a rank of choice, without a base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.spec import DType
from surgery.errors import NothingToDo, NotMergeable, SurgeryError, Unsupported
from surgery.linalg.mixing import DENSE, check_density
from surgery.model.stored_dtype import dtype_named
from surgery.operations.extract.plan import Extraction
from surgery.operations.lora.open import open_loras
from surgery.operations.lora.ops import WAYS, Mix, RecastModule, Slot
from surgery.operations.lora.plan import Casting, plan_recast, ranks_within, widest_of
from surgery.operations.lora.write import destination, write_recast
from surgery.operations.merge.adapters import AdapterPaths, adapter_paths
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import Plan
from surgery.ranks import RankRule
from surgery.ranks.budget import Budget
from surgery.report import Report, Stopwatch, peak_rss

DENSITY = 0.5  # of the deltas that are pruned


@dataclass(frozen=True, kw_only=True)
class CombineReport(Report):
    """What combine did.

    Attributes:
        how: the deltas were put together.
        rule: how ranks were chosen, in words; None where all were kept.
        adapters: content digest of every adapter, its scalings included, in the order of their addition.
        modules: every weight's new factors.
        energy, residual: over all of them: the share of Σ‖ΔW‖² they hold, and the relative error. ΔW is what the
            deltas come to once they are put together.
        nbytes_before, nbytes: of the weights' files, before and after.
    """

    how: str
    rule: str | None
    adapters: tuple[str, ...]
    modules: tuple[RecastModule, ...]
    energy: float
    residual: float
    nbytes_before: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How to combine: see `combine`, whose arguments these are."""

    how: str
    rank: int | RankRule | Budget | None = None
    overrides: Mapping[str, int] | None = None
    density: float | None = None
    seed: int = 0
    dtype: str | None = None

    def check(self) -> None:
        """Raises SurgeryError for arguments that do not go together."""
        if self.how not in WAYS:
            raise SurgeryError("no such way to combine", expected=", ".join(WAYS), found=self.how, then="--how svd")
        if self.density is not None:
            if self.how not in DENSE:
                raise SurgeryError(
                    f"{self.how} keeps every element", found="--density", then="--density goes with " + ", ".join(DENSE)
                )
            check_density(self.density)
        if self.how == "cat" and (self.rank is not None or self.overrides):
            raise SurgeryError(
                "cat keeps all ranks: they add up", found="a rule for the rank", then="--how svd for another rank"
            )
        if self.how != "cat" and self.rank is None:
            raise SurgeryError(
                f"{self.how} needs a rank",
                expected="one of --rank, --energy, --residual, --sv-ratio, --sv-threshold, --sv-quantile, --budget",
            )
        _ = dtype_named(self.dtype)

    @property
    def mix(self) -> Mix:
        """How deltas are put together."""
        return Mix(self.how, DENSITY if self.density is None else self.density, self.seed)

    @property
    def ranks(self) -> Extraction | None:
        """How ranks are chosen; None where all are kept."""
        if self.rank is None:
            return None
        return Extraction(rank=self.rank, overrides=self.overrides or {}, dtype=self.dtype, seed=self.seed)

    def dtypes(self, casting: Casting) -> dict[str, DType]:
        """Of every weight's factors."""
        stored = dtype_named(self.dtype)
        return {slot.name: stored or self._own(slot) for slot in casting.slots}

    def _own(self, slot: Slot) -> DType:
        """That of the factors; a concatenation that it would round is float32 instead."""
        own = widest_of(ref.spec.dtype for source in slot.sources for ref in source.factors)
        exact = all(_holds(own, source.scale) for source in slot.sources)
        return own if self.how != "cat" or exact else widest_of((own, DType.F32))


def combine(
    adapters: AdapterPaths,
    out: str | Path,
    *,
    how: str,
    rank: int | RankRule | Budget | None = None,
    overrides: Mapping[str, int] | None = None,
    density: float | None = None,
    seed: int = 0,
    base: str | Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> CombineReport:
    """Writes several LoRA adapters as one. Their order does not show in the result.

    Args:
        adapters: LoRA in peft's names, paths or (path, weight), at least two.
        out: a folder, or a `.safetensors`/`.st` file.
        how: "cat" concatenates the factors: exact, and the ranks add up. "svd" is the same sum at another rank.
            "ties" (arXiv 2306.01708) trims each delta to its largest elements and averages those that agree with the
            elected sign; "dare" (arXiv 2311.03099) drops elements at random and rescales the others;
            "magnitude-prune" sums the trimmed deltas: each weight by weight, at the given rank.
        rank: of the factors, a rule of `surgery.ranks`, or a `Budget` for all; needed but for "cat", which has none.
        overrides: pattern → rank, for the weights it matches; the last that matches wins.
        density: the share of elements that ties, dare and magnitude-prune keep; 0.5 by default.
        seed: of dare, and of the random start of the SVD of a formed delta.
        base: the base, where the factors do not tell what they adapt: stacks of experts, trainable tokens.
        dtype: of the factors, "float32", "float16" or "bfloat16"; by default the adapters' own, of cat float32 where
            theirs would round.
        force: replace what stands at `out`.
        resources: threads, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; everything the headers tell is refused before any work.
    """
    watch = Stopwatch(loading="torch")
    asked = Combination(how=how, rank=rank, overrides=overrides, density=density, seed=seed, dtype=dtype)
    casting = open_combine(adapters, asked, base)
    target = destination(out, [path for path, _ in adapter_paths(adapters)], force=force)
    target.check()
    ranks, chosen = None, asked.ranks
    if chosen is not None and isinstance(rank, Budget):
        dtypes = asked.dtypes(casting)
        ranks = ranks_within(
            casting, asked.mix, chosen, dtypes, rank, as_file=not target.is_folder, resources=resources
        )
    plan = plan_combine(casting, asked, ranks)
    written = write_recast(plan, casting, target, resources)
    return CombineReport(
        operation="combine",
        output=str(out),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        notes=plan.notes,
        how=how,
        rule=None if chosen is None else str(rank if isinstance(rank, Budget) else chosen.rule),
        adapters=tuple(each.digest for each in casting.adapters),
        **vars(written),
    )


def open_combine(adapters: AdapterPaths, asked: Combination, base: str | Path | None) -> Casting:
    """The adapters' weights. Raises as `combine`."""
    asked.check()
    paths = adapter_paths(adapters)
    for path, weight in paths:
        if weight == 0:
            raise NothingToDo("an adapter with weight 0 adds nothing", where=path, then="leave it out")
    if len(paths) < 2:
        raise NothingToDo(
            "one adapter is no combination",
            where=", ".join(str(path) for path, _ in paths),
            expected="at least two adapters",
            then="surgery resize gives one another rank",
        )
    opened = open_loras(adapters, base)
    for each in opened:
        if any(module.method == "dora" for module in each.adapter.modules):
            raise NotMergeable(
                "a DoRA sets each output's length, so it has no delta that could be added to another's",
                where=each.adapter.ref.path,
                then="merge it into the base first, and extract the others' sum from there",
            )
        if sum(bool(other.adapter.config.get("trainable_token_indices")) for other in opened) > 1:
            raise Unsupported("more than one of the adapters replaces tokens", where=each.adapter.ref.path)
    casting = Casting.of(opened)
    if asked.ranks is not None:
        asked.ranks.overridden(slot.name for slot in casting.slots)
    return casting


def plan_combine(casting: Casting, asked: Combination, budgeted: Mapping[str, int] | None = None) -> Plan:
    """The plan; `budgeted` has every weight's rank where a budget rules."""
    notes = []
    if casting.copied:
        notes.append(
            f"{len(casting.copied)} tensors that one adapter carries in full are taken over whatever its weight"
        )
    return plan_recast("combine", casting, asked.mix, asked.ranks, asked.dtypes(casting), budgeted, tuple(notes))


def _holds(dtype: DType, scale: float) -> bool:
    """Whether a factor times this scale is a number of the same dtype: a power of two only moves the exponent, of
    which float16 has few."""
    return abs(scale) == 1 or (dtype is not DType.F16 and math.frexp(abs(scale))[0] == 0.5)
