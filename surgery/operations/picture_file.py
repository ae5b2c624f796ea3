"""The picture of a pair's spectra as a file: refused before anything is computed, and there only if all goes well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from formats.staging import Staging, disk_errors, write_at
from surgery.curve import Spectrum
from surgery.errors import SurgeryError
from surgery.pictures.page import page, poster

_PICTURES = {".html": page, ".svg": poster}


@contextlib.contextmanager
def picture_file(
    out: str | Path | None, pair: tuple[str | Path, str | Path], *, force: bool
) -> Iterator[Callable[[Sequence[Spectrum]], None]]:
    """Opens a picture; the function that it gives draws it, and does nothing without `out` or spectra.

    Args:
        out: a file `.html` or `.svg`.
        pair: base and tuned, which the title names.
        force: replace what stands at `out`.

    Raises:
        SurgeryError: another suffix.
        OutputExists: see Staging.
    """
    if out is None:
        yield lambda spectra: None
        return
    draw = _PICTURES.get(Path(out).suffix)
    if draw is None:
        raise SurgeryError("a picture of that kind is not made", expected=" or ".join(_PICTURES), found=out)
    base, tuned = (Path(path).absolute() for path in pair)
    staging = Staging(Path(out), folder=False, inputs=(base, tuned), force=force)
    drawn = False

    def write(spectra: Sequence[Spectrum]) -> None:
        nonlocal drawn
        if spectra:
            text = draw(f"{tuned.name} − {base.name}", spectra).encode()
            with disk_errors(staging.target):
                write_at(staging.create(size=len(text)), text, 0)
            drawn = True

    try:
        yield write
        if drawn:
            staging.commit()
    finally:
        staging.discard()
