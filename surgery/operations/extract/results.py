"""The results that all verbs with factors share: measurements of every weight, and the adapter's config."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from formats.dialects import CONFIG_KEY
from formats.paths import ADAPTER_CONFIG
from surgery.pipeline.plan import Outcome
from surgery.ranks.spectra import Spectrum

if TYPE_CHECKING:
    from formats.destination import Destination
    from surgery.pipeline.job import Done


class Lossy(Protocol):
    """The measurements of one weight's factors."""

    @property
    def residual(self) -> float:
        """‖ΔW − BA‖ / ‖ΔW‖."""

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖."""


L = TypeVar("L", bound=Lossy, covariant=True)


@dataclass(frozen=True, kw_only=True)
class FactorFigures(Generic[L]):
    """The measurements of one or more steps that make factors.

    Attributes:
        modules: every weight that became factors.
        spectra: the known singular values of every changed weight.
        full: tensors that are stored in full.
        saved: modules that are stored whole (peft's `modules_to_save`).
    """

    modules: tuple[L, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    full: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()


def gathered(outcomes: Iterable[Outcome]) -> FactorFigures[Any]:
    """The figures of all steps that made factors, in their order."""
    found = [each.figures for each in outcomes if isinstance(each.figures, FactorFigures)]
    return FactorFigures(
        modules=tuple(module for each in found for module in each.modules),
        spectra=tuple(spectrum for each in found for spectrum in each.spectra),
        full=tuple(name for each in found for name in each.full),
        saved=tuple(name for each in found for name in each.saved),
    )


def changed(modules: Iterable[Lossy]) -> float:
    """Σ‖ΔW‖²."""
    return sum(module.delta_norm**2 for module in modules)


def energy_and_residual(modules: Iterable[Lossy]) -> tuple[float, float]:
    """The share of Σ‖ΔW‖² that the factors of all weights hold, and their relative error."""
    modules = tuple(modules)
    total, left_out = changed(modules), sum((module.delta_norm * module.residual) ** 2 for module in modules)
    return (1.0 - left_out / total, math.sqrt(left_out / total)) if total else (1.0, 0.0)


def put_config(done: Done, destination: Destination, config: Mapping[str, Any]) -> None:
    """Writes an adapter's config: into the output folder, or into the metadata of a single file."""
    assert done.writer is not None
    text = json.dumps(config, indent=2)
    if destination.is_folder:
        done.writer.attach(ADAPTER_CONFIG, text.encode() + b"\n")
    else:
        done.writer.seal({**done.plan.metadata, CONFIG_KEY: text})
