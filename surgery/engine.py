"""Runs a Plan on threads, within a byte budget.

Order of completion never shows: outcomes come back in the plan's order, and the writer's bytes do not depend on it.
Knows nothing of what a step computes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.checkpoint import Checkpoint, CheckpointWriter, TensorWriter
from formats.errors import ReportedError
from formats.paths import open_checkpoint
from formats.spec import CheckpointRef, TensorRef, TensorSpec
from formats.tensors import Bytes, bytes_from_tensor, tensor_from_bytes
from surgery.errors import Unsupported
from surgery.plan import Compares, Outcome, Plan, Step, Streams, TakesOver
from surgery.provenance import new_hash
from surgery.threads import cores, torch_threads

if TYPE_CHECKING:
    import torch

_COPIED = 1 << 18  # bytes that are copied at once: still in the cache when they are hashed and written
_CHUNK = 1 << 19  # bytes of each of two tensors that are compared: both stay in the cache
Writers = tuple[CheckpointWriter | None, TensorWriter | None]  # of outputs, and of what steps declare aside
DEFAULT_MEMORY = 512 << 20  # bytes that steps may hold at once; a larger step runs alone


@dataclass(frozen=True)
class Resources:
    """What a run may use.

    Attributes:
        jobs: worker threads; 0 means one for each core this process may run on.
        memory: bytes that running steps may hold together.
        device: where steps compute: tensors are read on the CPU, moved there, and come back to be written.
        progress: called after each step with its number, the total and the step's name.
    """

    jobs: int = 0
    memory: int = DEFAULT_MEMORY
    device: str = "cpu"
    progress: Callable[[int, int, str], None] | None = None

    @property
    def workers(self) -> int:
        """The number of worker threads."""
        return self.jobs or cores()


def run(
    plan: Plan,
    writer: CheckpointWriter | None,
    resources: Resources | None = None,
    aside: TensorWriter | None = None,
) -> tuple[Outcome, ...]:
    """Runs every step; the outcomes come in the plan's order, without their tensors.

    `aside` takes what steps declare for a second output.

    The first error stops the run and is raised once the steps under way have ended.

    Raises:
        ReportedError: whatever a step reports; other exceptions carry the step's name as a note.
    """
    import torch

    resources = resources or Resources()
    device = _device(resources.device)
    workers = max(1, min(resources.workers, len(plan.steps)))
    intra_op = max(1, cores() // workers)
    budget = _Budget(resources.memory)
    stop = threading.Event()
    writers: Writers = (writer, aside)
    with _Readers() as readers, torch_threads():
        # Largest first: the last step to finish is then a small one.
        order = sorted(range(len(plan.steps)), key=lambda index: -plan.steps[index].volume)
        pool = ThreadPoolExecutor(workers, "surgery", initializer=torch.set_num_threads, initargs=(intra_op,))
        futures: dict[int, Future[Outcome]] = {}
        try:
            for index in order:
                futures[index] = pool.submit(_run_step, plan.steps[index], readers, writers, budget, device, stop)
            _follow(plan, futures, resources)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return tuple(futures[index].result() for index in range(len(plan.steps)))


def _device(name: str) -> torch.device:
    """The device of a name. Raises Unsupported where this machine, or this torch, has none such."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises for each depends on its build
        raise Unsupported(
            "torch cannot compute on this device",
            expected="cpu, cuda or cuda:1, say",
            found=f"{name}: {error}",
            then="leave --device out, or install a torch that is built for it",
        ) from error
    return device


def _run_step(
    step: Step,
    readers: _Readers,
    writers: Writers,
    budget: _Budget,
    device: torch.device,
    stop: threading.Event,
) -> Outcome:
    try:
        if stop.is_set():
            return Outcome((), {})
        if isinstance(step.op, TakesOver):
            return _take_over(step, step.op, readers, writers[0])
        outcome = _unchanged(step, readers)
        with budget.hold(step.nbytes if outcome is None else 0):
            if stop.is_set():
                return Outcome((), {})
            if isinstance(step.op, Streams):
                outcome = _stream(step, step.op, readers, writers[0], device)
            else:
                if outcome is None:
                    outcome = step.op(*(readers.read(ref).to(device) for ref in step.inputs))
                _write(writers[0], step.outputs, outcome.tensors, step.shrinks)
            _write(writers[1], step.asides, outcome.asides, True)
    except Exception as error:
        stop.set()
        if not isinstance(error, ReportedError):
            error.add_note(f"while running the step {step.name}")
        raise
    return Outcome((), outcome.fates, outcome.figures)


