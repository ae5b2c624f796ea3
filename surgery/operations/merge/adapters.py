"""The adapters of one merge: how a caller names them, opened, weighed, and put in an order of their own.

The order is that of their digests, so that no command line's can show in the sums. Knows no method's mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from formats.adapter import NOTHING_TOLD, Adapter, AdapterModule, Replacement, Told
from formats.dialects import AdapterFile, open_adapter_file, refuse_unasked
from formats.dialects.prompts import Whole
from formats.errors import UnmatchedKeys
from formats.grafts import GRAFTS_FILE
from formats.open_files import OpenFiles
from formats.spec import TensorRef, TensorSpec
from surgery.errors import NotFinite, NothingToDo, NotMergeable, NotMerged
from surgery.model.base_model import BaseModel
from surgery.model.names import read_adapter
from surgery.model.outline import Outline, head_is_tied, outline_of
from surgery.receipts.receipt import MergedAdapter, Receipt, fingerprint

AdapterPath = str | Path | tuple[str | Path, float | None]  # with its weight; None where the caller does not say
AdapterPaths = AdapterPath | Sequence[AdapterPath]


@dataclass(frozen=True)
class WeighedAdapter:
    """One adapter of a merge.

    Attributes:
        adapter: resolved against the base's names.
        weight: the factor of its delta; None where nobody said.
        digest: its content address, scalings included.
        tensors: BLAKE3 of every tensor of it that takes part, by name.
    """

    adapter: Adapter
    weight: float | None
    digest: str
    tensors: Mapping[str, str]

    @property
    def strength(self) -> float:
        """The factor of its delta, 1 where nobody said."""
        return 1.0 if self.weight is None else self.weight

    @property
    def record(self) -> MergedAdapter:
        """What a receipt says of it."""
        return MergedAdapter(self.digest, self.strength, self.tensors)


def adapter_paths(adapters: AdapterPaths) -> tuple[tuple[Path, float | None], ...]:
    """Every adapter's path and weight, however the caller put them: a path, (path, weight), or a sequence of these."""
    if isinstance(adapters, (str, Path)):
        return ((Path(adapters), None),)
    if len(adapters) == 2 and (adapters[1] is None or isinstance(adapters[1], (int, float))):
        return ((Path(str(adapters[0])), adapters[1]),)
    return tuple(pair for each in adapters for pair in adapter_paths(each))  # type: ignore[arg-type]


def adapter_files(adapters: AdapterPaths, files: OpenFiles) -> tuple[tuple[AdapterFile, float | None], ...]:
    """Every adapter, opened, with its weight. Raises as `open_adapter_file`."""
    return tuple((open_adapter_file(path, files), weight) for path, weight in adapter_paths(adapters))


def open_adapters(
    model: BaseModel | None,
    adapters: Sequence[tuple[AdapterFile, float | None]],
    specs: Mapping[str, TensorSpec],
    weight: float | None = None,
    told: Told = NOTHING_TOLD,
    *,
    with_heads: bool = True,
) -> tuple[WeighedAdapter, ...]:
    """Opens adapters against a model's tensors, in the order of their digests.

    Args:
        model: the base, which knows names that its file does not have; None where only its specs are known.
        adapters: opened, with weights or without.
        specs: the model's tensors.
        weight: a factor of all of them; None where nobody said.
        told: what the caller says of those whose dialect has no config.
        with_heads: whether heads that lie beside adapters are theirs.

    Raises:
        AdapterFormatError: something is told that none of them asks for.
        NothingToDo: no adapter, one without tensors, or a weight of 0.
        NotMergeable: the same adapter twice.
        NotFinite: NaN or Inf in an adapter or a weight.
        FormatError: as `open_adapter`.
    """
    found: dict[str, WeighedAdapter] = {}
    for file, own in adapters:
        path = file.path
        factor = _product(own, weight)
        if factor is not None and not math.isfinite(factor):
            raise NotFinite("a weight that is no number", where=path, found=f"weight {factor}")
        adapter = file.read(specs, told=told) if model is None else read_adapter(model, file, specs, told)
        if with_heads and model is not None and file.dialect.has_head(path):
            adapter = _with_head(adapter, file.dialect.head(path, specs, model.config, file.files))
        if not adapter.tensors or factor == 0:
            raise NothingToDo("the merge would change nothing", where=path, found=f"weight {factor}")
        digest, tensors = fingerprint(adapter, file.files)
        if digest in found:
            raise NotMergeable(
                "the same adapter twice",
                where=path,
                found=f"the content of {found[digest].adapter.ref.path}",
                then="to apply it more strongly, name it once with a weight: PATH:2",
            )
        found[digest] = WeighedAdapter(adapter, factor, digest, tensors)
    if not found:
        raise NothingToDo("no adapter was named", where=None if model is None else model.path, then="name one")
    where = ", ".join(each.adapter.ref.path for each in found.values())
    refuse_unasked(told, [file.dialect for file, _ in adapters], where)
    return tuple(found[digest] for digest in sorted(found))


