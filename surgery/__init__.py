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
    from surgery.errors import FormatError, ReportedError, SurgeryError
    from surgery.onnx.timing.compared import CompareReport
    from surgery.onnx.timing.record import BenchReport
    from surgery.operations.convert.containers import ContainerReport, convert_container, prepare_convert_container
    from surgery.operations.convert.convert import ConvertReport, convert, prepare_convert
    from surgery.operations.export.export_onnx import ExportReport, export_onnx
    from surgery.operations.export.into_template import ReweighReport, merge_onnx, reweigh
    from surgery.operations.extract.extract import ExtractReport, extract
    from surgery.operations.extract.spectrum import SpectrumReport, spectrum
    from surgery.operations.fold.fold import FoldReport, fold, prepare_fold
    from surgery.operations.latency.bench import bench
    from surgery.operations.latency.compare import compare
    from surgery.operations.look.diff import DiffReport, diff
    from surgery.operations.look.inspect import InspectReport, inspect
    from surgery.operations.look.prove import ProveReport, prove
    from surgery.operations.lora.combine import CombineReport, combine
    from surgery.operations.lora.resize import ResizeReport, resize
    from surgery.operations.lora.to_lora import ToLoraReport, to_lora
    from surgery.operations.merge.merge import MergeReport, merge
    from surgery.operations.merge.unmerge import UnmergeReport, unmerge
    from surgery.operations.merge.verify import VerifyReport, verify
    from surgery.pipeline.engine import Resources
    from surgery.ranks import (
        Bounded,
        EnergyRule,
        FixedRank,
        QuantileRule,
        RatioRule,
        ResidualRule,
        ThresholdRule,
    )
    from surgery.ranks.budget import Budget

_HOMES = {
    "bench": "surgery.operations.latency.bench",
    "BenchReport": "surgery.onnx.timing.record",
    "combine": "surgery.operations.lora.combine",
    "CombineReport": "surgery.operations.lora.combine",
    "compare": "surgery.operations.latency.compare",
    "CompareReport": "surgery.onnx.timing.compared",
    "convert_container": "surgery.operations.convert.containers",
    "ContainerReport": "surgery.operations.convert.containers",
    "convert": "surgery.operations.convert.convert",
    "ConvertReport": "surgery.operations.convert.convert",
    "diff": "surgery.operations.look.diff",
    "DiffReport": "surgery.operations.look.diff",
    "export_onnx": "surgery.operations.export.export_onnx",
    "ExportReport": "surgery.operations.export.export_onnx",
    "extract": "surgery.operations.extract.extract",
    "ExtractReport": "surgery.operations.extract.extract",
    "fold": "surgery.operations.fold.fold",
    "FoldReport": "surgery.operations.fold.fold",
    "FormatError": "surgery.errors",
    "inspect": "surgery.operations.look.inspect",
    "InspectReport": "surgery.operations.look.inspect",
    "merge": "surgery.operations.merge.merge",
    "MergeReport": "surgery.operations.merge.merge",
    "merge_onnx": "surgery.operations.export.into_template",
    "open_checkpoint": "formats",
    "prepare_convert": "surgery.operations.convert.convert",
    "prepare_convert_container": "surgery.operations.convert.containers",
    "prepare_fold": "surgery.operations.fold.fold",
    "prove": "surgery.operations.look.prove",
    "ProveReport": "surgery.operations.look.prove",
    "ReportedError": "surgery.errors",
    "resize": "surgery.operations.lora.resize",
    "ResizeReport": "surgery.operations.lora.resize",
    "Resources": "surgery.pipeline.engine",
    "reweigh": "surgery.operations.export.into_template",
    "ReweighReport": "surgery.operations.export.into_template",
    "spectrum": "surgery.operations.extract.spectrum",
    "SpectrumReport": "surgery.operations.extract.spectrum",
    "SurgeryError": "surgery.errors",
    "to_lora": "surgery.operations.lora.to_lora",
    "ToLoraReport": "surgery.operations.lora.to_lora",
    "unmerge": "surgery.operations.merge.unmerge",
    "UnmergeReport": "surgery.operations.merge.unmerge",
    "Bounded": "surgery.ranks",
    "EnergyRule": "surgery.ranks",
    "FixedRank": "surgery.ranks",
    "QuantileRule": "surgery.ranks",
    "RatioRule": "surgery.ranks",
    "ResidualRule": "surgery.ranks",
    "ThresholdRule": "surgery.ranks",
    "Told": "formats.adapter",
    "Budget": "surgery.ranks.budget",
    "verify": "surgery.operations.merge.verify",
    "VerifyReport": "surgery.operations.merge.verify",
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
    "prepare_convert",
    "prepare_convert_container",
    "prepare_fold",
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
