"""What a path means: which container stands there, and how an output is shaped after its input.

The one place that turns paths into checkpoints and writers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.checkpoint import Checkpoint, CheckpointWriter, TensorWriter
from formats.errors import FormatError, NotACheckpoint, PathNotFound
from formats.gguf_file import GGUF_SUFFIX, GgufFile
from formats.gguf_writer import GgufWriter
from formats.layout import shards_by_size
from formats.ort_file import ORT, ORT_SUFFIX, names_ort_file
from formats.plain_file import PlainFile, PlainWriter
from formats.safetensors_file import SAFETENSORS
from formats.sharded import ShardedCheckpoint, ShardedWriter
from formats.spec import TensorSpec
from formats.staging import Staging, disk_errors, write_at
from formats.torch_file import TORCH_SUFFIXES, TorchFile
from formats.torch_writer import TorchWriter

SUFFIXES = (".safetensors", ".st")
INDEX_SUFFIX, TORCH_INDEX_SUFFIX = ".safetensors.index.json", ".bin.index.json"
WEIGHTS, TORCH_WEIGHTS = "model.safetensors", "pytorch_model.bin"
ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
# Files of a model's folder that hold weights, in whatever container: never copied along as "the rest".
_WEIGHT_PATTERNS = (
    "*.safetensors", "*.st", f"*{INDEX_SUFFIX}", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack",
    "*.ckpt", "*.onnx", "*.onnx_data", f"*{ORT_SUFFIX}", "*.ot", "*.gguf", ADAPTER_CONFIG,
)  # fmt: skip
# What transformers' Trainer leaves beside the weights in torch's container.
_TRAINING = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a safetensors or torch file, an index of shards, or a folder that holds any of them; or an adapter in
    llama.cpp's or ONNX Runtime's own file.

    Reads headers only. In a folder safetensors comes before torch's container; of either the index is preferred, then
    the file that is called as transformers and peft call it, then the only one there is.

    Raises:
        PathNotFound: nothing there.
        NotACheckpoint: nothing there that we read.
        CorruptFile: header and bytes contradict each other.
        UnsafeFile: a torch file whose pickle names what no state dict consists of.
        UnsupportedDType: a GGUF adapter's quantised factors.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_of(path)
    if not path.exists():
        raise PathNotFound("no such file or folder", where=path)
    if path.name.endswith((INDEX_SUFFIX, TORCH_INDEX_SUFFIX)):
        return ShardedCheckpoint(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path)
    if names_gguf_file(path):
        return GgufFile(path)
    if names_ort_file(path):
        return PlainFile(path, ORT)
    return PlainFile(path, SAFETENSORS)


def container_of(checkpoint: Checkpoint) -> str:
    """What it is stored in, for people: `safetensors`, `torch`, `torch, 2 shards`, `gguf`, `onnx_adapter`."""
    if isinstance(checkpoint, GgufFile):
        return "gguf"
    if names_ort_file(checkpoint.ref.path):
        return ORT_SUFFIX.removeprefix(".")
    shards = set(checkpoint.shards.values()) if isinstance(checkpoint, ShardedCheckpoint) else set()
    files = shards or {checkpoint.ref.path}
    name = "torch" if all(names_torch_file(file) for file in files) else "safetensors"
    return f"{name}, {len(shards)} shards" if shards else name


def _weights_of(folder: Path) -> Path:
    found: list[Path] = []
    for suffixes, index, names in (
        (SUFFIXES, INDEX_SUFFIX, (WEIGHTS, ADAPTER_WEIGHTS)),
        (TORCH_SUFFIXES, TORCH_INDEX_SUFFIX, (TORCH_WEIGHTS, TORCH_ADAPTER_WEIGHTS)),
    ):
        indexes = sorted(folder.glob(f"*{index}"))
        if len(indexes) == 1:
            return indexes[0]
        for candidate in (f"{names[0].rpartition('.')[0]}{index}", *names):
            if (folder / candidate).exists():
                return folder / candidate
        files = sorted(file for suffix in suffixes for file in folder.glob(f"*{suffix}"))
        found = [file for file in files if not any(file.match(pattern) for pattern in _TRAINING)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise NotACheckpoint(
        "which weights of this folder?" if found else "no safetensors or torch weights in this folder",
        where=folder,
        expected=f"{WEIGHTS}, {TORCH_WEIGHTS}, an index of shards, or a single file of weights",
        found=", ".join(file.name for file in (found or sorted(folder.iterdir()))[:6]) or "an empty folder",
        then="name the file itself" if found else None,
    )


def names_file(path: str | Path) -> bool:
    """Whether an output path means one safetensors file rather than a folder."""
    return Path(path).suffix in SUFFIXES


def names_torch_file(path: str | Path) -> bool:
    """Whether an output path means one file in torch's container."""
    return Path(path).suffix in TORCH_SUFFIXES


