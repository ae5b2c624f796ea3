"""Runs a Plan on threads, or on copies of this process, within a byte budget.

The order of completion has no effect: outcomes come back in the plan's order, and so do the writer's bytes. Knows
nothing of the computation in a step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.checkpoint import CheckpointWriter, TensorWriter
from formats.errors import ReportedError
from formats.open_files import OpenFiles
from formats.spec import TensorRef, TensorSpec
from formats.tensors import Bytes, bytes_from_tensor, spec_of, tensor_from_bytes
from surgery.errors import Unsupported
from surgery.hashes import new_hash
from surgery.pipeline.plan import Compares, Outcome, Plan, Step, Streams, TakesOver
from surgery.pipeline.threads import cores, torch_threads
from surgery.pipeline.workers import Work, can_fork, forked

if TYPE_CHECKING:
    import torch

_COPIED = 1 << 18  # bytes copied at once; they stay in the cache while they are hashed and written
_CHUNK = 1 << 19  # bytes compared at once of each of two tensors; both stay in the cache
Packed = tuple[tuple[Bytes, TensorSpec] | None, ...]
Writers = tuple[CheckpointWriter | None, TensorWriter | None]  # for outputs, and for the steps' asides
_WORTH_COPIES = 64 << 20  # bytes that a plan moves; for fewer, forking costs more time than it saves
DEFAULT_MEMORY = 512 << 20  # bytes that steps may hold at once; a larger step runs alone


@dataclass(frozen=True)
class Resources:
    """The resources that a run may use.

    Attributes:
        jobs: number of workers; 0 means one for each core that this process may use.
        memory: memory budget of all running steps together, in bytes.
        device: the device on which steps compute; tensors are read and written on the CPU.
        progress: called after each step with the number of finished steps, the total and the step's name.
        processes: whether workers may be forks of this process, which do not wait for each other as threads do. Use
            this only in a process that runs nothing but surgery.
    """

    jobs: int = 0
    memory: int = DEFAULT_MEMORY
    device: str = "cpu"
    progress: Callable[[int, int, str], None] | None = None
    processes: bool = False

    @property
    def workers(self) -> int:
        """The number of workers."""
        return self.jobs or cores()

    def torch_device(self) -> torch.device:
        """The torch device. Raises Unsupported if this machine or this torch does not have it."""
        import torch

        try:
            device = torch.device(self.device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:  # which one torch raises depends on its build
            raise Unsupported(
                "torch cannot compute on this device",
                expected="for example cpu, cuda or cuda:1",
                found=f"{self.device}: {error}",
                then="leave --device out, or install a torch that supports the device",
            ) from error
        return device


def run(
    plan: Plan,
    writer: CheckpointWriter | None,
    files: OpenFiles,
    resources: Resources | None = None,
    aside: TensorWriter | None = None,
) -> tuple[Outcome, ...]:
    """Runs every step and returns the outcomes in the plan's order, without their tensors.

    Args:
        plan: the steps.
        writer: writes their outputs; None if nothing is written.
        files: the open input files; opens others on demand.
        resources: workers, memory and device.
        aside: writes the steps' asides to a second output.

    The first error stops the run; it is raised after the running steps have ended.

    Raises:
        ReportedError: any error that a step reports; other exceptions carry the step's name as a note.
    """
    import torch

    resources = resources or Resources()
    device = resources.torch_device()
    workers = max(1, min(resources.workers, len(plan.steps)))
    intra_op = max(1, resources.workers // workers)
    stop = threading.Event()
    with torch_threads(), contextlib.ExitStack() as copies:
        running = _Running(plan, files, (writer, aside), _Budget(resources.memory), device, stop)
        if (writer is None or writer.shared) and _pays(plan, resources, workers, device):
            running = replace(running, elsewhere=copies.enter_context(forked(workers, running.packed)))
        # Largest first, so that a small step finishes last and no worker waits long.
        order = sorted(range(len(plan.steps)), key=lambda index: -plan.steps[index].volume)
        pool = ThreadPoolExecutor(workers, "surgery", initializer=torch.set_num_threads, initargs=(intra_op,))
        futures: dict[int, Future[Outcome]] = {}
        try:
            for index in order:
                futures[index] = pool.submit(running.run, index)
            _follow(plan, futures, resources)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return tuple(futures[index].result() for index in range(len(plan.steps)))


def _pays(plan: Plan, resources: Resources, workers: int, device: torch.device) -> bool:
    """Whether copies of this process may do the work and would be faster than threads."""
    allowed = resources.processes and can_fork() and device.type == "cpu"
    return allowed and workers > 1 and sum(step.volume for step in plan.steps) >= _WORTH_COPIES


@dataclass(frozen=True)
class _Running:
    """A running plan. `elsewhere` computes a step in a copy of this process; if None, the calling thread does."""

    plan: Plan
    files: OpenFiles
    writers: Writers
    budget: _Budget
    device: torch.device
    stop: threading.Event
    elsewhere: Work | None = None

    def run(self, index: int) -> Outcome:
        """Runs one step: reads its inputs, computes, and writes its outputs."""
        step = self.plan.steps[index]
        try:
            if self.stop.is_set():
                return Outcome((), {})
            outcome = _unchanged(step, self.files)
            held = 0 if outcome is not None or isinstance(step.op, TakesOver) else step.nbytes
            with self.budget.hold(held):
                if self.stop.is_set():
                    return Outcome((), {})
                outcome = self._computed(index) if outcome is None else outcome
                if not isinstance(step.op, TakesOver | Streams):
                    _write(self.writers[0], step.outputs, outcome.tensors, step.shrinks)
                _write(self.writers[1], step.asides, outcome.asides, True)
        except Exception as error:
            self.stop.set()
            if not isinstance(error, ReportedError):
                error.add_note(f"while running the step {step.name}")
            raise
        return Outcome((), outcome.fates, outcome.figures)

    def _computed(self, index: int) -> Outcome:
        """The step's outcome, with the tensors that have not been written yet."""
        step, writer = self.plan.steps[index], self.writers[0]
        if self.elsewhere is None:
            return self._compute(step)
        outcome, tensors, asides = self.elsewhere(index)
        if writer is not None and isinstance(step.op, TakesOver | Streams):
            for spec in step.outputs:
                writer.written(spec.name)
        whole: Outcome = replace(outcome, tensors=_unpacked(tensors), asides=_unpacked(asides))
        return whole

    def _compute(self, step: Step) -> Outcome:
        if isinstance(step.op, TakesOver):
            return _take_over(step, step.op, self.files, self.writers[0])
        if isinstance(step.op, Streams):
            return _stream(step, step.op, self.files, self.writers[0], self.device)
        return step.op(*(self.files.read(ref).to(self.device) for ref in step.inputs))

    def packed(self, index: int) -> tuple[Outcome, Packed, Packed]:
        """A step's outcome in a form that can be sent to another process."""
        import torch

        torch.set_num_threads(1)  # a copy made by fork has none of its parent's threads
        outcome = self._compute(self.plan.steps[index])
        return replace(outcome, tensors=(), asides=()), _packed(outcome.tensors), _packed(outcome.asides)


