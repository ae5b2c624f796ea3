"""Corrections: the compressed difference between a prediction of a tensor and the tensor itself.

A correction is one Zstandard frame. For every chunk of at most 2¹⁹ elements it holds

    elements         u32, elements of the chunk
    count            u32, differing elements that are not among the likely ones
    length           u32, bytes of the gaps
    marks            one bit for each likely element, lowest bit first: whether it differs; padded to whole bytes
    gaps             steps from each other differing element to the next, one byte each: 255 means move on by 255 and
                     read the next byte; any other value ends the step
    differences      (bits of the tensor − bits of the prediction) as integers of the element's width, zigzag (0, −1,
                     1, −2 … as 0, 1, 2, 3 …), the likely elements' first; first all lowest bytes, then all second
                     bytes, and so on

Everything is little-endian. If the prediction is a merged weight with its delta subtracted again, the likely elements
are those whose exponent is larger in the merged weight than in the prediction: rounding coarsened them, so about half
of them are wrong, and hardly any others. Values that differ in the last place differ by ±1 in their bits, so apart from
the marks there is little to store. If every element differs, all gaps are equal and compress to almost nothing. Each
part ends a Zstandard block, because every block has its own entropy code.

This module knows bytes only: no file, no dtype, no method.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from formats.errors import CorruptFile
from formats.tensors import Bytes

_CHUNK = 1 << 19  # elements at most
_HEAD = struct.Struct("<III")
_FAR = 255
_LEVEL = 3  # higher levels gain nothing: gaps hold no repetitions to find

Words = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Coarsened:
    """Shows where a prediction is likely to be wrong.

    Attributes:
        merged: payload of the merged weight, of the same size as the tensor's.
        fraction: number of fraction bits of its floats.
    """

    merged: Bytes
    fraction: int


def uncertain(guess: Bytes, itemsize: int, coarsened: Coarsened) -> int:
    """Number of elements in a prediction for which another original value could have given the same merged value.

    These are the elements that rounding coarsened, and powers of two, below which values are twice as dense. Apart from
    exact ties, no other element can differ.
    """
    words = _words(guess, guess.nbytes, itemsize)
    fraction = (1 << coarsened.fraction) - 1
    count = 0
    for begin in range(0, len(words), _CHUNK):
        chunk = words[begin : begin + _CHUNK]
        count += int((_is_likely(chunk, begin, coarsened) | (chunk & fraction == 0)).sum())
    return count


def correction_limit(elements: int, itemsize: int) -> int:
    """The largest size in bytes of a correction for this many elements."""
    plain = elements * (itemsize + 1) + (2 * elements // _CHUNK + 1) * (_HEAD.size + 64)
    return plain + plain // 128 + 1024


def correction_workspace(itemsize: int) -> int:
    """Bytes of memory that one chunk needs while it is processed, in addition to the tensors."""
    return _CHUNK * (48 + 8 * itemsize)


class Corrections:
    """Makes a correction piece by piece.

    Args:
        itemsize: bytes per element: 1, 2, 4 or 8.
        fraction: number of fraction bits of the floats, if merged payloads will be given; else None.
    """

    def __init__(self, itemsize: int, fraction: int | None = None) -> None:
        self._itemsize = itemsize
        self._fraction = fraction
        self._stream = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        self._parts: list[bytes] = []
        self._differs = False
        self._waiting: list[tuple[Words, ...]] = []  # pieces too small for a chunk of their own

    def add(self, actual: Bytes, predicted: Bytes, merged: Bytes | None = None) -> None:
        """Adds the next elements: payloads of the same size of the tensor, the prediction and the merged weight."""
        payloads = (actual, predicted) if merged is None or self._fraction is None else (actual, predicted, merged)
        words = tuple(_words(payload, actual.nbytes, self._itemsize) for payload in payloads)
        count = len(words[0])
        if self._waiting or count < _CHUNK // 2:
            self._waiting.append(tuple(part.copy() for part in words))
            if sum(len(piece[0]) for piece in self._waiting) < _CHUNK // 2:
                return
            words, count = self._gathered()
        for begin in range(0, count, _CHUNK):
            self._add(*(part[begin : begin + _CHUNK] for part in words))

    def _gathered(self) -> tuple[tuple[Words, ...], int]:
        words = tuple(np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        return words, len(words[0])

    def _add(self, truth: Words, guess: Words, merged: Words | None = None) -> None:
        wrong = truth != guess
        hints = None if merged is None or self._fraction is None else Coarsened(merged.view(np.uint8), self._fraction)
        likely = _likely(guess, 0, hints)
        marks = wrong[likely]
        wrong[likely] = False
        others = np.flatnonzero(wrong)
        positions = np.concatenate([likely[marks], others])
        self._put(len(truth), marks, others, truth[positions] - guess[positions])  # modulo 2^bits

    def _put(self, elements: int, marks: Words, others: Words, difference: Words) -> None:
        """Writes one chunk: whether each likely element differs, where others do, and the differences, the likely
        elements' first."""
        self._differs = self._differs or bool(len(difference))
        gaps = _gaps(others)
        planes = np.ascontiguousarray(_zigzag(difference).view(np.uint8).reshape(-1, self._itemsize).T)
        head = _HEAD.pack(elements, len(others), len(gaps))
        for part in (head + np.packbits(marks, bitorder="little").tobytes(), gaps, *planes):
            if len(part):
                self._parts.append(self._stream.compress(bytes(part)))
                self._parts.append(self._stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))

    def finished(self) -> bytes | None:
        """The correction; None if nothing differs."""
        if self._waiting:
            self._add(*self._gathered()[0])
        self._parts.append(self._stream.flush())
        return b"".join(self._parts) if self._differs else None


