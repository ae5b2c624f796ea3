"""convert: rewrites an adapter from one dialect into another. Tensors that only change their name are copied unchanged.

`formats.dialects` defines what each output tensor is made of; this module plans and runs it, and knows no dialect.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from formats.adapter import NOTHING_TOLD, Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.containers import Container, container_named
from formats.destination import Destination
from formats.dialects import (
    CONFIG_KEY,
    AdapterFile,
    dialect_named,
    names_asking,
    open_adapter_file,
    refuse_unasked,
    writer_named,
)
from formats.dialects.dialect import Dialect
from formats.dialects.writing import DROPS, DialectWriter, Making, Piece, Wanted, Written, joined, taken, turned
from formats.errors import AdapterFormatError, NotExpressible
from formats.layers import layer_kinds, owner
from formats.open_files import OpenFiles
from formats.paths import ADAPTER_CONFIG
from formats.spec import TensorSpec
from surgery.exact.finite import check_finite
from surgery.exact.rounding import round_once
from surgery.methods.llamacpp import halved, paired
from surgery.methods.loha import cored
from surgery.model.base_model import BaseModel
from surgery.model.names import in_model_names, read_adapter
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.pipeline.ops import Copy
from surgery.pipeline.plan import Fate, Outcome, Plan, Step, ledger
from surgery.receipts.receipt import TOOL
from surgery.report import Report, Stopwatch

if TYPE_CHECKING:
    import torch

Bases = str | Path | Mapping[str, str | Path] | None  # one model, or one for each part of a pipeline
Models = BaseModel | Mapping[str, BaseModel] | None  # the same, opened


@dataclass(frozen=True, kw_only=True)
class ConvertReport(Report):
    """What convert did.

    Attributes:
        source: the dialect that was read.
        target: the dialect that was written.
        component: the part of a pipeline; empty if it was not given.
        weights: number of adapted weights and biases, by method.
        copied: number of output tensors copied from the source unchanged.
        computed: number of output tensors that were transposed, multiplied, or put together.
    """

    source: str
    target: str
    component: str
    weights: Mapping[str, int]
    copied: int
    computed: int


@dataclass(frozen=True)
class Make:
    """An output tensor computed in float64 from its sources, rounded once."""

    piece: Piece

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """The tensor, in the output's shape and dtype."""
        piece = self.piece
        result = _made(piece, inputs).mul(piece.factor).add(piece.offset) if inputs else _constant(piece)
        if piece.heads:
            rows = result.mT if piece.across else result
            rows = paired(rows, piece.heads) if piece.heads > 0 else halved(rows, -piece.heads)
            result = rows.mT if piece.across else rows
        result = _laid(piece, result) if piece.laid else result.reshape(piece.output.shape)
        rounded = round_once(result.contiguous(), piece.output.dtype)
        check_finite(rounded, piece.output.name)
        return Outcome((rounded,), {ref.name: Fate.CONVERTED for ref in piece.sources})


def _constant(piece: Piece) -> torch.Tensor:
    import torch

    return torch.full(piece.output.shape, piece.factor, dtype=torch.float64)


def _laid(piece: Piece, made: torch.Tensor) -> torch.Tensor:
    """Places the blocks of rows of `made` where the output has them.  # (blocks · height, width)"""
    count = 1 + max(block for block in piece.laid if block is not None)
    blocks = made.flatten(1).chunk(count)
    whole = made.new_full(piece.output.shape, piece.fill)
    for place, block in zip(whole.chunk(len(piece.laid)), piece.laid, strict=True):
        if block is not None:
            height, width = blocks[block].shape
            place[:height, :width] = blocks[block]
    return whole


