"""combine: turns several LoRA adapters into one, exactly or at a chosen rank, without a base."""

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

DENSITY = 0.5  # default share of elements that pruned deltas keep


@dataclass(frozen=True, kw_only=True)
class CombineReport(Report):
    """What combine did.

    Attributes:
        how: the method of combination.
        rule: how ranks were chosen, in words; None if all were kept.
        adapters: content digest of every adapter, scalings included, in the order in which they were added.
        modules: every weight's new factors.
        energy, residual: share of Σ‖ΔW‖² that all factors hold, and their relative error; ΔW is the combined delta.
        nbytes_before, nbytes: size of the weights' files before and after, in bytes.
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
    """How to combine; the fields are arguments of `combine`."""

    how: str
    rank: int | RankRule | Budget | None = None
    overrides: Mapping[str, int] | None = None
    density: float | None = None
    seed: int = 0
    dtype: str | None = None

    def check(self) -> None:
        """Raises SurgeryError for arguments that contradict each other."""
        if self.how not in WAYS:
            raise SurgeryError("no such way to combine", expected=", ".join(WAYS), found=self.how, then="--how svd")
        if self.density is not None:
            if self.how not in DENSE:
                raise SurgeryError(
                    f"{self.how} keeps every element",
                    found="--density",
                    then="leave it out; it needs --how " + " or ".join(DENSE),
                )
            check_density(self.density)
        if self.how == "cat" and (self.rank is not None or self.overrides):
            raise SurgeryError(
                "cat keeps all ranks: they add up", found="a rule for the rank", then="--how svd gives another rank"
            )
        if self.how != "cat" and self.rank is None:
            raise SurgeryError(
                f"{self.how} needs a rank",
                expected="one of --rank, --energy, --residual, --sv-ratio, --sv-threshold, --sv-quantile, --budget",
                then="give one of them, such as --rank 16",
            )
        _ = dtype_named(self.dtype)

    @property
    def mix(self) -> Mix:
        """The method of combination."""
        return Mix(self.how, DENSITY if self.density is None else self.density, self.seed)

    @property
    def ranks(self) -> RankChoice | None:
        """How ranks are chosen; None if all are kept."""
        return None if self.rank is None else RankChoice(self.rank, self.overrides or {}, self.dtype, self.seed)

    def dtypes(self, casting: Casting) -> dict[str, DType]:
        """The dtype of every weight's factors."""
        stored = dtype_named(self.dtype)
        return {slot.name: stored or self._own(slot) for slot in casting.slots}

    def _own(self, slot: AdaptedWeight) -> DType:
        """The widest dtype of the factors; float32 if it would round a concatenation."""
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
    """Prepares a job that writes several LoRA adapters as one. Their order does not affect the result.

    Args:
        adapters: at least two LoRA adapters in peft's names, as paths or (path, weight).
        out: a folder, or a `.safetensors`/`.st` file.
        how: "cat" concatenates the factors; this is exact, and the ranks add up. "svd" is the same sum at another rank.
            "ties" (arXiv 2306.01708) trims each delta to its largest elements and averages those that agree with the
            elected sign; "dare" (arXiv 2311.03099) drops elements at random and rescales the others;
            "magnitude-prune" sums the trimmed deltas. Each works weight by weight, at the given rank.
        rank: rank of the factors, a rule of `surgery.ranks`, or a `Budget` for all weights; required, except for "cat",
            which takes none.
        overrides: pattern → rank, for matching weights; the last match wins.
        density: the share of elements that ties, dare and magnitude-prune keep; 0.5 by default.
        seed: seed for dare and for the randomised SVD.
        base: the base; needed if factors do not identify their weights, as for stacks of experts or trainable tokens.
        dtype: dtype of the factors, "float32", "float16" or "bfloat16"; by default the adapters' own, or float32 if
            "cat" would otherwise round.
        force: overwrite `out` if it exists.
        resources: workers, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; errors that headers reveal are raised before any work.
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
    """Raises NothingToDo for fewer than two adapters or a weight of 0."""
    for path, weight in paths:
        if weight == 0:
            raise NothingToDo("an adapter with weight 0 adds nothing", where=path, then="leave it out")
    if len(paths) < 2:
        raise NothingToDo(
            "a combination needs more than one adapter",
            where=", ".join(str(path) for path, _ in paths),
            expected="at least two adapters",
            then="name another adapter; surgery resize changes the rank of one",
        )


def _opened(adapters: tuple[WeighedAdapter, ...], files: OpenFiles) -> Casting:
    """Pairs the adapters' weights. Raises NotMergeable or Unsupported if they cannot be combined."""
    for each in adapters:
        if any(module.method == "dora" for module in each.adapter.modules):
            raise NotMergeable(
                "DoRA sets the norm of each output's weights, so it has no delta that can be added to another",
                where=each.adapter.ref.path,
                then="merge the adapters into the base one after the other, and extract from the result",
            )
        if sum(bool(other.adapter.config.get("trainable_token_indices")) for other in adapters) > 1:
            raise Unsupported(
                "more than one of the adapters replaces tokens",
                where=each.adapter.ref.path,
                then="merge them into the base one after the other",
            )
    return Casting.of(adapters, files)


def _notes(casting: Casting) -> tuple[str, ...]:
    count = len(casting.copied)
    note = f"{count} tensors that one adapter carries in full are copied, whatever its weight"
    return (note,) if count else ()


def _holds(dtype: DType, scale: float) -> bool:
    """Whether a factor times this scale is exact in the same dtype. A power of two only changes the exponent; float16
    has too few exponents for that."""
    return abs(scale) == 1 or (dtype is not DType.F16 and math.frexp(abs(scale))[0] == 0.5)
