"""The tree of errors of operations; continues the tree of `formats.errors`.

ReportedError
├── FormatError …             errors about files: see formats.errors
└── SurgeryError
    ├── NothingToDo           base and tuned are identical, or a merge would change nothing
    ├── NotFinite             a tensor holds NaN or Inf, or a result exceeds the stored dtype's range
    ├── NotMergeable          no weight can express the method; the error gives the mathematical reason
    ├── AlreadyMerged         the receipt says that this adapter is merged already
    ├── NotMerged             the receipt does not list this adapter, or cannot restore what it replaced
    ├── UndoMismatch          the undo file, the merged file and the adapters do not belong to one merge
    ├── Unsupported           the input is valid, but this version does not handle it
    ├── UnknownArchitecture   config.json does not name a class that transformers has
    ├── MissingTensors        a model needs tensors that the checkpoint does not have
    ├── InputsDiffer          two graphs cannot be fed the same inputs
    ├── TemplateMismatch      the weights of an ONNX graph are not the base's, or cannot be told apart
    ├── ProviderUnavailable   another execution provider than the requested one would run
    ├── WorkerLost            a worker process was killed
    └── VerificationFailed    a check ran and failed (exit code 3)
"""

from __future__ import annotations

from formats.errors import FormatError, ReportedError

__all__ = [
    "AlreadyMerged",
    "FormatError",
    "InputsDiffer",
    "MissingTensors",
    "NotFinite",
    "NotMergeable",
    "NotMerged",
    "NothingToDo",
    "ProviderUnavailable",
    "ReportedError",
    "SurgeryError",
    "TemplateMismatch",
    "UndoMismatch",
    "UnknownArchitecture",
    "Unsupported",
    "VerificationFailed",
    "WorkerLost",
]


class SurgeryError(ReportedError):
    """An operation that was refused or failed."""


class NothingToDo(SurgeryError):
    """Base and tuned are identical, or a merge would change nothing."""


class NotFinite(SurgeryError):
    """A tensor holds NaN or Inf, or a result exceeds the stored dtype's range."""


class NotMergeable(SurgeryError):
    """No weight can express the method. The error gives the mathematical reason."""


class AlreadyMerged(SurgeryError):
    """The receipt says that this adapter is merged already."""


class NotMerged(SurgeryError):
    """The receipt does not list this adapter, or cannot restore what it replaced."""


class UndoMismatch(SurgeryError):
    """The undo file, the merged file and the adapters do not belong to one merge."""


class Unsupported(SurgeryError):
    """The input is valid, but this version does not handle it."""


class UnknownArchitecture(SurgeryError):
    """config.json does not name a class that transformers has."""


class MissingTensors(SurgeryError):
    """A model needs tensors that the checkpoint does not have."""


class InputsDiffer(SurgeryError):
    """Two graphs cannot be fed the same inputs."""


class TemplateMismatch(SurgeryError):
    """The weights of an ONNX graph are not the base's, or cannot be told apart."""


class ProviderUnavailable(SurgeryError):
    """Another execution provider than the requested one would run."""


class WorkerLost(SurgeryError):
    """A worker process was killed, for example by the system when memory ran out."""


class VerificationFailed(SurgeryError):
    """A check ran and failed."""

    exit_code = 3
