"""Groups an adapter's tensors by layer, for the factor names that kohya, LyCORIS, diffusers and ComfyUI share.

These dialects differ only in how they name a layer, which their own modules handle. Tested against LyCORIS and peft.
This module does no mathematics.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from formats.adapter import AdapterModule
from formats.checkpoint import Checkpoint
from formats.dialects import lycoris
from formats.dialects.peft_factors import Factors
from formats.errors import AdapterFormatError, ShapeMismatch, UnmatchedKeys
from formats.layers import LayerKind
from formats.spec import DType, TensorRef, TensorSpec, shape_text

_PAIRS = {
    "lora_up.weight": "lora_B",
    "lora_down.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_A.weight": "lora_A",
}
_OLDER = {
    f"{stem}.{side}.weight": role
    for stem in ("lora", "lora_linear_layer")
    for side, role in (("up", "lora_B"), ("down", "lora_A"))
}
_SAME = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm",
    "lora_B.bias",
)  # fmt: skip
# Endings of a key after the layer's name, and the role of the tensor.
SUFFIXES: Mapping[str, str] = {
    **_PAIRS,
    **_OLDER,
    **{name: name for name in _SAME},
    "lora_mid.weight": "lora_mid",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    **lycoris.SUFFIXES,
}
LORA_ROLES = frozenset({"lora_A", "lora_B", "alpha"})
_REFUSED = {
    "bm.weight": "no program reads a core in LyCORIS's GLoRA",
    "reshape_weight": "this gives a weight another shape, which the base's checkpoint cannot have",
    "set_weight": "this replaces a weight, which ComfyUI does without regard to the base",
    "lokr_t1": "no program reads a core in LoKr's first factor",
}
_METHODS = (
    ("lora_A", "lora_B"), ("hada_w1_a",), ("lokr_w1", "lokr_w1_a"), ("diff",), ("w_norm",), ("oft_blocks",),
    ("a1", "a2", "b1", "b2"), ("on_input",),
)  # fmt: skip
_OWN = ("oft_blocks", "a1", "on_input")  # of LyCORIS's own methods
_NUMBERS = ("alpha", "on_input")


@dataclass(frozen=True)
class FactorGroup:
    """The factors of one layer.

    Attributes:
        name: the layer's name in the file, without the part's prefix.
        prefix: the part's prefix.
        factors: tensors by role.
        numbers: values of the scalar factors by role; NaN if not a finite number.
    """

    name: str
    prefix: str
    factors: Factors
    numbers: Mapping[str, float] = field(default_factory=dict)


Split = Callable[[str], tuple[str, str] | None]  # a key → the part's prefix, and the rest of the key


def suffix_of(key: str) -> str | None:
    """The longest ending of a key that is a factor's; None if there is none."""
    found = [suffix for suffix in SUFFIXES if key.endswith(f".{suffix}")]
    return max(found, key=len, default=None)


def groups_of(checkpoint: Checkpoint, split: Split) -> list[FactorGroup]:
    """The factors of every layer, sorted by the layers' names.

    Raises:
        AdapterFormatError: a key is not a factor's (the error lists the nearest), is not supported, or two keys have
            one role.
    """
    found: dict[tuple[str, str], Factors] = {}
    where = checkpoint.ref.path
    for key in checkpoint.specs:
        parts = split(key)
        suffix = suffix_of(parts[1]) if parts is not None else None
        if suffix is None and f"{key.removesuffix('.weight')}.on_input" in checkpoint.specs:
            suffix = "weight"
        if parts is None or suffix is None:
            raise _unknown(key, where)
        prefix, rest = parts
        factors = found.setdefault((prefix, rest.removesuffix(f".{suffix}")), {})
        role = SUFFIXES.get(suffix, lycoris.SCALE)
        if role in factors:
            raise AdapterFormatError(
                "the same factor twice",
                where=where,
                found=f"{factors[role].name} and {key}",
                then="remove one of the two tensors",
            )
        factors[role] = checkpoint.tensor(key)
    groups = []
    for (prefix, name), factors in sorted(found.items()):
        numbers = {role: _number(checkpoint, factors[role]) for role in _NUMBERS if role in factors}
        groups.append(FactorGroup(name, prefix, factors, numbers))
    return groups


