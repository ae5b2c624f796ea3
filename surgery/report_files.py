"""Files for pictures and records: a bad path is refused before anything is computed, and a file appears only if all
goes well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from formats.staging import Staging, disk_errors, write_at
from surgery.errors import SurgeryError
from surgery.onnx.timing.compared import CompareReport
from surgery.onnx.timing.record import BenchReport, to_json
from surgery.pictures.compare_page import compare_page, compare_poster
from surgery.pictures.latency_page import latency_page, latency_poster
from surgery.pictures.page import page, poster
from surgery.ranks.spectra import Spectrum
from surgery.report import Report

Subject = TypeVar("Subject")
Forms = Mapping[str, Callable[[Subject], str]]  # suffix → function that draws the subject

LATENCY_FORMS: Forms[BenchReport] = {".html": latency_page, ".svg": latency_poster}
COMPARISON_FORMS: Forms[CompareReport] = {".html": compare_page, ".svg": compare_poster}


def spectra_forms(base: str | Path, tuned: str | Path) -> Forms[Sequence[Spectrum]]:
    """Draws the spectra of a pair as a page or a poster, titled with the names of both."""
    before, after = (Path(path).absolute().name for path in (base, tuned))
    title = f"{after} − {before}"
    return {".html": lambda spectra: page(title, spectra), ".svg": lambda spectra: poster(title, spectra)}


class PictureFile(Generic[Subject]):
    """A picture that is written on a normal exit from its context, if it was drawn by then.

    Args:
        out: a file whose suffix is one of the forms'; None draws nothing.
        forms: the kinds of picture that can be drawn, by suffix.
        inputs: paths that must not be replaced.
        force: overwrite `out` if it exists.

    Raises:
        SurgeryError: `out` has another suffix.
        OutputExists, WriteFailed: see Staging.
    """

    def __init__(
        self, out: str | Path | None, forms: Forms[Subject], inputs: Sequence[str | Path], *, force: bool
    ) -> None:
        self._staging: Staging | None = None
        self._drawn = False
        if out is None:
            return
        if Path(out).suffix not in forms:
            raise SurgeryError(
                "pictures cannot have this suffix",
                expected=" or ".join(forms),
                found=out,
                then=f"name a file with the suffix {next(iter(forms))}",
            )
        self._form = forms[Path(out).suffix]
        self._staging = Staging(Path(out), folder=False, inputs=[Path(path).absolute() for path in inputs], force=force)
        self._staging.check_room(0)

    def draw(self, subject: Subject) -> None:
        """Draws the subject. Raises WriteFailed."""
        if self._staging is None:
            return
        text = self._form(subject).encode()
        with disk_errors(self._staging.target):
            write_at(self._staging.create(size=len(text)), text, 0)
        self._drawn = True

    def __enter__(self) -> PictureFile[Subject]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._staging is None:
            return
        try:
            if kind is None and self._drawn:
                self._staging.commit()
        finally:
            self._staging.discard()


@dataclass(frozen=True)
class RecordFile:
    """The JSON file to which a report is written; without a path, nothing is written.

    Attributes:
        path: the file.
        inputs: paths that must not be replaced.
        force: whether to overwrite a file at the path.
    """

    path: Path | None
    inputs: tuple[Path, ...]
    force: bool

    @classmethod
    def at(cls, path: str | Path | None, inputs: Iterable[Path], force: bool) -> RecordFile:
        """Checks the path. Raises OutputExists or PathNotFound, see Staging."""
        made = cls(None if path is None else Path(path), tuple(inputs), force)
        if made.path is not None:
            made._staging(made.path).check_room(0)
        return made

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The path, if there is one."""
        return () if self.path is None else (self.path,)

    def write(self, report: Report) -> None:
        """Writes the report, whole or not at all. Raises OutputExists or WriteFailed."""
        if self.path is None:
            return
        text = to_json(report).encode()
        with self._staging(self.path) as staging, disk_errors(staging.target):
            write_at(staging.create(size=len(text)), text, 0)

    def _staging(self, path: Path) -> Staging:
        return Staging(path, folder=False, inputs=self.inputs, force=self.force)
