"""All errors about files, as a tree. One class, one meaning, one exit code.

    ReportedError                 what, where, expected, found, next: made to be read by a person
    ├── PluginError               a method or dialect that an installed distribution registers, and that is not usable
    └── FormatError
        ├── PathNotFound          nothing exists at that path
        ├── NotACheckpoint        the file or folder is in no container that we read
        ├── CorruptFile           the header and the bytes of a container contradict each other
        ├── UnsafeFile            a pickle names something that no state dict contains, such as a function
        ├── UnsupportedDType      the operation cannot handle this dtype
        ├── Quantised             the weights are quantised so that nothing can be added to them, or lack their scales
        ├── UnknownTensor         the checkpoint has no tensor of that name
        ├── AdapterFormatError    an adapter's config and keys contradict each other
        │   └── NotExpressible    a dialect cannot store this change
        ├── UnmatchedKeys         adapter keys match nothing in the base
        ├── ShapeMismatch         tensors that belong together differ in shape
        ├── OutputExists          the output exists already, or is an input
        ├── WriteFailed           the disk is full, or cannot be written to
        └── IncompleteOutput      a writer was closed before every tensor had been written

`surgery.errors` continues the tree. This module imports nothing from either package.
"""

from __future__ import annotations


class ReportedError(Exception):
    """An error a user can act on.

    Args:
        what: what went wrong, in one sentence.
        where: the file or tensor that is affected.
        expected, found: what should be there, and what is.
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
    """Nothing exists at that path."""


class NotACheckpoint(FormatError):
    """The file or folder is in no container that we read."""


class CorruptFile(FormatError):
    """The header and the bytes of a container contradict each other."""


class UnsafeFile(FormatError):
    """A pickle names something that no state dict contains, such as a function. Nothing in it was run."""


class UnsupportedDType(FormatError):
    """The operation cannot handle this dtype."""


class Quantised(FormatError):
    """The weights are quantised so that nothing can be added to them, or they lack their scales."""


class UnknownTensor(FormatError):
    """The checkpoint has no tensor of that name."""


class AdapterFormatError(FormatError):
    """An adapter's config and keys contradict each other."""


class NotExpressible(AdapterFormatError):
    """A dialect cannot store this change of a layer."""


class UnmatchedKeys(FormatError):
    """Adapter keys match nothing in the base."""


class ShapeMismatch(FormatError):
    """Tensors that belong together differ in shape."""


class OutputExists(FormatError):
    """The output exists already, or is an input."""


class WriteFailed(FormatError):
    """The disk is full, or cannot be written to."""


class IncompleteOutput(FormatError):
    """A writer was closed before every tensor had been written. This is a bug in surgery, not a mistake of the user."""