def _unknown(key: str, where: str) -> AdapterFormatError:
    for ending, reason in _REFUSED.items():
        if key.endswith(f".{ending}"):
            return AdapterFormatError(
                reason, where=f"{where}: {key}", then="remove this layer's tensors from the file, or train it without"
            )
    ending = ".".join(key.rsplit(".", 2)[-2:]) if key.endswith(".weight") else key.rpartition(".")[2]
    near = difflib.get_close_matches(ending, SUFFIXES, n=3, cutoff=0.3)
    return AdapterFormatError(
        "a key that belongs to no dialect",
        where=where,
        expected=", ".join(near or ["lora_down.weight", "lora_up.weight", "alpha"]) + " after a layer's name",
        found=key,
        then="correct the key, or remove the tensor if it belongs to no adapter",
    )


def scalar(group: FactorGroup, where: str) -> float | None:
    """The alpha that scales a layer's product; None if the file has none. Raises AdapterFormatError if it is zero or
    not finite."""
    if "alpha" not in group.factors or "oft_blocks" in group.factors:  # OFT's alpha is a constraint
        return None
    value, ref = group.numbers["alpha"], group.factors["alpha"]
    if not math.isfinite(value) or value == 0:
        raise AdapterFormatError(
            "alpha is not a finite number other than 0",
            where=f"{where}: {ref.name}",
            expected="one finite number other than 0",
            found=f"{ref.spec.dtype} {shape_text(ref.spec.shape)}" if ref.spec.size != 1 else value,
            then="correct the tensor, or remove it: without it alpha equals the rank",
        )
    return value