def _take_over(step: Step, op: TakesOver, readers: _Readers, writer: CheckpointWriter | None) -> Outcome:
    """Copies the step's input to its output, and hashes it on the way."""
    (ref,), (spec,) = step.inputs, step.outputs
    seen = new_hash()
    source, buffer = readers.checkpoint(ref), np.empty(min(_COPIED, spec.nbytes), np.uint8)
    with _parts(writer, spec) as put:
        for begin in range(0, spec.nbytes, _COPIED):
            piece = buffer[: spec.nbytes - begin]
            source.read_into(ref.name, begin, piece)
            seen.update(piece.data)
            put(begin, piece.data)
    return op.taken(seen.hexdigest())


def _stream(
    step: Step, op: Streams, readers: _Readers, writer: CheckpointWriter | None, device: torch.device
) -> Outcome:
    """Reads the step's first input, and writes its output, as the op asks for it."""
    ref, (spec,) = step.inputs[0], step.outputs
    checkpoint, dtype = readers.checkpoint(ref), ref.spec.dtype
    buffer = np.empty(0, np.uint8)

    def source(begin: int, count: int) -> torch.Tensor:
        nonlocal buffer
        if buffer.nbytes < count * dtype.itemsize:
            buffer = np.empty(count * dtype.itemsize, np.uint8)
        piece = buffer[: count * dtype.itemsize]
        checkpoint.read_into(ref.name, begin * dtype.itemsize, piece)
        return tensor_from_bytes(piece, TensorSpec(ref.name, dtype, (count,))).to(device)

    with _parts(writer, spec) as put:
        return op.streamed(
            source,
            tuple(readers.read(each).to(device) for each in step.inputs[1:]),
            lambda begin, tensor: put(begin * spec.dtype.itemsize, bytes_from_tensor(tensor).data),
        )


def _parts(
    writer: CheckpointWriter | None, spec: TensorSpec
) -> contextlib.AbstractContextManager[Callable[[int, memoryview], None]]:
    return contextlib.nullcontext(lambda begin, piece: None) if writer is None else writer.parts(spec.name)


def _write(
    writer: TensorWriter | None,
    specs: tuple[TensorSpec, ...],
    tensors: tuple[torch.Tensor | None, ...],
    smaller: bool,
) -> None:
    for spec, tensor in zip(specs, tensors, strict=True):
        if writer is not None and tensor is not None:
            writer.write(spec.name, tensor, smaller=smaller)
        elif writer is not None:
            writer.omit(spec.name)


def _unchanged(step: Step, readers: _Readers) -> Outcome | None:
    """What a comparing op says of pairs that are equal bit for bit; None if one is not, or the op does not compare."""
    outcome = step.op.unchanged() if isinstance(step.op, Compares) else None
    if outcome is None:
        return None
    pairs = zip(step.inputs[::2], step.inputs[1::2], strict=True)
    return outcome if all(readers.equal(before, after) for before, after in pairs) else None


def _follow(plan: Plan, futures: dict[int, Future[Outcome]], resources: Resources) -> None:
    """Waits for all steps, reporting each; raises the first error."""
    names = {future: plan.steps[index].name for index, future in futures.items()}
    pending = set(futures.values())
    while pending:
        finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
        finished |= {future for future in pending if future.done()}
        pending -= finished
        for future in finished:
            future.result()
            if resources.progress:
                resources.progress(len(names) - len(pending), len(names), names[future])


class _Budget:
    """Bytes that steps share. A step larger than all of it waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + nbytes <= self._limit)
            self._held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()


class _Readers:
    """Checkpoints opened once for all workers, closed together."""

    def __init__(self) -> None:
        self._open: dict[CheckpointRef, Checkpoint] = {}
        self._lock = threading.Lock()

    def read(self, ref: TensorRef) -> torch.Tensor:
        return self.checkpoint(ref).read(ref.name)

    def equal(self, before: TensorRef, after: TensorRef) -> bool:
        """Whether two tensors are equal bit for bit, chunk by chunk up to the first difference."""
        nbytes = after.spec.nbytes
        if (before.spec.dtype, before.spec.nbytes) != (after.spec.dtype, nbytes):
            return False
        buffers = [np.empty(min(_CHUNK, nbytes), np.uint8) for _ in range(2)]
        for begin in range(0, nbytes, _CHUNK):
            old, new = (buffer[: nbytes - begin] for buffer in buffers)
            self.checkpoint(before).read_into(before.name, begin, old)
            self.checkpoint(after).read_into(after.name, begin, new)
            if not np.array_equal(_words(old), _words(new)):
                return False
        return True

    def checkpoint(self, ref: TensorRef) -> Checkpoint:
        with self._lock:
            if ref.checkpoint not in self._open:
                self._open[ref.checkpoint] = open_checkpoint(ref.checkpoint.path)
            return self._open[ref.checkpoint]

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *exc: object) -> None:
        for checkpoint in self._open.values():
            checkpoint.close()


def _words(payload: Bytes) -> np.ndarray[Any, Any]:
    """The same memory in the longest words it divides into; they compare faster."""
    return payload.view(np.uint64) if payload.nbytes % 8 == 0 else payload
