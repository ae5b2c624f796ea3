"""The methods, one file each. A new method is a file here and its name in one of the two tuples.

Other distributions register theirs by entry points of the group `surgery.methods` (docs/extending.md); one loads when
an adapter is of a method that is none of ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.plugins import plugin_named
from formats.spec import TensorSpec
from surgery.errors import NotMergeable
from surgery.methods.adalora import AdaLora
from surgery.methods.adapterhub import OutputDora, SquareVera
from surgery.methods.base import AdditiveMethod, Spacious, TransformingMethod
from surgery.methods.beft import Beft
from surgery.methods.boft import Boft
from surgery.methods.c3a import C3a
from surgery.methods.deft import Deft
from surgery.methods.delora import DeLora
from surgery.methods.dora import Dora, DoraAround
from surgery.methods.fourierft import FourierFt
from surgery.methods.full import Full
from surgery.methods.glora import Glora
from surgery.methods.gralora import GraLora
from surgery.methods.hira import Hira
from surgery.methods.hra import Hra
from surgery.methods.ia3 import Ia3
from surgery.methods.llamacpp import PairedLora, RowsLora
from surgery.methods.loha import LoHa
from surgery.methods.lokr import LoKr
from surgery.methods.lora import Lora, LoraBias
from surgery.methods.loralib import FusedLora, KernelLora
from surgery.methods.lycoris import DifferenceIa3, OutputBoft, OutputOft, ProductGlora
from surgery.methods.miss import Miss, MissBat
from surgery.methods.oft import Oft
from surgery.methods.peanut import Peanut
from surgery.methods.randlora import RandLora
from surgery.methods.road import Road
from surgery.methods.sparse import Shira, Supertuning, WaveFt
from surgery.methods.tucker import TuckerLora
from surgery.methods.vblora import UniLora, VbLora
from surgery.methods.vera import PVera, Vera

_BLOCK = 8 << 20  # bytes that a block of rows takes, with what a product makes of it

Method = AdditiveMethod | TransformingMethod

ADDITIVE: tuple[AdditiveMethod, ...] = (
    Lora(),
    LoraBias(),
    FusedLora(),
    KernelLora(),
    PairedLora(),
    RowsLora(),
    TuckerLora(),
    Full(),
    AdaLora(),
    Beft(),
    C3a(),
    DeLora(),
    FourierFt(),
    GraLora(),
    LoHa(),
    LoKr(),
    Miss(),
    PVera(),
    RandLora(),
    Shira(),
    SquareVera(),
    Supertuning(),
    UniLora(),
    VbLora(),
    Vera(),
    WaveFt(),
)
TRANSFORMING: tuple[TransformingMethod, ...] = (
    Dora(),
    DoraAround("dora_loha", LoHa()),
    DoraAround("dora_lokr", LoKr()),
    DoraAround("dora_tucker", TuckerLora()),
    Boft(),
    Deft(),
    DifferenceIa3(),
    Glora(),
    Hira(),
    Hra(),
    Ia3(),
    MissBat(),
    Oft(),
    OutputBoft(),
    OutputDora(),
    OutputOft(),
    Peanut(),
    ProductGlora(),
    Road(),
)


GROUP = "surgery.methods"  # of other distributions' entry points
METHODS: tuple[Method, ...] = (*ADDITIVE, *TRANSFORMING)
_OURS = {method.name: method for method in METHODS}
_KINDS = (AdditiveMethod, TransformingMethod)


def method_named(name: str) -> Method:
    """The method of that name, ours or another distribution's.

    Raises:
        NotMergeable: nobody has it.
        PluginError: the distribution that has it is broken.
    """
    method: Method | None = _OURS.get(name) or plugin_named(GROUP, name, _OURS, _KINDS)
    if method is None:
        raise NotMergeable("no such method here", expected=", ".join(_OURS), found=name)
    return method


def additive(module: AdapterModule) -> AdditiveMethod | None:
    """The method of an adapted module, if it adds to the weight. Raises as `method_named`."""
    method = method_named(module.method)
    return method if isinstance(method, AdditiveMethod) else None


def transforming(module: AdapterModule) -> TransformingMethod | None:
    """The method of an adapted module, if it makes another weight of it. Raises as `method_named`."""
    method = method_named(module.method)
    return method if isinstance(method, TransformingMethod) else None


def workspace(modules: Sequence[tuple[AdapterModule, float]], weight: TensorSpec) -> int:
    """Bytes that merging modules into one weight, or unmerging them, needs in addition to the tensors themselves."""
    total = _BLOCK
    for module, _ in modules:
        method = method_named(module.method)
        copies = 16 * sum(ref.spec.size for ref in module.factors.values())  # in float64, and once more in fixed point
        total += method.workspace(module, weight) if isinstance(method, Spacious) else copies
    return total


def check_modules(modules: Sequence[tuple[AdapterModule, float]], weight: TensorSpec) -> None:
    """Refuses, while planning, modules that cannot be merged into one weight.

    Args:
        modules: all modules that adapt the weight, each with the factor of its delta.
        weight: the weight as the base stores it.

    Raises:
        NotMergeable: a method is unknown or not defined for this weight, or modules cannot be combined.
        ShapeMismatch: factors do not fit the weight.
    """
    for module, strength in modules:
        method_named(module.method).check(module, weight)
        if transforming(module) and strength != 1:
            raise NotMergeable(
                f"{module.method} is no delta: it cannot be applied more strongly or weakly",
                where=weight.name,
                expected="a weight of 1",
                found=strength,
            )
        if transforming(module) and len(modules) > 1:
            raise NotMergeable(
                f"{module.method} is no delta: nothing can be added beside it",
                where=weight.name,
                found=", ".join(other.method for other, _ in modules),
            )
    # A stack of matrices and a convolution are flattened differently, so their blocks of rows would not match.
    if len(weight.shape) > 2 and len({module.kind is LayerKind.CONV for module, _ in modules}) > 1:
        raise NotMergeable("one adapter takes this weight for a convolution, another for a stack", where=weight.name)
