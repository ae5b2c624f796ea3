"""check_method: the laws of a method, on small random factors; first the formula alone, then in merges of files."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from formats.adapter import Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.dialects import GROUP as DIALECTS_GROUP
from formats.dialects.dialect import Dialect
from formats.errors import ReportedError
from formats.layers import LayerKind
from formats.spec import CheckpointRef, DType, TensorRef, TensorSpec
from formats.tensors import dtype_of, torch_dtype
from surgery.errors import NotMerged
from surgery.exact import rounding
from surgery.methods import GROUP, METHODS, Method
from surgery.methods.base import AdditiveMethod, TransformingMethod
from surgery.operations.merge.merge import merge
from surgery.operations.merge.unmerge import unmerge
from surgery.operations.merge.verify import verify
from surgery.pipeline.engine import Resources
from surgery.testing.laws import broken, installed, refusal

if TYPE_CHECKING:
    import torch

_TARGET, _KEY = "layer.weight", "surgery.testing:"
_NOWHERE = CheckpointRef("/no/such/file")  # a method that opens the path of its factors fails
_UNIT = {DType.F32: 2.0**-23, DType.BF16: 2.0**-7, DType.F16: 2.0**-10}  # in the last place
_RUNS = (Resources(1), Resources(3), Resources(2, memory=1))


def check_method(
    method: Method,
    factors: Mapping[str, tuple[int, ...] | torch.Tensor],
    *,
    weight: tuple[int, ...] = (12, 8),
    kind: LayerKind = LayerKind.LINEAR,
    rank: int = 4,
    alpha: float = 8.0,
    settings: Mapping[str, Any] | None = None,
    scaled: bool = True,
    seed: int = 0,
) -> None:
    """Holds a method to the laws that surgery relies on.

    ΔW, or the transformed weight, has the weight's shape; it is the same whatever the blocks of rows; ΔW is linear in
    its strength; factors and weights that do not fit are refused while planning; no file is opened. In merges: the same
    bytes for any threads and memory; nothing else changes; unmerge gives the base back within the merged weight's
    rounding, and bit for bit with an undo file; where the method forgets W0, unmerge is refused.

    Args:
        method: an object of a class that inherits from AdditiveMethod or TransformingMethod; need not be installed.
        factors: the shape of each factor by its role, for random ones, or a tensor where random numbers are none.
        weight: shape of the weight that these factors fit, as a layer of this `kind` stores it.
        kind: of the layer.
        rank, alpha, settings: of the module; see formats.adapter.AdapterModule.
        scaled: whether ΔW is proportional to alpha, as with s = alpha / rank; else it must not depend on it.
        seed: of the random numbers.

    Raises:
        AssertionError: a broken law, with what, where, expected and found.
    """
    case = _Case.of(method, factors, weight, AdapterModule(_TARGET, method.name, kind, {}, rank, alpha), settings, seed)
    ours = {each.name: each for each in METHODS}
    for attribute in ("name", "title", "paper"):
        if not getattr(method, attribute, None):
            broken("a method says what it is called", f"{method.name}.{attribute}", expected="a text")
    case.check_refusals()
    if isinstance(method, AdditiveMethod):
        case.check_delta(method, scaled=scaled)
    else:
        case.check_transform(method)
    with installed(GROUP, method, ours), installed(DIALECTS_GROUP, _Carrier(case.module), {}):
        for dtype in _UNIT:
            with tempfile.TemporaryDirectory() as folder:
                case.check_merge(Path(folder), dtype)


@dataclass(frozen=True)
class _Carrier(Dialect):
    """A dialect whose files are factors by role alone; what else there is to say of the module is said here."""

    module: AdapterModule
    name: str = "testing"

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """By a key that no other dialect writes."""
        return _KEY in checkpoint.metadata

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """One adapted weight."""
        factors = {key.removeprefix(_KEY): checkpoint.tensor(key) for key in checkpoint.specs}
        return Adapter(checkpoint.ref, self.name, {}, (replace(self.module, factors=factors),), ())


@dataclass(frozen=True)
class _Case:
    """One weight and its factors."""

    method: Method
    module: AdapterModule
    weight: torch.Tensor
    factors: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        method: Method,
        factors: Mapping[str, tuple[int, ...] | torch.Tensor],
        weight: tuple[int, ...],
        module: AdapterModule,
        settings: Mapping[str, Any] | None,
        seed: int,
    ) -> _Case:
        import torch

        random = torch.Generator().manual_seed(seed)
        made = {
            role: 0.3 * torch.randn(each, generator=random) if isinstance(each, tuple) else each
            for role, each in factors.items()
        }
        specs = {role: TensorSpec(role, dtype_of(each), tuple(each.shape)) for role, each in made.items()}
        refs = {role: TensorRef(_NOWHERE, spec) for role, spec in specs.items()}
        module = replace(module, factors=refs, settings=settings or {})
        return cls(method, module, torch.randn(weight, generator=random), made)

    @property
    def where(self) -> str:
        return f"{self.method.name} on {_TARGET} {tuple(self.weight.shape)}"

    def spec(self, dtype: DType = DType.F32, shape: tuple[int, ...] | None = None) -> TensorSpec:
        return TensorSpec(_TARGET, dtype, tuple(self.weight.shape) if shape is None else shape)

    def copies(self) -> dict[str, torch.Tensor]:
        return {role: factor.clone() for role, factor in self.factors.items()}

    def check_refusals(self) -> None:
        """What does not fit is refused while planning, and what fits is not."""
        for dtype in (*_UNIT, DType.F64):
            try:
                self.method.check(self.module, self.spec(dtype))
            except ReportedError as error:
                broken("what fits is not refused", f"{self.where}, {dtype}", found=error)
        weights = {
            "a weight of integers": self.spec(DType.I8),
            "a weight of other sizes": self.spec(shape=tuple(side + 1 for side in self.weight.shape)),
        }
        for what, spec in weights.items():
            refusal(lambda spec=spec: self.method.check(self.module, spec), what, self.where)  # type: ignore[misc]
        for role, ref in self.module.factors.items():
            wrong = replace(ref, spec=replace(ref.spec, shape=(*ref.spec.shape, 3)))
            module = replace(self.module, factors={**self.module.factors, role: wrong})
            what = f"a factor {role} of shape {wrong.spec.shape}"
            refusal(lambda module=module: self.method.check(module, self.spec()), what, self.where)  # type: ignore[misc]

    def check_delta(self, method: AdditiveMethod, *, scaled: bool) -> None:
        """Shape, blocks, linearity."""
        import torch

        def delta(strength: float, module: AdapterModule = self.module) -> torch.Tensor:
            return method.delta(module, self.copies(), strength).rows(0, height)

        height = self.weight.shape[0]
        width = self.weight.numel() // height
        given = self.copies()
        whole = method.delta(self.module, given, 1.0)
        rows = whole.rows(0, height).clone()
        if tuple(rows.shape) != (height, width) or whole.columns != width:
            broken(
                "ΔW has the weight's shape, as a matrix", self.where, expected=(height, width), found=tuple(rows.shape)
            )
        if rows.dtype != torch.float64:
            broken("ΔW is computed in float64", self.where, expected="float64", found=rows.dtype)
        if not rows.isfinite().all() or not rows.any():
            broken("ΔW of random factors is finite and not zero", self.where, found=rows)
        if not all(torch.equal(given[role], factor) for role, factor in self.factors.items()):
            broken("factors are not written to", self.where)
        for block in (1, 2, 5):
            cut = [whole.rows(begin, min(begin + block, height)).clone() for begin in range(0, height, block)]
            if not torch.equal(torch.cat(cut), rows):
                broken("ΔW has the same bits whatever the blocks of rows", f"{self.where}, {block} rows at a time")
        for strength in (2.0, -0.5):
            _close(delta(strength), strength * rows, "ΔW is linear in its strength", f"{self.where}, {strength}")
        doubled = delta(1.0, replace(self.module, alpha=2 * self.module.alpha))
        law = "ΔW is proportional to alpha" if scaled else "ΔW does not depend on alpha"
        _close(doubled, (2.0 if scaled else 1.0) * rows, law, self.where)

    def check_transform(self, method: TransformingMethod) -> None:
        """Shape, blocks, the way back."""
        import torch

        made: list[torch.Tensor] = []
        for block in (1 << 17, 1, 20):
            with patch.object(rounding, "_BLOCK_ELEMENTS", block):
                made.append(method.transform(self.module, self.weight.clone(), self.copies(), DType.F64))
        if made[0].shape != self.weight.shape or made[0].dtype != torch.float64:
            found = f"{tuple(made[0].shape)} {made[0].dtype}"
            broken("the result has the weight's shape and the dtype asked for", self.where, found=found)
        if not all(torch.equal(each, made[0]) for each in made):
            broken("the result has the same bits whatever the blocks of rows", self.where)
        if not method.forgets:
            back = method.transform(self.module, made[0], self.copies(), DType.F64, back=True)
            _close(back, self.weight.double(), "the way back leads to W0", self.where)

    def check_merge(self, folder: Path, dtype: DType) -> None:
        """The verbs that a user runs, on files."""
        from safetensors.torch import load_file, save_file

        where = f"{self.where}, {dtype}"
        stored = {
            _TARGET: self.weight.to(torch_dtype(dtype)),
            "other.weight": self.weight.to(torch_dtype(dtype)).clone(),
        }
        base, adapter, undo = (folder / name for name in ("base.st", "adapter.st", "undo.st"))
        save_file(stored, base)
        save_file({_KEY + role: factor for role, factor in self.copies().items()}, adapter, metadata={_KEY: ""})
        files = [folder / f"merged{number}.st" for number in range(len(_RUNS))]
        for file, resources in zip(files, _RUNS, strict=True):
            merge(base, adapter, file, resources=resources)
        if len({file.read_bytes() for file in files}) > 1:
            broken("merge writes the same bytes for any threads and memory", where)
        merged = load_file(files[0])
        changed = [name for name, tensor in stored.items() if not tensor.equal(merged[name])]
        if changed != [_TARGET]:
            broken("merge changes the adapted weight alone", where, expected=_TARGET, found=", ".join(changed))
        verdict = verify(files[0], base, adapter).verdict
        if verdict != "exact":
            broken("verify finds the merge exact", where, expected="exact", found=verdict)
        self._check_unmerge(files[0], adapter, stored[_TARGET], merged[_TARGET], dtype)
        merge(base, adapter, folder / "again.st", undo=undo)
        unmerge(folder / "again.st", adapter, folder / "restored.st", undo=undo)
        if (folder / "restored.st").read_bytes() != base.read_bytes():
            broken("unmerge with an undo file gives the base back bit for bit", where)

    def _check_unmerge(
        self, file: Path, adapter: Path, before: torch.Tensor, merged: torch.Tensor, dtype: DType
    ) -> None:
        """Without an undo file."""
        from safetensors.torch import load_file

        out, where = file.with_name("back.st"), f"{self.where}, {dtype}"
        if getattr(self.method, "forgets", ""):
            error = refusal(lambda: unmerge(file, adapter, out), "taking off what forgets W0", where)
            if not isinstance(error, NotMerged):
                broken("taking off what forgets W0", where, expected="NotMerged", found=type(error).__name__)
            return
        unmerge(file, adapter, out)
        wide, after = before.double(), load_file(out)[_TARGET].double()
        # What is stored has been rounded once, and so is what is read off it; products pass that on as they scale.
        room = _UNIT[dtype] * merged.double().abs().maximum(wide.abs())
        if not isinstance(self.method, AdditiveMethod):
            room = 64 * room.max().expand_as(room)
        if not ((after - wide).abs() <= room).all():
            worst = float((after - wide).abs().max())
            broken(
                "unmerge gives the base back within rounding", where, expected=f"≤ {float(room.max()):.3g}", found=worst
            )


def _close(found: torch.Tensor, expected: torch.Tensor, law: str, where: str) -> None:
    """Within 1e-6 of the largest element."""
    error = float((found - expected).abs().max())
    most = 1e-6 * float(expected.abs().max())
    if not math.isfinite(error) or error > most:
        broken(law, where, expected=f"within {most:.3g}", found=f"off by {error:.3g}")
