"""What stands for the non-linearities of bottlenecks: the affine maps that are nearest on the user's own inputs.

The model runs with the adapter in its graph; f(z) ≈ A z + c by least squares over the tokens of most rows, the error
measured on the others, which took no part. Least squares in every coordinate of f(z) are so in U f(z) too, whatever U.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.checkpoint import Checkpoint
from formats.dialects.bottleneck import Bottlenecks
from formats.errors import FormatError
from formats.grafts import BranchGraft
from formats.paths import open_checkpoint
from formats.spec import shape_text
from surgery.errors import MissingTensors, Unsupported
from surgery.methods.activations import LINEAR, function
from surgery.methods.bottleneck import Matrices
from surgery.model.meta_model import known_names
from surgery.onnx.against_torch.torch_hooks import attach_branch
from surgery.onnx.trace.architecture import quiet
from surgery.operations.fold.ops import Affine, Source
from surgery.operations.fold.plan import branch_site
from surgery.operations.fold.verdicts import Judged

if TYPE_CHECKING:
    import torch

_HELD_OUT = 4  # every so-manyth row
_ROWS = 8  # at once
_IMAGES = "pixel_values"
_SINGULAR = 1e-12  # of the largest eigenvalue: directions that no token moves in


@dataclass(frozen=True)
class Approximation:
    """How well affine maps stand for non-linearities, on rows that took no part in finding them.

    Attributes:
        modules: for each bottleneck that they fold, by its projection, ‖error‖ / ‖what it adds‖.
        output: the same of the model's output.
        rows, held_out: how many rows the maps were fitted to, and how many the errors are of.
    """

    modules: Mapping[str, float]
    output: float
    rows: int
    held_out: int


@dataclass(frozen=True)
class _Placed:
    """A bottleneck in the running model."""

    behind: str
    site: BranchGraft
    made: Matrices

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the model takes them."""
        import torch

        return {role: tensor.to(torch.float32) for role, tensor in vars(self.made).items()}


def calibrate(
    model: str | Path,
    base: Checkpoint,
    judged: Sequence[tuple[Bottlenecks, Judged]],
    chosen: frozenset[str],
    calibration: str | Path,
) -> tuple[dict[str, Affine], Approximation]:
    """The affine maps, by the weights of the projections before the bottlenecks, and what they are worth.

    Args:
        model: the base's folder, which transformers loads.
        base: its tensors.
        judged: all bottlenecks of the adapter.
        chosen: those that are to get an affine map, by these weights.
        calibration: a safetensors file with input_ids (rows, length) and, if rows are padded, attention_mask; for a
            model of images pixel_values (rows, channels, height, width).

    Raises:
        FormatError: a calibration file that does not fit the model, or has too few rows or tokens.
        Unsupported, MissingTensors: a model that transformers does not load, or not whole.
    """
    import torch

    loaded = _loaded(model)
    placed = [_placed(loaded, adapter, each, base) for adapter, each in judged]
    inputs = _inputs(calibration, loaded)
    rows = len(next(iter(inputs.values())))
    last = [row for row in range(rows) if row % _HELD_OUT == _HELD_OUT - 1] or [rows - 1]
    first = [row for row in range(rows) if row not in last]
    with torch.no_grad():
        moments = {each.behind: _Moments.of(each) for each in placed if each.behind in chosen}
        _run(loaded, placed, _batches(inputs, first), {name: moment.add for name, moment in moments.items()})
        for name, moment in moments.items():
            moment.check(name, calibration)
        found = {name: moment.solved() for name, moment in moments.items()}
        errors = {each.behind: _Error(each, found[each.behind]) for each in placed if each.behind in chosen}
        seen = {name: error.add for name, error in errors.items()}
        exact = _run(loaded, placed, _batches(inputs, last), seen)
        near = [_affine(each, found[each.behind]) if each.behind in chosen else each for each in placed]
        approximate = _run(loaded, near, _batches(inputs, last), {})
    difference = sum(float((one - other).square().sum()) for one, other in zip(exact, approximate, strict=True))
    size = sum(float(one.square().sum()) for one in exact)
    return found, Approximation(
        {name.removesuffix(".weight"): error.relative for name, error in errors.items()},
        _relative(difference, size),
        len(first),
        len(last),
    )