def _packed(tensors: tuple[torch.Tensor | None, ...]) -> Packed:
    """Tensors as bytes and specs: torch itself would send only a name in shared memory."""
    return tuple(None if each is None else (bytes_from_tensor(each), spec_of("", each)) for each in tensors)


def _unpacked(packed: Packed) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if each is None else tensor_from_bytes(*each) for each in packed)


def _take_over(step: Step, op: TakesOver, files: OpenFiles, writer: CheckpointWriter | None) -> Outcome:
    """Copies the step's input to its output, and hashes it on the way."""
    (ref,), (spec,) = step.inputs, step.outputs
    seen = new_hash()
    source, buffer = files.of(ref.checkpoint), np.empty(min(_COPIED, spec.nbytes), np.uint8)
    with _parts(writer, spec) as put:
        for begin in range(0, spec.nbytes, _COPIED):
            piece = buffer[: spec.nbytes - begin]
            source.read_into(ref.name, begin, piece)
            seen.update(piece.data)
            put(begin, piece.data)
    return op.taken(seen.hexdigest())


def _stream(
    step: Step, op: Streams, files: OpenFiles, writer: CheckpointWriter | None, device: torch.device
) -> Outcome:
    """Reads the step's first input and writes its output piece by piece, as the op requests."""
    ref, (spec,) = step.inputs[0], step.outputs
    checkpoint, dtype = files.of(ref.checkpoint), ref.spec.dtype
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
            tuple(files.read(each).to(device) for each in step.inputs[1:]),
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


def _unchanged(step: Step, files: OpenFiles) -> Outcome | None:
    """A comparing op's outcome if all pairs are equal bit for bit; None if one differs or the op does not compare."""
    outcome = step.op.unchanged() if isinstance(step.op, Compares) else None
    if outcome is None:
        return None
    pairs = zip(step.inputs[::2], step.inputs[1::2], strict=True)
    return outcome if all(_equal(files, before, after) for before, after in pairs) else None


def _follow(plan: Plan, futures: dict[int, Future[Outcome]], resources: Resources) -> None:
    """Waits for all steps and reports progress; raises the first error."""
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
    """A memory budget that steps share. A step larger than the whole budget waits until it can run alone."""

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


def _equal(files: OpenFiles, before: TensorRef, after: TensorRef) -> bool:
    """Whether two tensors are equal bit for bit; compares chunks up to the first difference."""
    nbytes = after.spec.nbytes
    if (before.spec.dtype, before.spec.nbytes) != (after.spec.dtype, nbytes):
        return False
    buffers = [np.empty(min(_CHUNK, nbytes), np.uint8) for _ in range(2)]
    for begin in range(0, nbytes, _CHUNK):
        old, new = (buffer[: nbytes - begin] for buffer in buffers)
        files.of(before.checkpoint).read_into(before.name, begin, old)
        files.of(after.checkpoint).read_into(after.name, begin, new)
        if not np.array_equal(_words(old), _words(new)):
            return False
    return True


def _words(payload: Bytes) -> np.ndarray[Any, Any]:
    """The same memory as 64-bit words if its size allows, which compare faster."""
    return payload.view(np.uint64) if payload.nbytes % 8 == 0 else payload
