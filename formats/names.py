"""Suggests the nearest names for a name that was not found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from formats.errors import UnknownTensor


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of the known names that look most like `name`, the likeliest first.

    Names with the same last two parts are compared first: a wrong prefix is the most common mistake, and a model has
    thousands of names that differ by a digit.
    """
    known = list(known)
    tail = name.rsplit(".", 2)[-2:]
    alike = [other for other in known if other.rsplit(".", 2)[-2:] == tail]
    return difflib.get_close_matches(name, alike or known[:5000], n=count, cutoff=0.3)


def unknown_tensor(name: str, known: Iterable[str], where: object) -> UnknownTensor:
    """The error for a missing tensor, with the nearest names."""
    close = nearest(name, known)
    return UnknownTensor(
        "no tensor of that name",
        where=where,
        expected=name,
        found=f"nearest: {', '.join(close)}" if close else None,
        then="check the name: surgery inspect lists all",
    )
