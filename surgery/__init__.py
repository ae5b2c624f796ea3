"""Model surgery on saved weight files: extract, merge, unmerge and export adapters, exactly.

    import surgery
    adapter = surgery.extract("base.st", "tuned.st", "adapter", rank=8)
    merged = surgery.merge("base.st", "adapter", "merged.st")

Every function returns a frozen report; every error is a `surgery.ReportedError`. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery.version import __version__

if TYPE_CHECKING:
    from formats import open_checkpoint
    from formats.adapter import Told
    from surgery.budget import Budget
    from surgery.engine import Resources
    from surgery.errors import FormatError, ReportedError, SurgeryError
    from surgery.onnx.compared import CompareReport
    from surgery.onnx.record import BenchReport
    from surgery.operations.bench import bench
    from surgery.operations.combine import CombineReport, combine
    from surgery.operations.compare import compare
    from surgery.operations.containers import ContainerReport, convert_container
    from surgery.operations.convert import ConvertReport, convert
    from surgery.operations.diff import DiffReport, diff
    from surgery.operations.export_onnx import ExportReport, export_onnx
    from surgery.operations.extract import ExtractReport, extract
    from surgery.operations.fold import FoldReport, fold
    from surgery.operations.inspect import InspectReport, inspect
    from surgery.operations.merge import MergeReport, merge
    from surgery.operations.prove import ProveReport, prove
    from surgery.operations.resize import ResizeReport, resize
    from surgery.operations.reweigh import ReweighReport, merge_onnx, reweigh
    from surgery.operations.spectrum import SpectrumReport, spectrum
    from surgery.operations.to_lora import ToLoraReport, to_lora
    from surgery.operations.unmerge import UnmergeReport, unmerge
    from surgery.operations.verify import VerifyReport, verify
    from surgery.ranks import (
        Bounded,
        EnergyRule,
        FixedRank,
        QuantileRule,
        RatioRule,
        ResidualRule,
        ThresholdRule,
    )

_HOMES = {
    "bench": "surgery.operations.bench",
    "BenchReport": "surgery.onnx.record",
    "combine": "surgery.operations.combine",
    "CombineReport": "surgery.operations.combine",
    "compare": "surgery.operations.compare",
    "CompareReport": "surgery.onnx.compared",
    "convert_container": "surgery.operations.containers",
    "ContainerReport": "surgery.operations.containers",
    "convert": "surgery.operations.convert",
    "ConvertReport": "surgery.operations.convert",
    "diff": "surgery.operations.diff",
    "DiffReport": "surgery.operations.diff",
    "export_onnx": "surgery.operations.export_onnx",
    "ExportReport": "surgery.operations.export_onnx",
    "extract": "surgery.operations.extract",
    "ExtractReport": "surgery.operations.extract",
    "fold": "surgery.operations.fold",
    "FoldReport": "surgery.operations.fold",
    "FormatError": "surgery.errors",
    "inspect": "surgery.operations.inspect",
    "InspectReport": "surgery.operations.inspect",
    "merge": "surgery.operations.merge",
    "MergeReport": "surgery.operations.merge",
    "merge_onnx": "surgery.operations.reweigh",
    "open_checkpoint": "formats",
    "prove": "surgery.operations.prove",
    "ProveReport": "surgery.operations.prove",
    "ReportedError": "surgery.errors",
    "resize": "surgery.operations.resize",
    "ResizeReport": "surgery.operations.resize",
    "Resources": "surgery.engine",
    "reweigh": "surgery.operations.reweigh",
    "ReweighReport": "surgery.operations.reweigh",
    "spectrum": "surgery.operations.spectrum",
    "SpectrumReport": "surgery.operations.spectrum",
    "SurgeryError": "surgery.errors",
    "to_lora": "surgery.operations.to_lora",
    "ToLoraReport": "surgery.operations.to_lora",
    "unmerge": "surgery.operations.unmerge",
    "UnmergeReport": "surgery.operations.unmerge",
    "Bounded": "surgery.ranks",
    "EnergyRule": "surgery.ranks",
    "FixedRank": "surgery.ranks",
    "QuantileRule": "surgery.ranks",
    "RatioRule": "surgery.ranks",
    "ResidualRule": "surgery.ranks",
    "ThresholdRule": "surgery.ranks",
    "Told": "formats.adapter",
    "Budget": "surgery.budget",
    "verify": "surgery.operations.verify",
    "VerifyReport": "surgery.operations.verify",
}

__all__ = [
    "BenchReport",
    "Bounded",
    "Budget",
    "CombineReport",
    "CompareReport",
    "ContainerReport",
    "ConvertReport",
    "DiffReport",
    "EnergyRule",
    "ExportReport",
    "ExtractReport",
    "FixedRank",
    "FoldReport",
    "FormatError",
    "InspectReport",
    "MergeReport",
    "ProveReport",
    "QuantileRule",
    "RatioRule",
    "ReportedError",
    "ResidualRule",
    "ResizeReport",
    "Resources",
    "ReweighReport",
    "SpectrumReport",
    "SurgeryError",
    "ThresholdRule",
    "ToLoraReport",
    "Told",
    "UnmergeReport",
    "VerifyReport",
    "__version__",
    "bench",
    "combine",
    "compare",
    "convert",
    "convert_container",
    "diff",
    "export_onnx",
    "extract",
    "fold",
    "inspect",
    "merge",
    "merge_onnx",
    "open_checkpoint",
    "prove",
    "resize",
    "reweigh",
    "spectrum",
    "to_lora",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
