"""The files of one operation, open together: each is opened and read once, however many ask for it.

Knows no dialect: it opens checkpoints, and reads small files such as configs whole.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from formats.checkpoint import Checkpoint
from formats.paths import open_checkpoint, weights_of
from formats.spec import CheckpointRef, TensorRef

if TYPE_CHECKING:
    import torch


class OpenFiles:
    """Checkpoints and small files, by path. Any thread may ask; all are closed together. `closed` says that they were.

    Whoever opens a path that is open already, under whatever name, gets the same checkpoint. Do not close it: the files
    belong to this object, which closes them when its context ends, or when nothing refers to it any more.
    """

    def __init__(self) -> None:
        self.closed = False
        self._checkpoints: dict[str, Checkpoint] = {}
        self._by_ref: dict[str, Checkpoint] = {}
        self._contents: dict[str, bytes] = {}
        self._lock = threading.RLock()  # opening a torch file reads the config beside it

    def checkpoint(self, path: str | Path) -> Checkpoint:
        """The checkpoint at a path. Raises as `open_checkpoint`."""
        file = weights_of(path)
        key = os.path.realpath(file)
        with self._lock:
            if key not in self._checkpoints:
                self._checkpoints[key] = open_checkpoint(file, self.content)
            return self._checkpoints[key]

    def of(self, ref: CheckpointRef) -> Checkpoint:
        """The checkpoint that a reference names."""
        found = self._by_ref.get(ref.path)
        if found is None:
            found = self._by_ref[ref.path] = self.checkpoint(ref.path)
        return found

    def read(self, ref: TensorRef) -> torch.Tensor:
        """The tensor that a reference names, on the CPU, in its stored dtype and shape."""
        return self.of(ref.checkpoint).read(ref.name)

    def content(self, path: Path) -> bytes:
        """All of a small file, such as a config. Raises OSError."""
        key = os.path.realpath(path)
        with self._lock:
            if key not in self._contents:
                self._contents[key] = path.read_bytes()
            return self._contents[key]

    def close(self) -> None:
        """Closes every checkpoint; the contents of small files are forgotten."""
        self.closed = True
        for checkpoint in self._checkpoints.values():
            checkpoint.close()
        self._checkpoints.clear()
        self._by_ref.clear()
        self._contents.clear()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
