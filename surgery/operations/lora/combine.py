"""combine: several LoRA adapters into one, exactly or at a rank of choice, without a base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.open_files import OpenFiles
from formats.spec import DType
from surgery.errors import NothingToDo, NotMergeable, SurgeryError, Unsupported
from surgery.linalg.mixing import DENSE, check_density
from surgery.model.base_model import BaseModel
from surgery.model.stored_dtype import dtype_named
from surgery.operations.lora.open import open_loras
from surgery.operations.lora.ops import WAYS, AdaptedWeight, Mix, RecastModule
from surgery.operations.lora.plan import Casting, widest_of
from surgery.operations.lora.write import Fields, destination, recast_job
from surgery.operations.merge.adapters import AdapterPaths, WeighedAdapter, adapter_files, adapter_paths
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Header, Job, runs
from surgery.ranks import RankRule
from surgery.ranks.budget import Budget
from surgery.ranks.choice import RankChoice
from surgery.report import Report, Stopwatch

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
    def ranks(self) -> RankChoice | None:
        """How ranks are chosen; None where all are kept."""
        return None if self.rank is None else RankChoice(self.rank, self.overrides or {}, self.dtype, self.seed)

    def dtypes(self, casting: Casting) -> dict[str, DType]:
        """Of every weight's factors."""
        stored = dtype_named(self.dtype)
        return {slot.name: stored or self._own(slot) for slot in casting.slots}

    def _own(self, slot: AdaptedWeight) -> DType:
        """That of the factors; a concatenation that it would round is float32 instead."""
        own = widest_of(ref.spec.dtype for source in slot.sources for ref in source.factors)
        exact = all(_holds(own, source.scale) for source in slot.sources)
        return own if self.how != "cat" or exact else widest_of((own, DType.F32))


def prepare_combine(
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
) -> Job[CombineReport]:
    """Prepares a job that writes several LoRA adapters as one. Their order does not show in the result.

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
        resources: workers, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; everything the headers tell is refused before any work.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    asked = Combination(how=how, rank=rank, overrides=overrides, density=density, seed=seed, dtype=dtype)
    asked.check()
    paths = adapter_paths(adapters)
    _check_number(paths)
    model = None if base is None else BaseModel.open(base, files)
    casting = _opened(open_loras(adapter_files(adapters, files), model), files)
    target = destination(out, [path for path, _ in paths], base, force=force, files=files)
    ranks = asked.ranks

    def report(header: Header, made: Fields) -> CombineReport:
        digests = tuple(each.digest for each in casting.adapters)
        return CombineReport(**header, **made, how=how, rule=None if ranks is None else str(ranks), adapters=digests)

    return recast_job(
        "combine",
        casting,
        target,
        report,
        mix=asked.mix,
        ranks=ranks,
        dtypes=asked.dtypes(casting),
        notes=_notes(casting),
        files=files,
        watch=watch,
        resources=resources,
    )


combine = runs(prepare_combine)


def _check_number(paths: Sequence[tuple[Path, float | None]]) -> None:
    """Raises NothingToDo for what is no combination."""
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


def _opened(adapters: tuple[WeighedAdapter, ...], files: OpenFiles) -> Casting:
    """The adapters' weights. Raises NotMergeable, or Unsupported, for what cannot be put together."""
    for each in adapters:
        if any(module.method == "dora" for module in each.adapter.modules):
            raise NotMergeable(
                "a DoRA sets each output's length, so it has no delta that could be added to another's",
                where=each.adapter.ref.path,
                then="merge it into the base first, and extract the others' sum from there",
            )
        if sum(bool(other.adapter.config.get("trainable_token_indices")) for other in adapters) > 1:
            raise Unsupported("more than one of the adapters replaces tokens", where=each.adapter.ref.path)
    return Casting.of(adapters, files)


def _notes(casting: Casting) -> tuple[str, ...]:
    count = len(casting.copied)
    note = f"{count} tensors that one adapter carries in full are taken over whatever its weight"
    return (note,) if count else ()


def _holds(dtype: DType, scale: float) -> bool:
    """Whether a factor times this scale is a number of the same dtype: a power of two only moves the exponent, of
    which float16 has few."""
    return abs(scale) == 1 or (dtype is not DType.F16 and math.frexp(abs(scale))[0] == 0.5)
