"""convert without a change of dialect: writes the same tensors in another container.

Tied weights: torch's container can hold one tensor under several names; safetensors cannot. If the config.json next to
the weights ties the embeddings, the names tied to the embedding are omitted, as transformers' save_pretrained does:
from_pretrained ties them again, and the embedding is not stored twice. If nothing declares the tie, an omitted name
would be missing when the file is loaded, so every name is written in full. The notes report which of the two happened.
All other tensors, overlapping views included, are written separately. `formats.torch_file` does all this while reading,
so every verb sees the same tensors that the converted file has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from formats.checkpoint import Checkpoint
from formats.containers import Container, container_named
from formats.destination import Destination, destination_like, named_in
from formats.dialects import CONFIG_KEY
from formats.errors import AdapterFormatError, FormatError
from formats.model_config import CONFIG, parsed_config
from formats.open_files import OpenFiles
from formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS, container_of, open_checkpoint
from formats.sharded import ShardedCheckpoint
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.pipeline.ops import Copy, output_digest
from surgery.pipeline.plan import Plan, Step
from surgery.report import Report, Stopwatch

_MODELS = (Container.SAFETENSORS, Container.TORCH)  # the containers that can hold a model
_OF_TORCH = {"format": "pt"}  # metadata that transformers requires in a safetensors file; torch's container implies it


@dataclass(frozen=True, kw_only=True)
class ContainerReport(Report):
    """The containers that were read and written.

    Attributes:
        source: the container that was read: "torch", "safetensors, 3 shards" ….
        container: the container that was written.
        digest: content address of all tensors; it is the same in every container.
    """

    source: str
    container: str
    digest: str


def prepare_convert_container(
    source: str | Path,
    out: str | Path,
    *,
    container: str | None = None,
    max_shard_size: int | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> Job[ContainerReport]:
    """Prepares a job that writes the tensors of a file or folder in another container, byte for byte.

    Args:
        source: a safetensors or torch file, an index of shards, or a folder of a model or an adapter.
        out: a `.safetensors`/`.st` file; a `.bin`, `.pt`, `.pth` or `.ckpt` file in torch's container; or a folder,
            which gets the weights in the source's shards, and the source folder's other files.
        container: container of an output folder: "safetensors" (the default) or "torch".
        max_shard_size: largest size of a shard in an output folder, in bytes; by default the source's shards are kept.
        force: overwrite whatever exists at `out`.
        resources: threads; the memory budget is not used.

    Raises:
        FormatError: see formats.errors; UnsafeFile and UnsupportedDType where the source is more than a state dict.
    """
    watch, files, source = Stopwatch(loading="torch"), OpenFiles(), Path(source)
    checkpoint = files.checkpoint(source)
    if container_named(checkpoint.ref.path) is Container.ORT:
        raise AdapterFormatError(
            "ONNX Runtime's adapter files store transposed factors, so changing the container is not enough",
            where=source,
            then="name the dialect and the base model: --to peft --base PATH",
        )
    chosen = _chosen(out, container)
    destination = _destination(source, Path(out), files, chosen, max_shard_size, force)
    plan = plan_container(checkpoint, chosen, None if destination.is_folder else _own_config(source, files))
    plan = replace(plan, notes=(*plan.notes, *_left(source, destination)))

    def finish(done: Done) -> Callable[[Header], ContainerReport]:
        digest = output_digest(done.plan.outputs, done.outcomes)
        return lambda header: ContainerReport(
            **header, source=container_of(checkpoint), container=_container_at(out), digest=digest
        )

    return step_by_step(
        plan,
        files=files,
        watch=watch,
        inputs=(source,),
        finish=finish,
        destination=destination,
        resources=resources,
    )


convert_container = runs(prepare_convert_container)


def _container_at(out: str | Path) -> str:
    with open_checkpoint(out) as written:
        return container_of(written)


def plan_container(checkpoint: Checkpoint, container: Container, config: str | None = None) -> Plan:
    """Copies every tensor, and the metadata unless the output is in torch's container, which cannot hold any.

    Args:
        checkpoint: the source.
        container: the output's container.
        config: an adapter's config as text, for an output that is one file and stores it in the metadata.
    """
    steps = tuple(
        Step(name, (checkpoint.tensor(name),), (spec,), Copy(name)) for name, spec in checkpoint.specs.items()
    )
    metadata = _OF_TORCH | dict(checkpoint.metadata) | ({} if config is None else {CONFIG_KEY: config})
    torch = container is Container.TORCH
    lost = sorted(metadata.keys() - _OF_TORCH.keys()) if torch else []
    notes = (f"torch's container cannot hold metadata; these keys were dropped: {', '.join(lost)}",) if lost else ()
    return Plan("convert", steps, {} if torch else metadata, (*checkpoint.notes, *notes))


def _own_config(source: Path, files: OpenFiles) -> str | None:
    """The text of the config that belongs to an adapter's weights; None if there is none."""
    ours = source.is_dir() or source.name in (ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS)
    return _config((source if source.is_dir() else source.parent) / ADAPTER_CONFIG, files) if ours else None


def _config(file: Path, files: OpenFiles) -> str | None:
    """The text of a config; None if the file does not exist. Raises CorruptFile."""
    if not file.is_file():
        return None
    content = files.content(file)
    parsed_config(content, file, f"{'model' if file.name == CONFIG else 'adapter'}'s config")
    return content.decode()


def _chosen(out: str | Path, container: str | None) -> Container:
    """The output's container. Raises FormatError if its name and `container` contradict each other."""
    if container not in (None, *_MODELS):
        raise FormatError(
            "no such container", expected=", ".join(_MODELS), found=container, then="pass one of those as --container"
        )
    named = container_named(out)
    asked = Container(container or Container.SAFETENSORS) if named is None else named
    if container not in (None, asked):
        raise FormatError(
            "the output's name contradicts --container", where=out, expected=container, found=asked,
            then="name a folder, or omit --container",
        )  # fmt: skip
    return asked if asked in _MODELS else Container.SAFETENSORS  # other containers are refused later, with a reason


def _left(source: Path, destination: Destination) -> tuple[str, ...]:
    """A note of the source folder's files that are neither converted nor copied, such as an optimiser's state."""
    if not destination.is_folder or not source.is_dir():
        return ()
    taken = {path.name for path in (*destination.inputs, *destination.companions)} | destination.attachments.keys()
    left = sorted(path.name for path in source.iterdir() if path.is_file() and path.name not in taken)
    return (f"files not copied: {', '.join(left)}",) if left else ()


def _destination(
    source: Path, out: Path, files: OpenFiles, container: Container, max_shard: int | None, force: bool
) -> Destination:
    checkpoint = files.checkpoint(source)
    found = destination_like(
        source,
        out,
        checkpoint.specs.values(),
        inputs=(source, *_files(checkpoint)),
        force=force,
        files=files,
        max_shard=max_shard,
        container=container,
    )
    if not found.is_folder or not source.is_dir():
        return found
    texts = {name: _config(source / name, files) for name in (CONFIG, ADAPTER_CONFIG)}
    attachments = {name: text.encode() for name, text in texts.items() if text is not None}
    companions = tuple(path for path in found.companions if path.name not in attachments)
    own = found.shards is None and max_shard is None
    weights = named_in(Path(checkpoint.ref.path).name, container) if own else found.weights
    return replace(found, weights=weights, companions=companions, attachments=attachments)


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The files that are read."""
    path = Path(checkpoint.ref.path)
    yield path
    if isinstance(checkpoint, ShardedCheckpoint):
        yield from (path.parent / shard for shard in set(checkpoint.shards.values()))
