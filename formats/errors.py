"""All errors about files, as a tree. One class, one meaning, one exit code.

    ReportedError                 what, where, expected, found, next: made to be read by a person
    ├── PluginError               a method or dialect that an installed distribution registers, and that is not usable
    └── FormatError
        ├── PathNotFound          nothing at that path
        ├── NotACheckpoint        something is there, but no container we read
        ├── CorruptFile           a container whose header and bytes contradict each other
        ├── UnsafeFile            a pickle that names what no state dict consists of, such as a function
        ├── UnsupportedDType      a dtype the operation cannot handle
        ├── Quantised             weights in a quantised form that nothing can be added to, or without their scales
        ├── UnknownTensor         a name the checkpoint does not have
        ├── AdapterFormatError    an adapter whose config and keys contradict each other
        │   └── NotExpressible    a change that a dialect has no place for
        ├── UnmatchedKeys         adapter keys that match nothing in the base
        ├── ShapeMismatch         tensors that belong together and differ in shape
        ├── OutputExists          the output is there already, or is an input
        ├── WriteFailed           the disk is full, or refuses
        └── IncompleteOutput      a writer was closed before every tensor had been written

`surgery.errors` continues the tree. This module knows nothing of either package's other modules.
"""

from __future__ import annotations


class ReportedError(Exception):
    """An error a user can act on.

    Args:
        what: one sentence, what went wrong.
        where: the file or tensor it concerns.
        expected, found: the two sides of a contradiction.
        then: what the user can do next.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        then: str | None = None,
    ) -> None:
        self.what = what
        self.details = {
            label: str(value)
            for label, value in (("where", where), ("expected", expected), ("found", found), ("next", then))
            if value is not None
        }
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {label + ':':<10}{value}" for label, value in self.details.items())])


class PluginError(ReportedError):
    """A method or dialect that an installed distribution registers, and that cannot be used."""


class FormatError(ReportedError):
    """A file that cannot be read, or an output that cannot be written."""


class PathNotFound(FormatError):
    """Nothing at that path."""


class NotACheckpoint(FormatError):
    """Something is there, but no container we read."""


class CorruptFile(FormatError):
    """A container whose header and bytes contradict each other."""


class UnsafeFile(FormatError):
    """A pickle that names what no state dict consists of, such as a function. Nothing of it was run."""


class UnsupportedDType(FormatError):
    """A dtype the operation cannot handle."""


class Quantised(FormatError):
    """Weights in a quantised form that nothing can be added to, or without their scales."""


class UnknownTensor(FormatError):
    """A name the checkpoint does not have."""


class AdapterFormatError(FormatError):
    """An adapter whose config and keys contradict each other."""


class NotExpressible(AdapterFormatError):
    """A change of a layer that a dialect has no place for."""


class UnmatchedKeys(FormatError):
    """Adapter keys that match nothing in the base."""


class ShapeMismatch(FormatError):
    """Tensors that belong together and differ in shape."""


class OutputExists(FormatError):
    """The output is there already, or is an input."""


class WriteFailed(FormatError):
    """The disk is full, or refuses."""


class IncompleteOutput(FormatError):
    """A writer was closed before every tensor had been written: a fault of ours, not of the user's."""
