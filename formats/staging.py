"""Outputs that appear whole or not at all.

Where the system supports it (Linux: O_TMPFILE), files are written without a name, so that a killed process leaves
nothing behind. They get their names in the last step, when everything is on disk. Elsewhere, a hidden temporary file
next to the target is used; it is removed on every exit except a kill. This module does not know what the files hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from formats.errors import OutputExists, PathNotFound, WriteFailed

_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2
_CHUNK = 1 << 30  # the kernel moves at most 2 GiB a call
_SENT = 1 << 18  # bytes; smaller writes are not worth a system call


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turns errors of the disk (full, over quota, read-only) into WriteFailed."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise WriteFailed(
            "the disk is full" if full else f"cannot write: {error.strerror}",
            where=target,
            then="free some space or write elsewhere; nothing was written"
            if full
            else "write elsewhere; nothing was written",
        ) from error


class Staging:
    """One output, a file or a folder of files, that is not yet visible under its name.

    Args:
        target: path at which the output will appear.
        folder: whether the target is a folder, to which files are added by name, or a single file.
        inputs: paths that the target must not name, contain or replace.
        force: whether an existing file or folder at the target may be replaced.

    Raises:
        OutputExists: the target is an input, or it exists and `force` is not given.
        PathNotFound: the target's parent is a file.
        WriteFailed: the target cannot be written to.
    """

    def __init__(self, target: Path, *, folder: bool, inputs: Iterable[Path] = (), force: bool = False) -> None:
        self.target = target.absolute()
        self.folder = folder
        self.force = force
        self._files: dict[str, tuple[int, Path | None]] = {}  # name → descriptor, and its temporary name if any
        self._refuse_inputs(inputs)
        if not force:
            self._refuse_existing()
        self._near = next(parent for parent in self.target.parents if parent.exists())
        if not self._near.is_dir():
            raise PathNotFound(
                "the output's parent is not a folder",
                where=self._near,
                then="create it first, or choose another output with -o",
            )

    def _refuse_inputs(self, inputs: Iterable[Path]) -> None:
        mine = self.target.resolve()
        replaces = not self.folder and os.path.lexists(self.target)  # a file in an input's folder belongs to that input
        for path in inputs:
            theirs = path.resolve()
            if mine == theirs or mine in theirs.parents or (replaces and theirs == self.target.parent.resolve()):
                raise OutputExists(
                    "the output would overwrite an input", where=path, then="choose another output with -o"
                )

    def _refuse_existing(self) -> None:
        found = self.target
        if found.is_dir() and self.folder:
            if any(found.iterdir()):
                raise OutputExists(
                    "the output folder exists and is not empty",
                    where=found,
                    then="choose another output with -o, or replace it with --force",
                )
        elif os.path.lexists(found):
            raise OutputExists(
                "the output exists",
                where=found,
                then="choose another output with -o, or replace it with --force",
            )

    def check_room(self, nbytes: int) -> None:
        """Refuses a place that cannot be written to, or has no room for so many bytes. Raises WriteFailed."""
        free = shutil.disk_usage(self._near).free
        if nbytes > free:
            raise WriteFailed(
                "the disk has no room for the output",
                where=self.target,
                expected=f"{nbytes:,} bytes free",
                found=f"{free:,}",
                then="free some space or write elsewhere; nothing was written",
            )
        if not os.access(self._near, os.W_OK):
            raise WriteFailed("no permission to write to this folder", where=self._near, then="write elsewhere with -o")

    def create(self, name: str = "", size: int = 0) -> int:
        """Opens a new file of the output and reserves `size` bytes. The caller must not close the descriptor."""
        if name in self._files:
            raise OutputExists("two output files have the same name", where=name)
        with disk_errors(self.target):
            descriptor, temporary = self._open()
            self._files[name] = (descriptor, temporary)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
        return descriptor

    def _open(self) -> tuple[int, Path | None]:
        if hasattr(os, "O_TMPFILE"):
            with contextlib.suppress(OSError):  # not every file system has unnamed files
                return os.open(self._near, os.O_TMPFILE | os.O_RDWR, 0o666), None
        temporary = self._near / self._hidden()
        return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), temporary

    def _hidden(self) -> str:
        return f".{self.target.name}.{secrets.token_hex(4)}.tmp"

    def copy(self, name: str, source: Path) -> None:
        """Adds an unchanged copy of a file."""
        with source.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            descriptor = self.create(name, size)
            with disk_errors(self.target):
                copy_range(stream.fileno(), 0, descriptor, 0, size)

    def replace(self, name: str, size: int) -> tuple[int, int]:
        """Starts a file again. Returns the old descriptor, which the caller must close, and the new one."""
        old, temporary = self._files.pop(name)
        if temporary is not None:
            temporary.unlink()
        return old, self.create(name, size)

    def sync(self) -> None:
        """Flushes the content to disk, whether or not it is committed later."""
        with disk_errors(self.target):
            for descriptor, _ in self._files.values():
                os.fsync(descriptor)

    def commit(self) -> None:
        """Flushes everything to disk and makes it appear under its name.

        Renaming comes last, because it is atomic: it either happened or did not.
        """
        self.sync()
        with disk_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            beside = self.target.parent / self._hidden()
            try:
                self._name(beside)
                self._publish(beside)
            finally:
                _remove(beside)
            _sync_folder(self.target.parent)
        self.discard()

    def _name(self, beside: Path) -> None:
        if not self.folder:
            self._link("", beside)
            return
        beside.mkdir()
        for name in self._files:
            self._link(name, beside / name)
        _sync_folder(beside)

    def _link(self, name: str, path: Path) -> None:
        descriptor, temporary = self._files[name]
        if temporary is not None:
            os.rename(temporary, path)
            return
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:  # dst_dir_fd makes Python call linkat, which follows /proc's link to the unnamed file
            os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def _publish(self, beside: Path) -> None:
        if not self.force:
            self._refuse_existing()  # somebody may have put something there while we worked
        if os.path.lexists(self.target) and (self.folder or self.target.is_dir()):
            if _exchanged(beside, self.target):
                return  # the old output is now at `beside`, which commit removes
            aside = self.target.parent / self._hidden()
            os.rename(self.target, aside)
            try:
                os.rename(beside, self.target)
            except OSError:
                os.rename(aside, self.target)
                raise
            _remove(aside)
        else:
            os.replace(beside, self.target)

    def discard(self) -> None:
        """Removes everything that is not committed."""
        for descriptor, temporary in self._files.values():
            os.close(descriptor)
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        self._files.clear()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()


def _exchanged(one: Path, other: Path) -> bool:
    """Swaps two paths in one step. Returns False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2  # Linux's; Python has no function for it
    except AttributeError:
        return False
    ends = (_WORKING_FOLDER, os.fsencode(one), _WORKING_FOLDER, os.fsencode(other))
    return bool(rename(*ends, _EXCHANGE) == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, in as many calls as the system needs."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view[:_CHUNK], offset)
        view, offset = view[written:], offset + written


def send(descriptor: int, offset: int, size: int) -> None:
    """Starts flushing a written range to disk in the background, so that `commit` has little left to do.

    Linux starts writeback on this advice. It keeps the pages in memory, because they are still dirty.
    """
    if size >= _SENT and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def copy_range(source: int, source_offset: int, target: int, target_offset: int, size: int) -> None:
    """Copies bytes between files, inside the kernel where it can."""
    while size:
        moved = 0
        if hasattr(os, "copy_file_range"):
            with contextlib.suppress(OSError):  # for example across file systems: then copied through memory
                moved = os.copy_file_range(source, target, min(size, _CHUNK), source_offset, target_offset)
        if not moved:
            data = os.pread(source, min(size, 1 << 24), source_offset)
            if not data:
                raise OSError(errno.EIO, "the source became shorter while it was copied")
            write_at(target, data, target_offset)
            moved = len(data)
        source_offset, target_offset, size = source_offset + moved, target_offset + moved, size - moved