def correct_from(actual: Bytes, predicted: Bytes, itemsize: int, coarsened: Coarsened | None = None) -> bytes | None:
    """The correction from a prediction to the tensor; None if they are equal.

    Args:
        actual: the tensor's payload.
        predicted: the prediction's payload; if it is shorter, it is padded with zeros.
        itemsize: bytes per element: 1, 2, 4 or 8.
        coarsened: shows where the prediction is likely to be wrong, if known.
    """
    made = Corrections(itemsize, coarsened.fraction if coarsened else None)
    made.add(actual, predicted, coarsened.merged if coarsened else None)
    return made.finished()


def corrected(
    predicted: Bytes, correction: Bytes, nbytes: int, itemsize: int, where: str, coarsened: Coarsened | None = None
) -> Bytes:
    """Restores the tensor's payload of `nbytes` from its prediction and the correction.

    `coarsened` must be the same as when the correction was made. Raises CorruptFile, naming `where`, if the bytes are
    not a correction for this many elements.
    """
    words = _words(predicted, nbytes, itemsize).copy()
    try:
        with zstandard.ZstdDecompressor().stream_reader(correction.data) as stream:
            begin = 0
            while begin < len(words):
                elements, count, length = _HEAD.unpack(_exactly(stream, _HEAD.size))
                if not 0 < elements <= min(_CHUNK, len(words) - begin):
                    raise ValueError(f"a chunk of {elements} elements")
                chunk = words[begin : begin + elements]
                likely = _likely(chunk, begin, coarsened)
                begin += elements
                if count > len(chunk) or length > count + len(chunk) // _FAR:
                    raise ValueError(f"{count} corrections of {len(chunk)} elements")
                packed = np.frombuffer(_exactly(stream, (len(likely) + 7) // 8), np.uint8)
                marks = np.unpackbits(packed, count=len(likely), bitorder="little").view(bool)
                others = _positions(np.frombuffer(_exactly(stream, length), np.uint8))
                if len(others) != count or (count and others[-1] >= len(chunk)):
                    raise ValueError("positions beyond the tensor")
                positions = np.concatenate([likely[marks], others])
                planes = np.frombuffer(_exactly(stream, len(positions) * itemsize), np.uint8)
                codes = np.ascontiguousarray(planes.reshape(itemsize, -1).T).view(f"<u{itemsize}").reshape(-1)
                chunk[positions] += _unzigzag(codes)
            if stream.read(1):
                raise ValueError("more than the tensor's elements")
    except (ValueError, zstandard.ZstdError) as error:
        raise CorruptFile(
            "a correction is damaged", where=where, found=str(error), then="copy the undo file again"
        ) from error
    return words.view(np.uint8)


def _words(payload: Bytes, nbytes: int, itemsize: int) -> Words:
    """A payload as integers, cut or padded with zeros to `nbytes`."""
    if payload.nbytes < nbytes:
        payload = np.concatenate([payload, np.zeros(nbytes - payload.nbytes, np.uint8)])
    return payload[:nbytes].view(f"<u{itemsize}")


def _likely(guess: Words, begin: int, coarsened: Coarsened | None) -> Words:
    """The positions of a chunk's elements that are likely to be wrong."""
    if coarsened is None:
        return np.zeros(0, np.int64)
    return np.flatnonzero(_is_likely(guess, begin, coarsened))


def _is_likely(guess: Words, begin: int, coarsened: Coarsened) -> Words:
    """Whether each element of a chunk has a smaller exponent than the merged one."""
    merged = coarsened.merged.view(guess.dtype)[begin : begin + len(guess)]
    bits = 8 * guess.itemsize
    exponent = guess.dtype.type((1 << (bits - 1)) - (1 << coarsened.fraction))
    smaller: Words = (merged & exponent) > (guess & exponent)
    return smaller


def _gaps(positions: Words) -> Bytes:
    """Steps from each position to the next, the first from before the chunk, as bytes."""
    steps = np.diff(positions, prepend=-1)
    far, rest = np.divmod(steps, _FAR)
    gaps = np.full(int(far.sum()) + len(steps), _FAR, np.uint8)
    gaps[np.cumsum(far + 1) - 1] = rest
    return gaps


def _positions(gaps: Bytes) -> Words:
    reached: Words = np.cumsum(gaps, dtype=np.int64)[gaps != _FAR] - 1
    if len(reached) and (reached[0] < 0 or (np.diff(reached) < 1).any()):
        raise ValueError("positions out of order")
    return reached


def _zigzag(difference: Words) -> Words:
    sign = difference >> (8 * difference.itemsize - 1)
    return (difference << 1) ^ -sign


def _unzigzag(codes: Words) -> Words:
    return (codes >> 1) ^ -(codes & 1)


def _exactly(stream: zstandard.ZstdDecompressionReader, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            raise ValueError("it ends too early")
        data += more
    return data
