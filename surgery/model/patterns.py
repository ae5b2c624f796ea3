"""Selects tensors by patterns: case-sensitive shell globs on full names, or regular expressions with a leading `re:`.

`*` also matches dots, a regular expression must match the whole name, and a pattern that matches nothing is an error.
This module knows names only.
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
    """A function that says whether a full name matches the pattern.

    Raises:
        SurgeryError: the pattern is not a valid regular expression.
    """
    expression = pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else fnmatch.translate(pattern)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise SurgeryError(
            f"not a regular expression: {error}",
            found=pattern,
            then="correct it, or leave out re: to use it as a glob",
        ) from error
    return lambda name: compiled.fullmatch(name) is not None


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """The names that match, in order.

    Raises:
        SurgeryError: the pattern is not a valid regular expression.
        UnknownTensor: no name matches.
    """
    matches = matcher(pattern)
    found = [name for name in names if matches(name)]
    if not found:
        close = _nearest(pattern, names)
        raise UnknownTensor(
            "a pattern matches no tensor",
            expected=pattern,
            found=f"nearest: {', '.join(close)}" if close else None,
            then="correct the pattern: it must match whole names, case-sensitively, as '*.q_proj.weight' does",
        )
    return found


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Names with parts that look like the words of a pattern, because a pattern is usually shorter than a name."""
    parts = sorted({part for name in names for part in name.split(".")})
    words = [word for word in re.findall(r"[A-Za-z_]\w+", pattern.removeprefix(REGEX)) if word not in parts]
    meant = {word: difflib.get_close_matches(word, parts, n=1) for word in words}
    alike = [name for name in names if any(set(close) & set(name.split(".")) for close in meant.values())]
    return alike[:3] or nearest(pattern, names)


def select(names: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The names that match any of `include` (all, if there is none) and none of `exclude`, in order.

    Raises:
        SurgeryError: a pattern is not a valid regular expression.
        UnknownTensor: a pattern matches nothing.
    """
    names = list(names)
    included = {name for pattern in include for name in matching(names, pattern)} if include else set(names)
    excluded = {name for pattern in exclude for name in matching(names, pattern)}
    return [name for name in names if name in included - excluded]


def rank_override(text: str) -> tuple[str, int]:
    """The pattern and the rank in a text `PATTERN=RANK`.

    Raises:
        SurgeryError: there is no rank of at least 1 after the last `=`.
    """
    pattern, _, rank = text.rpartition("=")  # the last one, because a regular expression may contain "="
    if not pattern or not rank.isdecimal() or int(rank) < 1:
        raise SurgeryError(
            "not a pattern and its rank",
            expected="PATTERN=RANK, such as *.mlp.*=16",
            found=text,
            then="write it in this form, with a rank of at least 1",
        )
    return pattern, int(rank)
