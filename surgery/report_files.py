"""A picture as a file: refused before anything is computed, and there only if all goes well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
Forms = Mapping[str, Callable[[Subject], str]]  # suffix → what draws the subject

LATENCY_FORMS: Forms[BenchReport] = {".html": latency_page, ".svg": latency_poster}
COMPARISON_FORMS: Forms[CompareReport] = {".html": compare_page, ".svg": compare_poster}


def spectra_forms(base: str | Path, tuned: str | Path) -> Forms[Sequence[Spectrum]]:
    """A pair's spectra as a page or a poster, titled with the pair's names."""
    before, after = (Path(path).absolute().name for path in (base, tuned))
    title = f"{after} − {before}"
    return {".html": lambda spectra: page(title, spectra), ".svg": lambda spectra: poster(title, spectra)}


class PictureFile(Generic[Subject]):
    """A picture that is written when its context is left normally, if it was drawn by then.

    Args:
        out: a file with one of the forms' suffixes; without it nothing is drawn.
        forms: what can be drawn.
        inputs: paths that must not be replaced.
        force: replace what stands at `out`.

    Raises:
        SurgeryError: another suffix.
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
            raise SurgeryError("a picture of that kind is not made", expected=" or ".join(forms), found=out)
        self._form = forms[Path(out).suffix]
        self._staging = Staging(Path(out), folder=False, inputs=[Path(path).absolute() for path in inputs], force=force)
        self._staging.check_room(0)

    def draw(self, subject: Subject) -> None:
        """Draws it. Raises WriteFailed."""
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


@contextlib.contextmanager
def picture_file(
    out: str | Path | None, forms: Forms[Subject], inputs: Sequence[str | Path], *, force: bool
) -> Iterator[Callable[[Subject], None]]:
    """Opens a picture; the function that it gives draws it. Arguments and errors are those of `PictureFile`."""
    with PictureFile(out, forms, inputs, force=force) as picture:
        yield picture.draw


@contextlib.contextmanager
def kept_record(record: str | Path | None, inputs: Sequence[Path], force: bool) -> Iterator[Callable[[Report], None]]:
    """Opens the record's file, if one is wanted; the function that it gives writes the report there.

    Raises OutputExists: see Staging.
    """
    if record is None:
        yield lambda report: None
        return
    staging = Staging(Path(record), folder=False, inputs=inputs, force=force)

    def keep(report: Report) -> None:
        text = to_json(report).encode()
        with disk_errors(staging.target):
            write_at(staging.create(size=len(text)), text, 0)
        staging.commit()

    try:
        yield keep
    finally:
        staging.discard()
