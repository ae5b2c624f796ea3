"""What export-onnx asks of adapters that it puts into a graph, whether they are factors of weights or nodes of their
own."""

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
        payloads: of their weights.
        reads: the tensors that a weight is made of, by name, where it is none of the model's own.
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
        graphs: the same with the adapters in them.
        payload: descriptors of the weights' files, by the names that the graphs look for.
        dtype: of the weights.
    """

    model: Exportable
    plain: Mapping[str, bytes]
    graphs: Mapping[str, bytes]
    payload: Mapping[str, int]
    dtype: DType


class AdaptersInGraph(Protocol):
    """Adapters that were opened to be put into one model's graphs."""

    @property
    def way(self) -> str:
        """In which form they are in the graph; empty without any."""

    @property
    def adapted(self) -> tuple[str, ...]:
        """The weights or modules that something is put to."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the graph should know."""

    @property
    def fates(self) -> list[Fate]:
        """What becomes of each of the adapters' tensors."""

    def put(self, templates: Sequence[Template]) -> WithAdapters:
        """Puts them into the templates' graphs. Raises Unsupported for a graph that does not look as expected."""

    def compare(self, trial: Trial) -> tuple[Verification, Agreement | None]:
        """How the graphs compare with torch; where the model alone is compared too, the second says how those with
        adapters do.

        Raises:
            VerificationFailed, Unsupported: as `verify_graphs`, `check_graft` and `check_grafted`.
        """