def _number(checkpoint: Checkpoint, ref: TensorRef) -> float:
    """The value of a scalar tensor; NaN for any other tensor."""
    spec, payload = ref.spec, checkpoint.read_bytes(ref.name)
    plain = {
        DType.F64: np.float64,
        DType.F32: np.float32,
        DType.F16: np.float16,
        DType.I64: np.int64,
        DType.I32: np.int32,
    }
    value = math.nan
    if spec.size == 1 and spec.dtype is DType.BF16:
        value = float((payload.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[0])
    elif spec.size == 1 and spec.dtype in plain:
        value = float(payload.view(plain[spec.dtype])[0])
    return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class Scaling:
    """How a layer's product is scaled. If alpha is None, it equals the rank, so the scaling is 1."""

    alpha: float | None = None
    rslora: bool = False
    rank: int | None = None  # the rank in the config; None if no config gives one


def group_modules(
    group: FactorGroup, module: str, base: Mapping[str, TensorSpec], scaling: Scaling, where: str
) -> list[AdapterModule]:
    """The weights that a layer's factors adapt.

    Args:
        group: the layer's factors.
        module: the layer's name in the base.
        base: the base's tensors, including the layer's weight.
        scaling: the layer's scaling.
        where: the file, for errors.

    Raises:
        AdapterFormatError: factors are missing, belong to several methods, or have contradictory ranks.
        ShapeMismatch: factors do not fit the base's weight.
        UnmatchedKeys: a bias is changed that the base does not have.
    """
    where, factors = f"{where}: {group.name}", group.factors
    methods = [names[0] for names in _METHODS if any(name in factors for name in names)]
    if len(methods) > 1 or not (methods or factors.keys() & {"diff_b", "b_norm", "lora_B.bias"}):
        raise AdapterFormatError(
            "one layer has factors of several methods" if methods else "a layer without factors",
            where=where,
            found=", ".join(factors),
            then="remove the tensors that do not belong to this layer's method",
        )
    target, bias = f"{module}.weight", f"{module}.bias"
    found: list[AdapterModule] = []
    if methods:
        spec = base[target]
        kind = LayerKind.CONV if len(spec.shape) > 2 else LayerKind.LINEAR
        if methods[0] in _OWN:
            _no_dora(factors, where)
            found.append(lycoris.own_module(methods[0], factors, group.numbers, spec, kind, where))
        else:
            make = {"lora_A": _lora, "hada_w1_a": _loha, "lokr_w1": _lokr}.get(methods[0], _full)
            found.append(make(factors, spec, kind, scaling, where))
    beside = [factors[role] for role in ("diff_b", "b_norm", "lora_B.bias") if role in factors]
    if beside and bias not in base:
        raise UnmatchedKeys(
            "the adapter changes a bias that the base does not have",
            where=where,
            expected=bias,
            then="check that the adapter was made for this base",
        )
    for role in ("diff_b", "b_norm"):
        if role in factors:
            found.append(AdapterModule(bias, "full", LayerKind.LINEAR, {"diff": factors[role]}, 1, 1.0))
    if "lora_B.bias" in factors:
        first = found[0]
        ours = {"lora_B.bias": factors["lora_B.bias"]}
        found.append(AdapterModule(bias, "lora_bias", LayerKind.LINEAR, ours, first.rank, first.alpha, first.rslora))
    return found


def _lora(factors: Factors, weight: TensorSpec, kind: LayerKind, scaling: Scaling, where: str) -> AdapterModule:
    _complete(factors, ("lora_A", "lora_B"), where)
    a, b = factors["lora_A"].spec.shape, factors["lora_B"].spec.shape
    rank, mid = (a[0] if a else 0), factors.get("lora_mid")
    dims = len(a) == len(b) >= 2 and b[1] == rank > 0
    core = mid is None or (len(mid.spec.shape) == len(a) and mid.spec.shape[:2] == (rank, rank))
    if not dims or not core or scaling.rank not in (None, rank):
        raise AdapterFormatError(
            "the factors' ranks contradict each other",
            where=where,
            expected=f"rank {scaling.rank or rank} for all factors",
            found=_shapes(factors),
            then="save the adapter again, from the library that trained it",
        )
    kernel = a[2:] if mid is None else mid.spec.shape[2:]
    inner = () if mid is None else a[2:]
    fits = weight.shape == (b[0], a[1], *kernel) and {*b[2:], *inner} <= {1}
    # Some programs save a 1 × 1 convolution as a linear layer, and the other way round.
    point = mid is None and {*kernel, *weight.shape[2:]} <= {1} and weight.shape[:2] == (b[0], a[1])
    if not fits and not point:
        raise _misfit(factors, weight, where)
    kind = LayerKind.CONV if len(a) > 2 else kind
    alpha = float(rank) if scaling.alpha is None else scaling.alpha
    named = {"lora_A": factors["lora_A"], "lora_B": factors["lora_B"]}
    magnitude = _magnitude(factors, weight, where)
    if mid is not None:
        named["lora_mid"] = mid
    method = "lora" if mid is None else "lora_tucker"
    if magnitude:
        method = "dora" if mid is None else "dora_tucker"
    return AdapterModule(weight.name, method, kind, named | magnitude, rank, alpha, scaling.rslora)


def _magnitude(factors: Factors, weight: TensorSpec, where: str) -> Factors:
    """DoRA's magnitudes, one per output; empty without DoRA. Raises AdapterFormatError for magnitudes per input."""
    magnitude = factors.get("dora_scale")
    if magnitude is None:
        return {}
    shape, (out, into) = magnitude.spec.shape, weight.shape[:2]
    if magnitude.spec.size != out or (len(shape) >= 2 and shape[:2] == (1, into) and into > 1):
        raise AdapterFormatError(
            "DoRA's magnitudes are per input; only magnitudes per output are supported",
            where=where,
            expected=f"{out} × 1",
            found=shape_text(shape),
            then="train with magnitudes per output (wd_on_output in LyCORIS)",
        )
    return {"lora_magnitude_vector": magnitude}


def _loha(factors: Factors, weight: TensorSpec, kind: LayerKind, scaling: Scaling, where: str) -> AdapterModule:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    _complete(factors, names, where)
    rank = _rank(factors, ("hada_w1_b", "hada_w2_b"), where)
    named = {role: ref for role, ref in factors.items() if role.startswith("hada_")}
    magnitude = _magnitude(factors, weight, where)
    alpha = float(rank) if scaling.alpha is None else scaling.alpha
    method = "dora_loha" if magnitude else "loha"
    return AdapterModule(weight.name, method, kind, named | magnitude, rank, alpha, scaling.rslora)


def _lokr(factors: Factors, weight: TensorSpec, kind: LayerKind, scaling: Scaling, where: str) -> AdapterModule:
    named = {role: ref for role, ref in factors.items() if role.startswith("lokr_")}
    magnitude = _magnitude(factors, weight, where)
    method = "dora_lokr" if magnitude else "lokr"
    low = [role for role in ("lokr_w1_b", "lokr_w2_b") if role in named]
    if "lokr_w2" in named and len(named["lokr_w2"].spec.shape) == 3:
        raise AdapterFormatError(
            "LoKr with a whole w2 on a one-dimensional convolution: LyCORIS and peft apply it differently",
            where=where,
            then="merge the adapter with the library that trained it",
        )
    if not low:  # two whole factors: there is no rank, and the scaling is 1 whatever alpha is
        return AdapterModule(weight.name, method, kind, named | magnitude, 1, 1.0)
    rank = _rank(factors, low, where)
    alpha = float(rank) if scaling.alpha is None else scaling.alpha
    return AdapterModule(weight.name, method, kind, named | magnitude, rank, alpha, scaling.rslora)


def _full(factors: Factors, weight: TensorSpec, kind: LayerKind, scaling: Scaling, where: str) -> AdapterModule:
    _no_dora(factors, where)
    ref = factors["diff"] if "diff" in factors else factors["w_norm"]
    if ref.spec.shape != weight.shape:
        raise _misfit(factors, weight, where)
    return AdapterModule(weight.name, "full", kind, {"diff": ref}, 1, 1.0)


def _no_dora(factors: Factors, where: str) -> None:
    if "dora_scale" in factors:
        raise AdapterFormatError(
            "DoRA around this method is not supported, because LyCORIS does not write it",
            where=where,
            found=", ".join(factors),
        )


def _complete(factors: Factors, roles: Iterable[str], where: str) -> None:
    missing = [role for role in roles if role not in factors]
    if missing:
        raise AdapterFormatError(
            "a layer lacks some of its factors",
            where=where,
            expected=", ".join(roles),
            found=", ".join(factors),
            then="save the adapter again, from the library that trained it",
        )


def _rank(factors: Factors, roles: Iterable[str], where: str) -> int:
    """The common rank of factors (rank, …)."""
    ranks = {factors[role].spec.shape[0] if factors[role].spec.shape else 0 for role in roles}
    if len(ranks) != 1 or 0 in ranks:
        raise AdapterFormatError(
            "the factors' ranks contradict each other",
            where=where,
            found=_shapes(factors),
            then="save the adapter again, from the library that trained it",
        )
    return ranks.pop()


def _shapes(factors: Factors) -> str:
    return ", ".join(f"{role} {shape_text(ref.spec.shape)}" for role, ref in sorted(factors.items()) if role != "alpha")


def _misfit(factors: Factors, weight: TensorSpec, where: str) -> ShapeMismatch:
    return ShapeMismatch(
        "the adapter does not fit the base's weight",
        where=f"{where} → {weight.name}",
        expected=f"the base's {shape_text(weight.shape)}",
        found=_shapes(factors),
        then="check that the adapter was made for this base",
    )
