"""Maps kohya's layer names, in which dots became underscores, back to the base's modules.

A name does not show which underscores were dots, so the base's own names are converted to the same form and looked up.
One leading part more or less is accepted if it fits every key, and so are the other names of a UNet's layers. This
module knows no factors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from formats.dialects.unet_names import other_names
from formats.errors import AdapterFormatError, UnmatchedKeys
from formats.layers import owner
from formats.spec import TensorSpec

# Names of blocks in the original checkpoints of Flux and SD3, which diffusers does not use.
_FUSED = ("double_blocks_", "single_blocks_", "joint_blocks_")


def underscored(module: str) -> str:
    """A module's name in kohya's form."""
    return module.replace(".", "_")


def restored(wanted: Iterable[str], base: Mapping[str, TensorSpec], where: object) -> dict[str, str]:
    """The base's module for every layer's name.

    Raises:
        UnmatchedKeys: the base does not have a layer. The error lists the nearest names.
        AdapterFormatError: two modules of the base have the same name in kohya's form.
    """
    wanted = sorted(set(wanted))
    modules = sorted({owner(name) for name in base if owner(name)})
    indexes = [_index(modules, head) for head in ["", *_heads(modules, wanted)]]
    indexes += [_behind(indexes[0], leading) for leading in _leading(wanted)]
    indexes.append(_translated(modules))
    unmatched, index = min(
        ((sum(name not in index for name in wanted), index) for index in indexes), key=lambda pair: pair[0]
    )
    if unmatched:
        raise _unmatched([name for name in wanted if name not in index], len(wanted), index, where)
    for name in wanted:
        if len(index[name]) > 1:
            raise AdapterFormatError(
                "a layer's name matches several modules of the base, which differ only in dots and underscores",
                where=f"{where}: {name}",
                expected="one module",
                found=", ".join(index[name]),
                then="use the adapter in a dialect with dotted names: diffusers, comfyui or peft",
            )
    return {name: index[name][0] for name in wanted}


def _heads(modules: Iterable[str], wanted: list[str]) -> list[str]:
    """Prefixes of the base's names: their first one or two parts, and whatever comes before the first wanted name, as
    in checkpoints of whole pipelines."""
    found = set()
    for module in modules:
        parts = module.split(".")
        found |= {".".join(parts[:depth]) + "." for depth in (1, 2) if len(parts) > depth}
        if wanted and underscored(module).endswith(f"_{wanted[0]}"):
            found.add(module[: -len(wanted[0])])
    return sorted(head for head in found if head.endswith("."))


def _index(modules: Iterable[str], head: str) -> dict[str, list[str]]:
    """The modules whose names begin with `head`, by the rest of the name in kohya's form."""
    index: dict[str, list[str]] = {}
    for module in modules:
        if module.startswith(head):
            index.setdefault(underscored(module[len(head) :]), []).append(module)
    return index


def _translated(modules: Iterable[str]) -> dict[str, list[str]]:
    """The modules of a UNet by their other names (the original checkpoint's, or diffusers') in kohya's form."""
    index: dict[str, list[str]] = {}
    for name, module in other_names(modules).items():
        index.setdefault(underscored(name), []).append(module)
    return index


def _leading(wanted: list[str]) -> list[str]:
    """The first one to three words with which all layers' names begin."""
    words = wanted[0].split("_") if wanted else []
    heads = ["_".join(words[:count]) + "_" for count in range(1, min(4, len(words)))]
    return [head for head in heads if all(name.startswith(head) for name in wanted)]


def _behind(index: Mapping[str, list[str]], leading: str) -> dict[str, list[str]]:
    return {leading + name: modules for name, modules in index.items()}


def _unmatched(names: list[str], total: int, index: Mapping[str, list[str]], where: object) -> UnmatchedKeys:
    lines = []
    for name in names[:5]:
        near = [index[form][0] for form in difflib.get_close_matches(name, index, n=3, cutoff=0.3)]
        lines.append(f"{name} (nearest: {', '.join(near) or 'none similar'})")
    if len(names) > 5:
        lines.append(f"and {len(names) - 5} more")
    fused = all(name.startswith(_FUSED) for name in names)
    return UnmatchedKeys(
        f"{len(names)} of {total} layers of the adapter match nothing in the base",
        where=where,
        found="\n            ".join(lines),
        then="use the original checkpoint as the base: in these layers query, key and value are one tensor"
        if fused
        else "check that the adapter was made for this base",
    )