def names_gguf_file(path: str | Path) -> bool:
    """Whether an output path means one GGUF file."""
    return Path(path).suffix == GGUF_SUFFIX


@dataclass(frozen=True)
class Destination:
    """An output: where, in which shape, and what comes along.

    Attributes:
        path: a `.safetensors` or `.st` file, or a folder; with `torch` a file in torch's container, with `gguf` a
            `.gguf` file.
        weights: the name of the weights' file or index in a folder; it tells the container. Its suffix also tells
            whether the file, in a folder or not, is to be ONNX Runtime's.
        shards: tensor → shard's filename, for a sharded folder.
        companions: files copied along into a folder as they are (config, tokenizer, …).
        inputs: paths that the output must not replace.
        force: whether what stands at `path` may be replaced.
        torch: whether it may be torch's container, which holds no metadata and so no receipt.
        gguf: whether it is an adapter for llama.cpp.
    """

    path: Path
    weights: str = WEIGHTS
    shards: Mapping[str, str] | None = None
    companions: tuple[Path, ...] = ()
    inputs: tuple[Path, ...] = ()
    force: bool = False
    torch: bool = False
    gguf: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        own = (names_file, names_torch_file, names_gguf_file, names_ort_file)
        return not any(names(self.path) for names in own)

    def check(self) -> None:
        """Refuses what `create_checkpoint` would refuse, before long work. Raises OutputExists or FormatError."""
        self.staging().discard()

    def staging(self) -> Staging:
        """The output, begun. Raises OutputExists, or FormatError for a container that it must not be."""
        if not self.is_folder and names_ort_file(self.path) is not names_ort_file(self.weights):
            raise FormatError(
                f"{ORT_SUFFIX} is what convert --to ort writes, and nothing else",
                where=self.path,
                expected=f"a {ORT_SUFFIX} file, or a folder" if names_ort_file(self.weights) else "another name",
                then="choose another output with -o",
            )
        if names_torch_file(self.path) and not self.torch:
            raise FormatError(
                "only convert writes torch's container: it has no room for what a safetensors file says of itself",
                where=self.path,
                expected="a folder, or a .safetensors or .st file",
                then="write that, and turn it into this by surgery convert",
            )
        if names_gguf_file(self.path) != self.gguf:
            raise FormatError(
                "an adapter for llama.cpp is one GGUF file" if self.gguf else "only convert --to gguf writes GGUF",
                where=self.path,
                expected="a .gguf file" if self.gguf else "a folder, or a .safetensors or .st file",
            )
        return Staging(self.path, folder=self.is_folder, inputs=self.inputs, force=self.force)


def destination_like(
    source: str | Path,
    out: str | Path,
    specs: Iterable[TensorSpec],
    *,
    inputs: Iterable[str | Path],
    force: bool,
    max_shard: int | None = None,
    torch: bool = False,
) -> Destination:
    """An output shaped like its source: a file for a file, a folder with the same shards and companions for a folder.

    Tensors of `specs` that the source's shards do not know go into its last shard. With `max_shard` the folder gets
    shards of at most so many bytes instead of the source's; with `torch` they are in torch's container. Raises
    FormatError for shards of a single file.
    """
    source, out = Path(source), Path(out)
    specs = tuple(specs)
    guarded = tuple(Path(path) for path in inputs)
    if (names_file(out) or names_torch_file(out)) and max_shard is not None:
        raise FormatError(
            "a single file has no shards",
            where=out,
            expected="a folder",
            then="name a folder with -o, or leave it whole",
        )
    if names_file(out):
        return Destination(out, inputs=guarded, force=force)
    indexes, (whole, renamed) = (INDEX_SUFFIX, TORCH_INDEX_SUFFIX), _NAMED[torch]
    folder = source if source.is_dir() else source.parent if source.name.endswith(indexes) else None
    companions = () if folder is None else _companions(folder)
    if max_shard is not None:
        own = shards_by_size(specs, max_shard, whole)
        return Destination(out, f"{whole}.index.json" if own else whole, own or None, companions, guarded, force)
    if folder is None:
        return Destination(out, whole, inputs=guarded, force=force)
    with open_checkpoint(source) as checkpoint:
        if not isinstance(checkpoint, ShardedCheckpoint):
            return Destination(out, whole, companions=companions, inputs=guarded, force=force)
        last = max(checkpoint.shards.values())
        shards = {spec.name: renamed(checkpoint.shards.get(spec.name, last)) for spec in specs}
        return Destination(out, renamed(checkpoint.path.name), shards, companions, guarded, force)


