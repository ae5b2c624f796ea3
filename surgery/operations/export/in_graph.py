"""The interface that export-onnx needs of adapters in a graph, be they factors of weights or separate nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from formats.spec import DType, TensorRef
from surgery.onnx.against_torch.lora import Agreement
from surgery.onnx.against_torch.model import Verification
from surgery.onnx.files.payload import Payloads
from surgery.onnx.trace.program import Exportable
from surgery.onnx.trace.template import Template
from surgery.pipeline.plan import Fate


@dataclass(frozen=True)
class WithAdapters:
    """A model's templates with adapters in their graphs.

    Attributes:
        templates: one for each graph.
        payloads: payloads of their weights.
        reads: the tensors that a weight is made of, by name, for weights that the model does not have.
    """

    templates: tuple[Template, ...]
    payloads: Payloads
    reads: Mapping[str, tuple[TensorRef, ...]]


@dataclass(frozen=True)
class Trial:
    """Graphs that are compared with torch before they appear under their names.

    Attributes:
        model: the model and how it is used.
        plain: the model's graphs by prefix, pointing into the payload.
        graphs: the same graphs with the adapters in them.
        payload: file descriptors of the weights, by the file names that the graphs refer to.
        dtype: dtype of the weights.
    """

    model: Exportable
    plain: Mapping[str, bytes]
    graphs: Mapping[str, bytes]
    payload: Mapping[str, int]
    dtype: DType


class AdaptersInGraph(Protocol):
    """Opened adapters that go into the graphs of one model."""

    @property
    def way(self) -> str:
        """The form that they have in the graph; empty without adapters."""

    @property
    def adapted(self) -> tuple[str, ...]:
        """The weights or modules that an adapter is attached to."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the graph should know."""

    @property
    def fates(self) -> list[Fate]:
        """The fate of each of the adapters' tensors."""

    def put(self, templates: Sequence[Template]) -> WithAdapters:
        """Puts them into the templates' graphs. Raises Unsupported for a graph that does not look as expected."""

    def compare(self, trial: Trial) -> tuple[Verification, Agreement | None]:
        """Compares the graphs with torch. If the model alone is compared too, the second result is for the graphs with
        adapters.

        Raises:
            VerificationFailed, Unsupported: as `verify_graphs`, `check_graft` and `check_grafted`.
        """