def _with_head(adapter: Adapter, head: Whole | None) -> Adapter:
    """An adapter that has a head beside it."""
    if head is None:
        return adapter
    if head.left:
        return replace(adapter, notes=(*adapter.notes, f"the head ({head.kind}) is left: {head.left}"))
    carried = tuple(Replacement(name, source, False) for name, source in head.tensors.items())
    return replace(adapter, replacements=(*adapter.replacements, *carried))


def refuse_grafted(model: Path) -> None:
    """Raises NotMergeable for a folded model that has parts of its adapter in the graph: only they make it whole."""
    beside = model / GRAFTS_FILE
    if beside.exists():
        raise NotMergeable(
            "an earlier fold left parts of an adapter beside this model, which another one would lose",
            where=beside,
            then="put both adapters into the original model, the one that goes into the weights first",
        )


def open_for_merge(
    model: BaseModel,
    adapters: Sequence[tuple[AdapterFile, float | None]],
    weight: float | None = None,
    told: Told = NOTHING_TOLD,
    *,
    untie: bool = False,
    with_heads: bool = True,
) -> tuple[tuple[WeighedAdapter, ...], Outline]:
    """Opens adapters against what a base is to become, and says what that is.

    Args:
        model, adapters, weight, told: as for `open_adapters`.
        untie: whether a head tied to its embedding becomes a tensor of its own.
        with_heads: as for `open_adapters`.

    Raises:
        NotMergeable: an adapter changes a tied head, which may not be untied; or as `outline_of`, `refuse_grafted`.
        ReportedError: as `open_adapters`.
    """
    refuse_grafted(model.path)
    opened_files = [file for file, _ in adapters]
    outline = outline_of(model, opened_files, untie=untie)
    try:
        opened = open_adapters(model, adapters, outline.specs, weight, told, with_heads=with_heads)
    except UnmatchedKeys:
        heads = {} if untie else model.tied_head(outline.specs)
        if not heads:
            raise
        open_adapters(model, adapters, outline_of(model, opened_files, untie=True).specs, weight, told)
        raise head_is_tied(*next(iter(heads.items())), model.path) from None
    added = {full.target for each in opened for full in each.adapter.replacements if full.added}
    for head, embedding in model.tied_head(outline.specs).items() if added and not untie else ():
        if head in added:
            raise head_is_tied(head, embedding, model.path)
    return opened, outline


def _product(own: float | None, weight: float | None) -> float | None:
    if own is None or weight is None:
        return weight if own is None else own
    return own * weight


def weighed_modules(
    adapters: Sequence[WeighedAdapter], tensor: Callable[[str], TensorRef]
) -> dict[str, tuple[tuple[AdapterModule, float], ...]]:
    """Everything that adapts each weight, with its factor, in the adapters' order.

    Args:
        adapters: opened.
        tensor: finds a tensor of the model by its name, for modules that read one beside their target.
    """
    modules: dict[str, tuple[tuple[AdapterModule, float], ...]] = {}
    for each in adapters:
        for module in each.adapter.modules:
            if module.reads is not None:
                module = replace(module, factors={**module.factors, "weight": tensor(module.reads)})
            modules[module.target] = (*modules.get(module.target, ()), (module, each.strength))
    return modules


def replacements(adapters: Sequence[WeighedAdapter]) -> dict[str, tuple[Replacement, ...]]:
    """What replaces each tensor or is added to the base: whole tensors first, then rows of them.

    Raises NotMergeable for a tensor that two adapters replace: no order could decide between them.
    """
    owners: dict[str, WeighedAdapter] = {}
    found: dict[str, tuple[Replacement, ...]] = {}
    for each in adapters:
        for full in sorted(each.adapter.replacements, key=lambda full: bool(full.rows)):
            owner = owners.setdefault(full.target, each)
            if owner is not each:
                raise NotMergeable(
                    "two adapters replace the same tensor",
                    where=full.target,
                    found=f"{owner.adapter.ref.path} and {each.adapter.ref.path}",
                    then="merge one of them without it, or one after the other: the later one wins",
                )
            found[full.target] = (*found.get(full.target, ()), full)
    return found


def check_receipt(path: str, adapters: Sequence[WeighedAdapter], receipt: Receipt) -> tuple[WeighedAdapter, ...]:
    """The adapters with the weights that the receipt records. Raises NotMerged where it records others."""
    weights = {past.digest: past.weight for past in receipt.adapters}
    given = tuple(each.digest for each in adapters)
    if set(given) != set(weights):
        raise NotMerged(
            "the last merge into this file was of another adapter"
            if len(weights) == len(given) == 1
            else "the last merge into this file was of other adapters: all of one merge come off at once",
            where=path,
            expected=", ".join(f"adapter {digest[:16]}" for digest in weights),
            found=", ".join(f"adapter {each.digest[:16]} ({each.adapter.ref.path})" for each in adapters),
            then="take adapters off in the reverse order of their merging",
        )
    for each in adapters:
        if each.weight is not None and each.weight != weights[each.digest]:
            raise NotMerged(
                "the receipt records another weight",
                where=each.adapter.ref.path,
                expected=weights[each.digest],
                found=each.weight,
            )
    return tuple(replace(each, weight=weights[each.digest]) for each in adapters)