def _loaded(model: str | Path) -> Any:
    try:
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        made = getattr(transformers, str((config.architectures or ["AutoModel"])[0]), transformers.AutoModel)
        with quiet():
            loaded, info = made.from_pretrained(
                model, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # whatever a class has against its config or its weights
        raise Unsupported(
            "calibration runs the model, and transformers does not load it",
            where=model,
            expected="a folder with config.json and weights, and transformers installed",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        ) from error
    if info["missing_keys"]:
        raise MissingTensors(
            "calibration runs the model, whose file lacks some of it",
            where=model,
            expected=", ".join(sorted(info["missing_keys"])[:5]),
            then="save it whole, or name the class that it is whole for in config.json's architectures",
        )
    return loaded.eval()


def _placed(model: Any, adapter: Bottlenecks, each: Judged, base: Checkpoint) -> _Placed:
    """A bottleneck where the model, which may name its modules otherwise than its file, has the projection."""
    source, site = Source(each.one), branch_site(adapter, each.one)
    wanted = [f"{name}.weight" for name in (site.module, site.norm) if name]
    known = {name: new.removesuffix(".weight") for name, new in known_names(model, wanted)[0].items()}
    if len(known) < len(wanted):
        raise Unsupported("the model does not have the file's layers", where=site.module, found=type(model).__name__)
    module, *norm = (known[name] for name in wanted)
    with open_checkpoint(source.refs[0].checkpoint.path) as checkpoint:
        made = source.matrices([checkpoint.read(ref.name) for ref in source.refs])
    return _Placed(each.one.behind, replace(site, module=module, norm=norm[0] if norm else None), made)


def _inputs(calibration: str | Path, model: Any) -> dict[str, torch.Tensor]:
    """The file's tensors. Raises FormatError."""
    with open_checkpoint(calibration) as checkpoint:
        shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
        if model.main_input_name == _IMAGES:
            return {_IMAGES: _images(checkpoint, shapes.get(_IMAGES, ()), model.config)}
        ids = shapes.get("input_ids", ())
        if len(ids) != 2 or ids[0] < 2 or not ids[1] or shapes.get("attention_mask", ids) != ids:
            raise _no_rows(
                checkpoint, "input_ids (rows, length) of two rows at least, attention_mask of the same shape or none"
            )
        return _tokens(checkpoint, model)


def _no_rows(checkpoint: Checkpoint, expected: str) -> FormatError:
    found = ", ".join(f"{name} ({shape_text(spec.shape)})" for name, spec in checkpoint.specs.items())
    return FormatError("no calibration rows", where=checkpoint.ref.path, expected=expected, found=found or "nothing")


def _images(checkpoint: Checkpoint, shape: tuple[int, ...], config: Any) -> torch.Tensor:
    import torch

    size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
    if shape[:1] < (2,) or shape[1:] != (config.num_channels, *size):
        sides = " × ".join(map(str, size))
        raise _no_rows(checkpoint, f"{_IMAGES} of two images at least, {config.num_channels} × {sides} each")
    return checkpoint.read(_IMAGES).to(torch.float32)


def _tokens(checkpoint: Checkpoint, model: Any) -> dict[str, torch.Tensor]:
    """Rows of tokens and their mask. Raises FormatError for tokens that the model does not have."""
    import torch

    inputs: dict[str, torch.Tensor] = {
        name: checkpoint.read(name).to(torch.long)
        for name in ("input_ids", "attention_mask")
        if name in checkpoint.specs
    }
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    words = model.get_input_embeddings().num_embeddings
    low, high = (int(extreme) for extreme in torch.aminmax(inputs["input_ids"]))
    if low < 0 or high >= words:
        raise FormatError(
            "tokens that the model does not have",
            where=checkpoint.ref.path,
            expected=f"0 to {words - 1}",
            found=f"{low} to {high}",
        )
    return inputs


def _batches(inputs: Mapping[str, torch.Tensor], rows: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
    for begin in range(0, len(rows), _ROWS):
        yield {name: tensor[list(rows[begin : begin + _ROWS])] for name, tensor in inputs.items()}


def _run(
    model: Any,
    placed: Sequence[_Placed],
    batches: Iterator[dict[str, torch.Tensor]],
    seen: Mapping[str, Callable[[torch.Tensor], None]],
) -> list[torch.Tensor]:
    """The model's output for each batch, with the bottlenecks in its graph; of tokens that are not padding."""
    import torch

    mask: list[torch.Tensor] = []

    def watch(name: str) -> Callable[[torch.Tensor], None] | None:
        return (lambda z: seen[name](z[mask[-1]].flatten(0, -2).double())) if name in seen else None

    detach = [attach_branch(model, each.site, each.tensors(), watch(each.behind)) for each in placed]
    outputs = []
    try:
        for batch in batches:
            whole = torch.ones(len(next(iter(batch.values()))), dtype=torch.bool)  # of images: every token
            mask.append(batch.get("attention_mask", whole).bool())
            output = model(**batch)[0]
            outputs.append((output[mask[-1]] if output.shape[:2] == mask[-1].shape else output).double())
    finally:
        for each in detach:
            each()
    return outputs


@dataclass
class _Moments:
    """Sums over tokens: of (z, 1)(z, 1)ᵀ and of (z, 1) f(z)ᵀ."""

    f: Callable[[torch.Tensor], torch.Tensor]
    left: torch.Tensor  # (rank + 1, rank + 1)
    right: torch.Tensor  # (rank + 1, rank)
    tokens: int = 0

    @classmethod
    def of(cls, placed: _Placed) -> _Moments:
        """None yet."""
        rank = len(placed.made.down)
        zeros = placed.made.down.new_zeros
        return cls(function(placed.site.non_linearity), zeros(rank + 1, rank + 1), zeros(rank + 1, rank))

    def add(self, z: torch.Tensor) -> None:
        """Some tokens'.  # (tokens, rank) float64"""
        import torch

        one = torch.cat([z, z.new_ones(len(z), 1)], 1)
        self.left += one.mT @ one
        self.right += one.mT @ self.f(z)
        self.tokens += len(z)

    def check(self, name: str, calibration: str | Path) -> None:
        """Raises FormatError where there are not more tokens than numbers to be found of each output."""
        if self.tokens <= len(self.left):
            raise FormatError(
                "too few tokens to find an affine map by",
                where=f"{calibration}: {name}",
                expected=f"more than {len(self.left)} in three of four rows",
                found=self.tokens,
            )

    def solved(self) -> Affine:
        """The least squares; the smallest where directions are left open."""
        import torch

        values, vectors = torch.linalg.eigh(self.left)
        inverse = torch.where(values > _SINGULAR * values[-1], 1 / values, 0.0)
        solution = vectors @ (inverse[:, None] * (vectors.mT @ self.right))  # (rank + 1, rank)
        return Affine(solution[:-1].mT.contiguous(), solution[-1].contiguous())


class _Error:
    """How far a bottleneck with an affine map is from the real one, over all tokens."""

    def __init__(self, placed: _Placed, affine: Affine) -> None:
        self._made, self._affine = placed.made, affine
        self._f = function(placed.site.non_linearity)
        self._wrong = self._size = 0.0

    def add(self, z: torch.Tensor) -> None:
        """Some tokens'.  # (tokens, rank) float64"""
        exact = self._f(z)
        wrong = exact - (z @ self._affine.slope.mT + self._affine.offset)
        self._wrong += float((wrong @ self._made.up.mT).square().sum())
        self._size += float((exact @ self._made.up.mT + self._made.up_bias).square().sum())

    @property
    def relative(self) -> float:
        """‖error‖ / ‖what it adds‖."""
        return _relative(self._wrong, self._size)


def _relative(wrong: float, size: float) -> float:
    return (wrong / size) ** 0.5 if size else 0.0 if not wrong else float("inf")


def _affine(placed: _Placed, affine: Affine) -> _Placed:
    site = replace(placed.site, non_linearity=LINEAR.name)
    return replace(placed, site=site, made=placed.made.affine(affine.slope, affine.offset))
