"""surgery.testing.check_method: ours and the guide's keep the laws, and each broken law is told by its name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from places import ROOT

from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta
from surgery.methods import METHODS
from surgery.methods.base import AdditiveMethod
from surgery.testing import check_method

sys.path.insert(0, str(ROOT / "examples" / "extending"))
from row_lora import ROW_LORA, RowLora

LORA = {"lora_A": (4, 8), "lora_B": (12, 4)}
SHAPES = {**LORA, "row_d": (12,)}
SIZES = {"out": 12, "in": 8, "largest_out": 12, "largest_in": 8}
CASES: dict[str, tuple[Mapping[str, tuple[int, ...]], dict[str, Any]]] = {
    "lora": (LORA, {}),
    "dora": ({**LORA, "lora_magnitude_vector": (12,)}, {}),
    "hira": ({"hira_A": (4, 8), "hira_B": (12, 4)}, {}),
    "loha": ({f"hada_w{n}_{side}": shape for n in "12" for side, shape in (("a", (12, 4)), ("b", (4, 8)))}, {}),
    "lokr": ({"lokr_w1": (3, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 2)}, {"rank": 2}),
    "boft": ({"boft_R": (1, 2, 4, 4), "boft_s": (12, 1)}, {}),
    "hra": ({"hra_u": (8, 3)}, {"settings": {"apply_GS": False}}),
    "ia3": ({"ia3_l": (12, 1)}, {"settings": {"feedforward": False}}),
    "full": ({"diff": (12, 8)}, {"scaled": False}),
    "vera": (
        {"vera_A": (4, 8), "vera_B": (12, 4), "vera_lambda_b": (12,), "vera_lambda_d": (4,)},
        {"scaled": False, "settings": {"r": 4, "projection_prng_key": 0, **SIZES}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_our_methods_keep_the_laws(name: str) -> None:
    """Deltas and transformations, with alpha and without."""
    factors, how = CASES[name]
    check_method(next(method for method in METHODS if method.name == name), factors, **how)


@pytest.mark.parametrize("kind", [LayerKind.LINEAR, LayerKind.TRANSPOSED, LayerKind.EMBEDDING])
def test_the_guides_method_keeps_the_laws(kind: LayerKind) -> None:
    """However the layer stores its weight, and without being installed."""
    check_method(ROW_LORA, SHAPES, kind=kind, weight=(12, 8) if kind is LayerKind.LINEAR else (8, 12))


@dataclass(frozen=True)
class _Rows:
    """A delta that is changed before it is handed out."""

    delta: Delta
    law: str

    @property
    def columns(self) -> int:
        return self.delta.columns + (self.law == "shape")

    def rows(self, begin: int, end: int) -> torch.Tensor:
        rows = self.delta.rows(begin, end)
        return rows.float() if self.law == "float64" else rows * (end - begin) if self.law == "blocks" else rows


@dataclass(frozen=True)
class Broken(RowLora):
    """RowLoRA with one law broken."""

    law: str
    name: str = "broken"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """By the file, by an unpacking that fails, or not at all."""
        if self.law == "paths":
            open(module.factors["lora_A"].checkpoint.path).close()
        if self.law == "traceback":
            (_,) = module.factors["row_d"].spec.shape
        if self.law != "unchecked":
            super().check(module, weight)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """Another than it should be."""
        if self.law == "strength":
            weight = abs(weight)
        if self.law == "alpha":
            module = replace(module, alpha=module.alpha**2)
        if self.law == "overwrites":
            factors["row_d"].mul_(2)
        return _Rows(super().delta(module, factors, weight), self.law)


LAWS = {
    "shape": "has the weight's shape",
    "float64": "computed in float64",
    "blocks": "same bits whatever the blocks",
    "strength": "linear in its strength",
    "alpha": "proportional to alpha",
    "overwrites": "not written to",
    "unchecked": "is not refused",
    "traceback": "ends in a traceback",
}


@pytest.mark.parametrize("law", LAWS)
def test_a_broken_law_is_told(law: str) -> None:
    """With what, where, and the two sides."""
    with pytest.raises(AssertionError, match=LAWS[law]) as error:
        check_method(Broken(law), SHAPES)
    assert "where:" in str(error.value)


def test_a_method_gets_no_path() -> None:
    """The factors' path leads nowhere, so whoever opens it fails."""
    with pytest.raises(FileNotFoundError):
        check_method(Broken("paths"), SHAPES)


def test_a_name_of_ours_is_refused() -> None:
    """Another class under the name of one of surgery's methods."""
    with pytest.raises(AssertionError, match="the name is taken"):
        check_method(Broken("", name="lora"), SHAPES)


def test_a_class_without_a_formula_cannot_be_made() -> None:
    """What the protocol asks for is abstract."""
    with pytest.raises(TypeError, match="delta"):
        type("Nothing", (AdditiveMethod,), {"name": "nothing", "check": lambda *_: None})()
