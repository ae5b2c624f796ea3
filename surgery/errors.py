"""Every error that an operation raises; continues the tree of `formats.errors`.

ReportedError
├── FormatError …             errors about files: see formats.errors
└── SurgeryError
    ├── NothingToDo           base and tuned are identical, or a merge changes nothing
    ├── NotFinite             a tensor holds NaN or Inf, or a result exceeds its dtype's range
    ├── NotMergeable          weights cannot express this method; the message gives the reason
    ├── AlreadyMerged         the receipt says that this adapter is already merged
    ├── NotMerged             the receipt does not name this adapter, or cannot restore what it replaced
    ├── UndoMismatch          undo file, merged file and adapters come from different merges
    ├── Unsupported           the input is valid, but this version does not support it
    ├── UnknownArchitecture   config.json does not name a class that transformers has
    ├── MissingTensors        a model needs tensors that the checkpoint does not have
    ├── InputsDiffer          two graphs do not accept the same inputs
    ├── TemplateMismatch      an ONNX graph's weights are not the base's, or are ambiguous
    ├── ProviderUnavailable   the requested execution provider would not run
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
    """Base and tuned are identical, or a merge changes nothing."""


class NotFinite(SurgeryError):
    """A tensor holds NaN or Inf, or a result exceeds its stored dtype's range."""


class NotMergeable(SurgeryError):
    """Weights cannot express this method; the message gives the mathematical reason."""


class AlreadyMerged(SurgeryError):
    """The receipt says that this adapter is already merged."""


class NotMerged(SurgeryError):
    """The receipt does not name this adapter, or cannot restore what it replaced."""


class UndoMismatch(SurgeryError):
    """The undo file, the merged file and the adapters come from different merges."""


class Unsupported(SurgeryError):
    """The input is valid, but this version does not support it."""


class UnknownArchitecture(SurgeryError):
    """config.json does not name a class that transformers has."""


class MissingTensors(SurgeryError):
    """A model needs tensors that the checkpoint does not have."""


class InputsDiffer(SurgeryError):
    """Two graphs do not accept the same inputs."""


class TemplateMismatch(SurgeryError):
    """An ONNX graph's weights are not the base's, or are ambiguous."""


class ProviderUnavailable(SurgeryError):
    """The requested execution provider would not run."""


class WorkerLost(SurgeryError):
    """A worker process was killed, for example by the system when memory ran out."""


class VerificationFailed(SurgeryError):
    """A check ran and failed."""

    exit_code = 3
