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
    from formats import open_checkpoint as open_checkpoint
    from formats.adapter import Told as Told
    from surgery.errors import FormatError as FormatError
    from surgery.errors import ReportedError as ReportedError
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.onnx.timing.compared import CompareReport as CompareReport
    from surgery.onnx.timing.record import BenchReport as BenchReport
    from surgery.operations.convert.containers import ContainerReport as ContainerReport
    from surgery.operations.convert.containers import convert_container as convert_container
    from surgery.operations.convert.containers import prepare_convert_container as prepare_convert_container
    from surgery.operations.convert.convert import ConvertReport as ConvertReport
    from surgery.operations.convert.convert import convert as convert
    from surgery.operations.convert.convert import prepare_convert as prepare_convert
    from surgery.operations.export.export_onnx import ExportReport as ExportReport
    from surgery.operations.export.export_onnx import export_onnx as export_onnx
    from surgery.operations.export.export_onnx import prepare_export_onnx as prepare_export_onnx
    from surgery.operations.export.into_template import ReweighReport as ReweighReport
    from surgery.operations.export.into_template import prepare_reweigh as prepare_reweigh
    from surgery.operations.export.into_template import reweigh as reweigh
    from surgery.operations.extract.extract import ExtractReport as ExtractReport
    from surgery.operations.extract.extract import extract as extract
    from surgery.operations.extract.extract import prepare_extract as prepare_extract
    from surgery.operations.extract.spectrum import SpectrumReport as SpectrumReport
    from surgery.operations.extract.spectrum import prepare_spectrum as prepare_spectrum
    from surgery.operations.extract.spectrum import spectrum as spectrum
    from surgery.operations.fold.fold import FoldReport as FoldReport
    from surgery.operations.fold.fold import fold as fold
    from surgery.operations.fold.fold import prepare_fold as prepare_fold
    from surgery.operations.latency.bench import bench as bench
    from surgery.operations.latency.bench import prepare_bench as prepare_bench
    from surgery.operations.latency.compare import compare as compare
    from surgery.operations.latency.compare import prepare_compare as prepare_compare
    from surgery.operations.look.diff import DiffReport as DiffReport
    from surgery.operations.look.diff import diff as diff
    from surgery.operations.look.diff import prepare_diff as prepare_diff
    from surgery.operations.look.inspect import InspectReport as InspectReport
    from surgery.operations.look.inspect import inspect as inspect
    from surgery.operations.look.prove import ProveReport as ProveReport
    from surgery.operations.look.prove import prepare_prove as prepare_prove
    from surgery.operations.look.prove import prove as prove
    from surgery.operations.lora.combine import CombineReport as CombineReport
    from surgery.operations.lora.combine import combine as combine
    from surgery.operations.lora.combine import prepare_combine as prepare_combine
    from surgery.operations.lora.resize import ResizeReport as ResizeReport
    from surgery.operations.lora.resize import prepare_resize as prepare_resize
    from surgery.operations.lora.resize import resize as resize
    from surgery.operations.lora.to_lora import ToLoraReport as ToLoraReport
    from surgery.operations.lora.to_lora import prepare_to_lora as prepare_to_lora
    from surgery.operations.lora.to_lora import to_lora as to_lora
    from surgery.operations.merge.merge import MergeReport as MergeReport
    from surgery.operations.merge.merge import merge as merge
    from surgery.operations.merge.merge import prepare_merge as prepare_merge
    from surgery.operations.merge.unmerge import UnmergeReport as UnmergeReport
    from surgery.operations.merge.unmerge import prepare_unmerge as prepare_unmerge
    from surgery.operations.merge.unmerge import unmerge as unmerge
    from surgery.operations.merge.verify import VerifyReport as VerifyReport
    from surgery.operations.merge.verify import prepare_verify as prepare_verify
    from surgery.operations.merge.verify import verify as verify
    from surgery.pipeline.engine import Resources as Resources
    from surgery.pipeline.job import Job as Job
    from surgery.pipeline.job import JobPlan as JobPlan
    from surgery.ranks import Bounded as Bounded
    from surgery.ranks import EnergyRule as EnergyRule
    from surgery.ranks import FixedRank as FixedRank
    from surgery.ranks import QuantileRule as QuantileRule
    from surgery.ranks import RatioRule as RatioRule
    from surgery.ranks import ResidualRule as ResidualRule
    from surgery.ranks import ThresholdRule as ThresholdRule
    from surgery.ranks.budget import Budget as Budget

