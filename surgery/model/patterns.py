"""Selects tensors by patterns: case-sensitive shell globs on full names, or regular expressions after `re:`.

`*` also crosses dots, a regular expression must match the whole name, and a pattern that matches nothing is an error.
Knows names only.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from formats.errors import UnknownTensor
from formats.names import nearest
from surgery.errors import SurgeryError

REGEX = "re:"


def matcher(pattern: str) -> Callable[[str], bool]:
    """Returns a test of whether a full name matches the pattern.

    Raises:
        SurgeryError: an invalid regular expression.
    """
    expression = pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else fnmatch.translate(pattern)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise SurgeryError(
            "this is not a valid regular expression",
            expected="the syntax of Python's re module",
            found=f"{pattern}: {error}",
            then="correct the pattern, or leave out re: to use a shell glob",
        ) from error
    return lambda name: compiled.fullmatch(name) is not None


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """The names that match, in order.

    Raises:
        SurgeryError: an invalid regular expression.
        UnknownTensor: no name matches.
    """
    matches = matcher(pattern)
    found = [name for name in names if matches(name)]
    if not found:
        close = _nearest(pattern, names)
        raise UnknownTensor(
            "the pattern matches no tensor",
            expected=pattern,
            found=f"nearest: {', '.join(close)}" if close else None,
            then="write a pattern that matches the whole name, case-sensitively, such as '*.q_proj.weight'",
        )
    return found


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Names whose parts look like the words of a pattern: a whole name is usually longer than a pattern."""
    parts = sorted({part for name in names for part in name.split(".")})
    words = [word for word in re.findall(r"[A-Za-z_]\w+", pattern.removeprefix(REGEX)) if word not in parts]
    meant = {word: difflib.get_close_matches(word, parts, n=1) for word in words}
    alike = [name for name in names if any(set(close) & set(name.split(".")) for close in meant.values())]
    return alike[:3] or nearest(pattern, names)


def select(names: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The names that match any of `include` (all names if it is empty) and none of `exclude`, in order.

    Raises:
        SurgeryError: an invalid regular expression.
        UnknownTensor: a pattern that matches nothing.
    """
    names = list(names)
    included = {name for pattern in include for name in matching(names, pattern)} if include else set(names)
    excluded = {name for pattern in exclude for name in matching(names, pattern)}
    return [name for name in names if name in included - excluded]


def rank_override(text: str) -> tuple[str, int]:
    """The pattern and the rank of a text `PATTERN=RANK`.

    Raises:
        SurgeryError: the last `=` is not followed by a rank of at least 1.
    """
    pattern, _, rank = text.rpartition("=")  # a regular expression may contain =
    if not pattern or not rank.isdecimal() or int(rank) < 1:
        raise SurgeryError("not a pattern and its rank", expected="PATTERN=RANK, such as *.mlp.*=16", found=text)
    return pattern, int(rank)