def _made(piece: Piece, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The output before its factor.  # float64"""
    if piece.making is Making.CORED:
        core, a = inputs  # (rank, rank, *kernel), (rank, in, 1, …)
        kernel = piece.output.shape[2:]
        return cored(core, a.flatten(1)).reshape(a.shape[0], a.shape[1], *kernel)
    if piece.making in (Making.TURNED, Making.TURNED_BLOCKS):
        return _made(turned(piece), inputs).mT
    tensor = inputs[0].double()
    if piece.making is Making.BLOCKS:
        count = sum(piece.enabled)
        height, rank = tensor.shape[0] // count, tensor.shape[1]
        blocks = tensor.new_zeros(height * len(piece.enabled), count * rank)
        places = [index for index, enabled in enumerate(piece.enabled) if enabled]
        for column, (place, block) in enumerate(zip(places, tensor.chunk(count), strict=True)):
            blocks[place * height : (place + 1) * height, column * rank : (column + 1) * rank] = block
        return blocks
    return tensor


def prepare_convert(
    adapter: str | Path,
    out: str | Path,
    to: str,
    *,
    base: Bases = None,
    told: Told = NOTHING_TOLD,
    drop: Iterable[str] = (),
    force: bool = False,
    resources: Resources | None = None,
) -> Job[ConvertReport]:
    """Prepares a job that writes an adapter in another dialect, with the same ΔW.

    Args:
        adapter: a folder or a file in any dialect that merge reads.
        out: a folder, or a `.safetensors`/`.st` file, which holds peft's config in its metadata. For "gguf" a `.gguf`
            file, for "ort" a folder or an `.onnx_adapter` file.
        to: "peft", "kohya", "lycoris", "comfyui", "diffusers", "loralib", "adapterhub", "gguf" or "ort".
        base: the model that it adapts; for LoRA, dialects with dotted names do not need it. For an adapter of several
            parts of a pipeline, each part's model by its name: {"unet": …, "text_encoder": …}; the output is one file.
        told: alpha and layout of loralib's files; the part of a pipeline.
        drop: "bias", "full", "layer": what to drop if the dialect cannot express it.
        force: overwrite whatever exists at `out`.
        resources: threads and memory.

    Raises:
        AdapterFormatError: the dialect cannot express something, or the source lacks information.
        FormatError: as merge.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    source, models = open_adapter_file(adapter, files), open_bases(base, files)
    plan, written, read = plan_convert(source, to, models, told, drop)
    bases = models.values() if isinstance(models, Mapping) else (models,)
    inputs = (source.path, *(model.path for model in bases if model is not None))
    weights = writer_named(to).weights
    container = container_named(weights) or Container.SAFETENSORS
    destination = Destination(Path(out), weights, inputs=inputs, force=force, container=container)
    if written.config is not None:
        text = json.dumps(written.config, indent=2)
        if destination.is_folder:
            destination = replace(destination, attachments={ADAPTER_CONFIG: text.encode() + b"\n"})
        else:
            plan = replace(plan, metadata={**plan.metadata, CONFIG_KEY: text})
    copied = sum(piece.is_copy for piece in written.pieces)
    beside = Outcome((), _beside(source.checkpoint, read, written))

    def finish(done: Done) -> Callable[[Header], ConvertReport]:
        return lambda header: ConvertReport(
            **{**header, "ledger": ledger((*done.outcomes, beside))},
            source=read.dialect,
            target=to,
            component=told.component or read.component,
            weights=dict(Counter(module.method for module in read.modules)),
            copied=copied,
            computed=len(written.pieces) - copied,
        )

    return step_by_step(
        plan,
        files=files,
        watch=watch,
        inputs=inputs,
        finish=finish,
        destination=destination,
        resources=resources,
    )


convert = runs(prepare_convert)


def open_bases(base: Bases, files: OpenFiles) -> Models:
    """The models that an adapter adapts, opened. Raises as `open_checkpoint`."""
    if isinstance(base, Mapping):
        return {part: BaseModel.open(path, files) for part, path in base.items()}
    return None if base is None else BaseModel.open(base, files)


def plan_convert(
    adapter: AdapterFile, to: str, base: Models = None, told: Told = NOTHING_TOLD, drop: Iterable[str] = ()
) -> tuple[Plan, Written, Adapter]:
    """Plans what each output tensor is made of; reads only headers and scaling factors.

    Args:
        adapter: the opened adapter.
        base: the opened base.
        to, told, drop: as for `convert`.

    Raises:
        AdapterFormatError, FormatError: as `convert`.
    """
    writer, source, target = writer_named(to), adapter.dialect, dialect_named(to)
    unknown = set(drop) - set(DROPS)
    if unknown:
        raise AdapterFormatError(
            "--drop does not know this name",
            expected=", ".join(DROPS),
            found=", ".join(unknown),
            then="pass one of those",
        )
    conversion = _Conversion(adapter, writer, target, frozenset(drop))
    if isinstance(base, Mapping):
        if not (source.in_parts and target.in_parts) or told.component is not None:
            raise AdapterFormatError(
                "several bases were given, one for each part of a pipeline, but this conversion has only one part",
                where=adapter.path,
                expected=f"dialects of several parts ({names_asking('component')}), and no component",
                found=f"{source.name} → {to}, component {told.component}",
                then="name one base: --base PATH",
            )
        done = [conversion.part(model, replace(told, component=part)) for part, model in base.items()]
        written = joined([each for each, _ in done])
        parts = [read for _, read in done]
        left = set(parts[0].left).intersection(*(part.left for part in parts))
        read = replace(
            parts[0],
            modules=tuple(module for part in parts for module in part.modules),
            component=", ".join(base),
            left=tuple(sorted(left)),
        )
    elif (
        source is target and told == NOTHING_TOLD and not drop and container_named(writer.weights) is not Container.GGUF
    ):
        written, read = conversion.copied()
    else:
        written, read = conversion.part(base, told)
    notes = [*written.notes]
    if source.has_head(adapter.path):
        notes.append("the head stored with the adapter was not converted; merge and fold keep it")
    if read.left:
        notes.append(f"{len(read.left)} tensors of other parts of the pipeline were not converted")
    if written.dropped:
        notes.append(f"{len(written.dropped)} tensors were dropped, as requested")
    metadata = {**written.metadata, "surgery": f"{TOOL} convert"}
    return Plan("convert", tuple(_step(piece) for piece in written.pieces), metadata, tuple(notes)), written, read


@dataclass(frozen=True)
class _Conversion:
    """One conversion: the adapter, its writer, and what to drop."""

    adapter: AdapterFile
    writer: DialectWriter
    target: Dialect
    drop: frozenset[str]

    def part(self, base: BaseModel | None, told: Told) -> tuple[Written, Adapter]:
        """The adapter of one base, as it will be written and as it was read."""
        source = self.adapter.dialect
        refuse_unasked(told, (source,), self.adapter.path, (self.target,))
        specs = base_specs(self.adapter, base, told)
        if base is None:
            read = found = self.adapter.read(specs, told=told)
        else:
            read = found = read_adapter(base, self.adapter, specs, told)
        if base is not None and self.target.in_peft_names:
            found, specs = in_model_names(base, read, specs)
        # Without a base no biases are known, and only a bias shows that a layer called `time_emb` is no embedding.
        kinds = layer_kinds(specs) if source.lays_out_by_weight and base is not None else {}
        name, model = ("", {}) if base is None else (str(base.path), base.config)
        wanted = Wanted(specs, name, told.component or read.component, self.drop, kinds, model)
        found, beyond = self._without_layers(found, wanted) if "layer" in self.drop else (found, ())
        written = self.writer.write(found, self.adapter.checkpoint.metadata, wanted)
        return replace(written, dropped=(*written.dropped, *beyond)), read

    def _without_layers(self, adapter: Adapter, wanted: Wanted) -> tuple[Adapter, tuple[str, ...]]:
        """The adapter without the layers that the dialect refuses one by one, and the names of their tensors."""
        wanted = replace(wanted, drop=frozenset(DROPS))
        layers: dict[str, list[AdapterModule]] = {}
        for module in adapter.modules:
            layers.setdefault(owner(module.target), []).append(module)
        refused: list[AdapterModule] = []
        for modules in layers.values():
            try:
                self.writer.write(replace(adapter, modules=tuple(modules), replacements=()), {}, wanted)
            except NotExpressible:
                refused += modules
            except AdapterFormatError:
                continue  # this concerns the whole adapter: writing it raises the error
        beyond = {owner(module.target) for module in refused}
        kept = tuple(module for module in adapter.modules if owner(module.target) not in beyond)
        if refused and not kept:
            raise AdapterFormatError(
                f"{self.writer.name} can express none of the adapter's layers",
                where=self.adapter.path,
                then="choose another dialect with --to",
            )
        return replace(adapter, modules=kept), tuple(ref.name for each in refused for ref in each.factors.values())

    def copied(self) -> tuple[Written, Adapter]:
        """The adapter as it is."""
        checkpoint, source = self.adapter.checkpoint, self.adapter.dialect.name
        pieces = tuple(taken(name, checkpoint.tensor(name)) for name in checkpoint.specs)
        metadata = {key: text for key, text in checkpoint.metadata.items() if key != CONFIG_KEY}
        note = f"the adapter is already in {source}: copied unchanged"
        return Written(pieces, metadata, self.adapter.config, (), (note,)), Adapter(checkpoint.ref, source, {}, (), ())


def _step(piece: Piece) -> Step:
    if piece.is_copy:
        return Step(piece.output.name, piece.sources, (piece.output,), Copy(piece.sources[0].name))
    elements = max([piece.output.size, *(ref.spec.size for ref in piece.sources)])
    return Step(piece.output.name, piece.sources, (piece.output,), Make(piece), 8 * 4 * elements)


def base_specs(adapter: AdapterFile, base: BaseModel | None, told: Told) -> Mapping[str, TensorSpec]:
    """The base's tensors, or the tensors that the adapter's own factors imply. Raises AdapterFormatError if the factors
    do not determine them."""
    if base is not None:
        return base.specs
    return adapter.dialect.implied_base(adapter.checkpoint, adapter.config, told)


def _beside(checkpoint: Checkpoint, adapter: Adapter, written: Written) -> dict[str, Fate]:
    """The fates of the source's tensors that are in no output: alphas are in settings or other tensors, and second
    copies of tied weights follow from the first."""
    used = {ref.name for piece in written.pieces for ref in piece.sources}
    refused = {*written.dropped, *adapter.left}
    return {
        name: Fate.REFUSED if name in refused else Fate.CONVERTED if name.endswith(".alpha") else Fate.IDENTICAL
        for name in checkpoint.specs
        if name not in used
    }