def as_safetensors(name: str) -> str:
    """What the safetensors file, or index, in place of one of torch's is called; a safetensors file keeps its name."""
    stem = name.removesuffix(TORCH_INDEX_SUFFIX)
    tail = INDEX_SUFFIX if stem != name else SUFFIXES[0]
    if stem == name:
        if Path(name).suffix not in TORCH_SUFFIXES:
            return name
        stem = Path(name).stem
    return (stem.replace("pytorch_", "", 1) if stem.startswith("pytorch_model") else stem) + tail


def as_torch(name: str) -> str:
    """What torch's file, or index, in place of a safetensors one is called; one of torch's keeps its name."""
    stem = name.removesuffix(INDEX_SUFFIX)
    tail = TORCH_INDEX_SUFFIX if stem != name else ".bin"
    if stem == name:
        if Path(name).suffix not in SUFFIXES:
            return name
        stem = Path(name).stem
    return (f"pytorch_{stem}" if stem.startswith("model") else stem) + tail


# What a folder's weights are called where they are one file, and what becomes of other names: in safetensors, in torch.
_NAMED = ((WEIGHTS, as_safetensors), (TORCH_WEIGHTS, as_torch))


def _companions(folder: Path) -> tuple[Path, ...]:
    """A model folder's files that hold no weights."""
    files = [file for file in folder.iterdir() if file.is_file()]
    return tuple(sorted(file for file in files if not any(file.match(pattern) for pattern in _WEIGHT_PATTERNS)))


class _Output:
    """A CheckpointWriter over one staged destination: passes tensors to the container, adds the files beside it."""

    def __init__(
        self, destination: Destination, specs: Iterable[TensorSpec], metadata: Mapping[str, str], reserve: bool
    ) -> None:
        self._staging = destination.staging()
        self._settled = False
        self._besides: list[PlainWriter] = []
        self._container: PlainWriter | ShardedWriter | TorchWriter | GgufWriter
        try:
            if names_torch_file(destination.path):
                self._container = TorchWriter(self._staging, "", specs)
            elif names_gguf_file(destination.path):
                self._container = GgufWriter(self._staging, specs, metadata)
            elif destination.shards is not None:
                self._container = ShardedWriter(
                    self._staging, destination.weights, destination.shards, specs, metadata, reserve=reserve
                )
            else:
                filename = destination.weights if destination.is_folder else ""
                form = ORT if names_ort_file(destination.weights) else SAFETENSORS
                self._container = (
                    TorchWriter(self._staging, filename, specs)
                    if names_torch_file(filename)
                    else PlainWriter(self._staging, filename, specs, metadata, form, reserve=reserve)
                )
            if destination.is_folder:
                for companion in destination.companions:
                    self._staging.copy(companion.name, companion)
        except BaseException:
            self._staging.discard()
            raise
        self.write = self._container.write
        self.write_bytes = self._container.write_bytes
        self.parts = self._container.parts
        self.omit = self._container.omit
        self.seal = self._container.seal

    def attach(self, filename: str, content: bytes) -> None:
        self._refuse_file(filename)
        with disk_errors(self._staging.target):
            write_at(self._staging.create(filename, len(content)), content, 0)

    def beside(self, filename: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> TensorWriter:
        self._refuse_file(filename)
        self._besides.append(PlainWriter(self._staging, filename, specs, metadata, SAFETENSORS))
        return self._besides[-1]

    def _refuse_file(self, filename: str) -> None:
        if not self._staging.folder:
            raise FormatError("a single file has no room for another file beside it", where=filename)

    def settle(self) -> None:
        self._complete()
        self._staging.sync()

    def finish(self) -> None:
        self._complete()
        self._staging.commit()

    def _complete(self) -> None:
        if not self._settled:
            for each in (self._container, *self._besides):
                each.finish()
            self._settled = True

    def discard(self) -> None:
        self._staging.discard()


@contextlib.contextmanager
def create_checkpoint(
    destination: Destination | str | Path,
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, str],
    *,
    reserve: bool = True,
) -> Iterator[CheckpointWriter]:
    """Opens an output for writing. It appears whole when the context is left normally, and not at all otherwise.

    `reserve` takes the disk space of all the specs at once; without it they are upper bounds.

    Raises:
        OutputExists: the output is there already, or is an input.
        WriteFailed: the disk is full (its space is reserved before work begins) or refuses.
        IncompleteOutput: a declared tensor was neither written nor omitted.
    """
    if not isinstance(destination, Destination):
        destination = Destination(Path(destination))
    output = _Output(destination, specs, metadata, reserve)
    try:
        yield output
        output.finish()
    finally:
        output.discard()