# Where each public name is defined. Type checkers read the imports above, a program this table.
_HOMES = {
    "BenchReport": "surgery.onnx.timing.record",
    "Bounded": "surgery.ranks",
    "Budget": "surgery.ranks.budget",
    "CombineReport": "surgery.operations.lora.combine",
    "CompareReport": "surgery.onnx.timing.compared",
    "ContainerReport": "surgery.operations.convert.containers",
    "ConvertReport": "surgery.operations.convert.convert",
    "DiffReport": "surgery.operations.look.diff",
    "EnergyRule": "surgery.ranks",
    "ExportReport": "surgery.operations.export.export_onnx",
    "ExtractReport": "surgery.operations.extract.extract",
    "FixedRank": "surgery.ranks",
    "FoldReport": "surgery.operations.fold.fold",
    "FormatError": "surgery.errors",
    "InspectReport": "surgery.operations.look.inspect",
    "Job": "surgery.pipeline.job",
    "JobPlan": "surgery.pipeline.job",
    "MergeReport": "surgery.operations.merge.merge",
    "ProveReport": "surgery.operations.look.prove",
    "QuantileRule": "surgery.ranks",
    "RatioRule": "surgery.ranks",
    "ReportedError": "surgery.errors",
    "ResidualRule": "surgery.ranks",
    "ResizeReport": "surgery.operations.lora.resize",
    "Resources": "surgery.pipeline.engine",
    "ReweighReport": "surgery.operations.export.into_template",
    "SpectrumReport": "surgery.operations.extract.spectrum",
    "SurgeryError": "surgery.errors",
    "ThresholdRule": "surgery.ranks",
    "ToLoraReport": "surgery.operations.lora.to_lora",
    "Told": "formats.adapter",
    "UnmergeReport": "surgery.operations.merge.unmerge",
    "VerifyReport": "surgery.operations.merge.verify",
    "bench": "surgery.operations.latency.bench",
    "combine": "surgery.operations.lora.combine",
    "compare": "surgery.operations.latency.compare",
    "convert": "surgery.operations.convert.convert",
    "convert_container": "surgery.operations.convert.containers",
    "diff": "surgery.operations.look.diff",
    "export_onnx": "surgery.operations.export.export_onnx",
    "extract": "surgery.operations.extract.extract",
    "fold": "surgery.operations.fold.fold",
    "inspect": "surgery.operations.look.inspect",
    "merge": "surgery.operations.merge.merge",
    "open_checkpoint": "formats",
    "prepare_bench": "surgery.operations.latency.bench",
    "prepare_combine": "surgery.operations.lora.combine",
    "prepare_compare": "surgery.operations.latency.compare",
    "prepare_convert": "surgery.operations.convert.convert",
    "prepare_convert_container": "surgery.operations.convert.containers",
    "prepare_diff": "surgery.operations.look.diff",
    "prepare_export_onnx": "surgery.operations.export.export_onnx",
    "prepare_extract": "surgery.operations.extract.extract",
    "prepare_fold": "surgery.operations.fold.fold",
    "prepare_merge": "surgery.operations.merge.merge",
    "prepare_prove": "surgery.operations.look.prove",
    "prepare_resize": "surgery.operations.lora.resize",
    "prepare_reweigh": "surgery.operations.export.into_template",
    "prepare_spectrum": "surgery.operations.extract.spectrum",
    "prepare_to_lora": "surgery.operations.lora.to_lora",
    "prepare_unmerge": "surgery.operations.merge.unmerge",
    "prepare_verify": "surgery.operations.merge.verify",
    "prove": "surgery.operations.look.prove",
    "resize": "surgery.operations.lora.resize",
    "reweigh": "surgery.operations.export.into_template",
    "spectrum": "surgery.operations.extract.spectrum",
    "to_lora": "surgery.operations.lora.to_lora",
    "unmerge": "surgery.operations.merge.unmerge",
    "verify": "surgery.operations.merge.verify",
}

_GONE = {"merge_onnx": "surgery.reweigh(template, model, out, adapters=…) does it"}  # what stands for removed names

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        gone = f": {_GONE[name]}" if name in _GONE else ""
        raise AttributeError(f"module 'surgery' has no attribute {name!r}{gone}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
