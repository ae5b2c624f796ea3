"""The plan of extract, made from headers alone: how the adapter may store each tensor of a pair.

Changes are known only after both files are read. So the plan declares outputs at their largest possible size, and for
every form in which they may be stored. Knows no path and no decomposition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from formats.dialects.peft_writing import (
    bias_key,
    factor_keys,
    full_key,
    magnitude_key,
    magnitude_shape,
    parameter_keys,
)
from formats.layers import LayerKind, owner
from formats.spec import DType, TensorRef, TensorSpec
from surgery.errors import SurgeryError, Unsupported
from surgery.linalg.truncated import workspace
from surgery.model.base_model import BaseModel
from surgery.operations.extract.ops import Decomposition, Factorise, FactoriseParameters, KeepWhole, LeaveBehind
from surgery.operations.extract.pairing import Choice, FullTensors, Matrix, Pairing, pair
from surgery.pipeline.plan import Plan, Step
from surgery.ranks import Bounded, FixedRank, QuantileRule
from surgery.ranks.choice import RankChoice
from surgery.receipts.receipt import TOOL


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How to extract; the fields are arguments of `extract`."""

    ranks: RankChoice
    choice: Choice = field(default_factory=Choice)
    method: str = "lora"
    bias: str = "full"
    exact: bool = False


def pair_for(base: BaseModel, tuned: BaseModel, how: Extraction) -> Pairing:
    """Pairs the tensors of both files for an extraction.

    Raises:
        See `pair`; also UnsupportedDType for a dtype that factors cannot have, UnknownTensor for an override that
        matches nothing, Unsupported if peft has no form for the adapter.
    """
    _ = how.ranks.stored
    rules = how.ranks.rules(tuned.specs)

    def pays(matrix: Matrix) -> bool:
        chosen = rules[matrix.spec.name]
        least = chosen.most(min(matrix.sides)) if isinstance(chosen, FixedRank) else 1
        return least <= matrix.break_even

    pairing = pair(base, tuned, how.choice, pays)
    _check_method(pairing, how)
    return pairing


def plan_extract(pairing: Pairing, how: Extraction, measured: Mapping[str, int] | None = None) -> Plan:
    """Plans how to store each tensor of a pairing; `measured` has the rank of every changed weight if there is a
    budget."""
    rules = how.ranks.rules(pairing.tuned.specs, measured)
    hows = {
        matrix: _capped(
            Decomposition(
                rules[matrix.spec.name],
                how.ranks.stored or matrix.spec.dtype,
                how.ranks.seed,
                how.exact,
                how.method == "dora",
                how.bias == "lora",
            ),
            matrix,
        )
        for matrix in pairing.matrices
    }
    steps = [
        _layer_step(pairing, matrix, hows[matrix])
        for matrix in pairing.matrices
        if matrix.kind is not LayerKind.PARAMETER
    ]
    for matrices in pairing.parameters.values():
        steps.append(_parameters_step(pairing, matrices, tuple(hows[matrix] for matrix in matrices)))
    steps += [whole_step(pairing, whole) for whole in pairing.wholes]
    if pairing.left or pairing.removed:
        steps.append(Step("left behind", (), (), LeaveBehind((*pairing.left, *pairing.removed))))
    return Plan("extract", tuple(steps), {"format": "pt", "surgery": f"{TOOL} extract"}, pairing.notes)


def _check_method(pairing: Pairing, how: Extraction) -> None:
    """Raises Unsupported if peft has no form for the adapter."""
    for option, given, known in (("method", how.method, ("lora", "dora")), ("bias", how.bias, ("full", "lora"))):
        if given not in known:
            raise SurgeryError(
                f"unknown {option}", expected=" or ".join(known), found=given, then=f"--{option} {known[0]}"
            )
    parameters = [
        matrix.spec.name
        for matrix in pairing.matrices
        if matrix.kind is LayerKind.PARAMETER or matrix.spec.name in pairing.structure.fused
    ]
    unusual = "DoRA" if how.method == "dora" else "lora_bias" if how.bias == "lora" else ""
    if unusual and parameters:
        raise Unsupported(
            f"peft has no {unusual} for parameters outside of layers, and none for only some layers of an adapter",
            where=parameters[0],
            found=f"{len(parameters)} such parameters",
            then=f"--kind '{parameters[0]}=full' stores one in full, --exclude leaves it out",
        )
    if how.bias == "lora":
        without = [
            matrix.spec.name
            for matrix in pairing.matrices
            if matrix.kind is LayerKind.EMBEDDING or f"{matrix.module}.bias" not in matrix.beside
        ]
        if without:
            raise Unsupported(
                "lora_bias needs a bias in every adapted layer",
                where=without[0],
                found=f"{len(without)} layers without one",
                then="--bias full stores changed biases in full",
            )


