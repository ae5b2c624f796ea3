"""Maps an adapter's module paths to the base's tensor names.

Adapters name modules of the model they were trained on. Base files often lack the first part of the name, or have one
more (`bert.encoder…` for `encoder…`). One such difference is accepted if it fits every key, never key by key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from formats.errors import UnmatchedKeys
from formats.names import nearest
from formats.spec import TensorSpec

Rename = Callable[[str], str]


def resolver(wanted: Iterable[str], base: Mapping[str, TensorSpec], where: object) -> Rename:
    """The renaming under which every wanted tensor is one of the base's.

    Raises:
        UnmatchedKeys: no renaming fits all of them. The error lists the unmatched names with the nearest ones.
    """
    wanted = sorted(set(wanted))
    renamings: list[Rename] = [lambda name: name]
    renamings += [_stripping(prefix) for prefix in sorted({_head(name) for name in wanted if "." in name})]
    renamings += [_adding(prefix) for prefix in sorted({_head(name) for name in base if "." in name})]
    unmatched, rename = min(
        ((sum(renaming(name) not in base for name in wanted), renaming) for renaming in renamings),
        key=lambda pair: pair[0],
    )
    if unmatched:
        raise unmatched_keys([name for name in wanted if rename(name) not in base], len(wanted), base, where)
    return rename


def unmatched_keys(names: list[str], total: int, base: Mapping[str, TensorSpec], where: object) -> UnmatchedKeys:
    """The error for adapter tensors that match nothing, with the nearest names of the base."""
    lines = [f"{name} (nearest: {', '.join(nearest(name, base)) or 'none similar'})" for name in names[:5]]
    if len(names) > 5:
        lines.append(f"and {len(names) - 5} more")
    return UnmatchedKeys(
        f"{len(names)} of {total} adapter targets match nothing in the base",
        where=where,
        found="\n            ".join(lines),
        then="check that the adapter was made for this base",
    )


def _head(name: str) -> str:
    return name.partition(".")[0] + "."


def _stripping(prefix: str) -> Rename:
    return lambda name: name.removeprefix(prefix)


def _adding(prefix: str) -> Rename:
    return lambda name: prefix + name
