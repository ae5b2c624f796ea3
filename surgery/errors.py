"""Every way an operation can be refused or fail; continues the tree of `formats.errors`.

ReportedError
├── FormatError …             the files: see formats.errors
└── SurgeryError
    ├── NothingToDo           base and tuned are identical, or a merge that changes nothing
    ├── NotFinite             NaN or Inf, or a result beyond the stored dtype's range
    ├── NotMergeable          a method that no weight can express, with the mathematical reason
    ├── AlreadyMerged         the receipt says that this adapter is in there
    ├── NotMerged             the receipt does not know this adapter, or cannot give back what it replaced
    ├── UndoMismatch          the undo file, the merged file and the adapters are not of one merge
    ├── Unsupported           sound input that this version does not handle
    ├── UnknownArchitecture   config.json does not name a class that transformers has
    ├── MissingTensors        a model needs tensors that the checkpoint does not have
    ├── InputsDiffer          two graphs that cannot be fed the same inputs
    ├── TemplateMismatch      an ONNX graph whose weights are not the base's, or not told apart
    ├── ProviderUnavailable   the execution provider asked for is not the one that would run
    ├── WorkerLost            a process that worked for this one was killed
    └── VerificationFailed    a check ran and said no (exit code 3)
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
    """Base and tuned are identical, or a merge that changes nothing."""


class NotFinite(SurgeryError):
    """NaN or Inf in a tensor, or a result beyond the stored dtype's range."""


class NotMergeable(SurgeryError):
    """A method that no weight can express, with the mathematical reason."""


class AlreadyMerged(SurgeryError):
    """The receipt says that this adapter is in there."""


class NotMerged(SurgeryError):
    """The receipt does not know this adapter, or cannot give back what it replaced."""


class UndoMismatch(SurgeryError):
    """The undo file, the merged file and the adapters are not of one merge."""


class Unsupported(SurgeryError):
    """Sound input that this version does not handle."""


class UnknownArchitecture(SurgeryError):
    """config.json does not name a class that transformers has."""


class MissingTensors(SurgeryError):
    """A model needs tensors that the checkpoint does not have."""


class InputsDiffer(SurgeryError):
    """Two graphs that cannot be fed the same inputs."""


class TemplateMismatch(SurgeryError):
    """An ONNX graph whose weights are not the base's, or cannot be told apart."""


class ProviderUnavailable(SurgeryError):
    """The execution provider asked for is not the one that would run."""


class WorkerLost(SurgeryError):
    """A process that worked for this one was killed, by the system where memory ran out."""


class VerificationFailed(SurgeryError):
    """A check ran and said no."""

    exit_code = 3