def _capped(how: Decomposition, matrix: Matrix) -> Decomposition:
    """Caps the rule one rank above the break-even; at that rank the weight is better stored in full. A quantile rule is
    not capped, because it depends on all the singular values."""
    own = how.rule.rule if isinstance(how.rule, Bounded) else how.rule
    if how.rule.most(min(matrix.sides)) <= matrix.break_even or isinstance(own, QuantileRule):
        return how
    return replace(how, rule=Bounded(how.rule, maximum=matrix.break_even + 1))


def _factors(matrix: Matrix, how: Decomposition, keys: tuple[str, str]) -> list[TensorSpec]:
    """lora_A and lora_B, as large as the rule can make them."""
    out, into = matrix.sides
    width = matrix.matrices * min(how.rule.most(min(out, into)), matrix.break_even)
    inner = matrix.spec.shape[1:] if matrix.kind is LayerKind.CONV else (into,)
    ones = (1,) * (len(inner) - 1)
    return [
        TensorSpec(keys[0], how.dtype, (width, *inner)),
        TensorSpec(keys[1], how.dtype, (out, width, *ones)),
    ]


def _layer_step(pairing: Pairing, matrix: Matrix, how: Decomposition) -> Step:
    name = matrix.spec.name
    module = owner(pairing.known_as(name))
    outputs = _factors(matrix, how, factor_keys(module, matrix.kind))
    if how.dora:
        outputs.append(TensorSpec(magnitude_key(module), DType.F32, magnitude_shape(matrix.kind, matrix.spec.shape)))
    if how.may_be_full:
        outputs.append(_full(matrix.spec, pairing, wrappers=0))
    for other in matrix.beside:
        spec = pairing.tuned.specs[other]
        wrapped = _full(spec, pairing, wrappers=1)
        outputs.append(TensorSpec(bias_key(module), how.dtype, spec.shape) if how.lora_bias else wrapped)
        outputs.append(_full(spec, pairing, wrappers=0))
    inputs = both(pairing, (name, *matrix.beside))
    return Step(name, inputs, tuple(outputs), Factorise(matrix, how), _workspace((matrix,), (how,)), how.may_be_full)


def _parameters_step(pairing: Pairing, matrices: tuple[Matrix, ...], hows: tuple[Decomposition, ...]) -> Step:
    names = [matrix.spec.name for matrix in matrices]
    module = owner(pairing.known_as(names[0]))
    # A key gives a parameter's depth among the adapted parameters, not which one it is.
    outputs: list[TensorSpec] = []
    for keys in parameter_keys(module, names).values():
        offered = [_factors(matrix, how, keys) for matrix, how in zip(matrices, hows, strict=True)]
        outputs += [max(specs, key=lambda spec: spec.nbytes) for specs in zip(*offered, strict=True)]
    inputs = (*names, *matrices[0].beside)
    for name in inputs:
        outputs += [_full(pairing.tuned.specs[name], pairing, wrappers=count) for count in range(len(names) + 1)]
    op = FactoriseParameters(matrices, hows)
    label = names[0] if len(names) == 1 else f"{module} ({len(names)} parameters)"
    shrinks = len(names) > 1 or any(how.may_be_full for how in hows)
    return Step(label, both(pairing, inputs), tuple(outputs), op, _workspace(matrices, hows), shrinks)


def both(pairing: Pairing, names: Iterable[str]) -> tuple[TensorRef, ...]:
    """Each tensor of base, followed by the same tensor of tuned."""
    return tuple(checkpoint.tensor(name) for name in names for checkpoint in (pairing.base, pairing.tuned))


def _workspace(matrices: Iterable[Matrix], hows: Iterable[Decomposition]) -> int:
    """The largest need of one matrix, since they are decomposed one at a time."""
    needs = []
    for matrix, how in zip(matrices, hows, strict=True):
        out, into = matrix.sides
        dense = workspace(out, into, min(out, into)) if how.exact else 0
        needs.append(max(dense, workspace(out, into, how.rule.most(min(out, into))) * (2 if how.dora else 1)))
    return max(needs)


def whole_step(pairing: Pairing, whole: FullTensors) -> Step:
    """The step that compares tensors and stores them in full."""
    base, tuned = pairing.base, pairing.tuned
    known = tuple(name in base.specs for name in whole.names)
    inputs: list[TensorRef] = []
    for name, paired in zip(whole.names, known, strict=True):
        inputs += [base.tensor(name)] if paired else []
        inputs += [tuned.tensor(name)]
    outputs = tuple(_full(pairing.tuned.specs[name], pairing, wrappers=0) for name in whole.names)
    module = owner(pairing.known_as(whole.names[0])) if whole.together else None
    return Step(whole.label, tuple(inputs), outputs, KeepWhole(whole.names, known, module))


def _full(spec: TensorSpec, pairing: Pairing, *, wrappers: int) -> TensorSpec:
    """A tensor under the key where peft finds it."""
    return TensorSpec(full_key(pairing.known_as(spec.name), wrappers=wrappers), spec.dtype, spec.shape)
