"""The adapters of one merge: how a caller names them, opens them, weighs them and sorts them.

They are sorted by digest, so that their order on the command line does not affect the sums. Knows no method's
mathematics.
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

AdapterPath = str | Path | tuple[str | Path, float | None]  # with its weight; None if the caller gives none
AdapterPaths = AdapterPath | Sequence[AdapterPath]


@dataclass(frozen=True)
class WeighedAdapter:
    """One adapter of a merge.

    Attributes:
        adapter: resolved against the base's names.
        weight: the factor of its delta; None if none was given.
        digest: its content digest, scalings included.
        tensors: BLAKE3 of each of its tensors that is merged, by name.
    """

    adapter: Adapter
    weight: float | None
    digest: str
    tensors: Mapping[str, str]

    @property
    def strength(self) -> float:
        """The factor of its delta; 1 if none was given."""
        return 1.0 if self.weight is None else self.weight

    @property
    def record(self) -> MergedAdapter:
        """The entry for this adapter in a receipt."""
        return MergedAdapter(self.digest, self.strength, self.tensors)


def adapter_paths(adapters: AdapterPaths) -> tuple[tuple[Path, float | None], ...]:
    """Every adapter's path and weight. The caller may pass a path, (path, weight), or a sequence of these."""
    if isinstance(adapters, (str, Path)):
        return ((Path(adapters), None),)
    if len(adapters) == 2 and (adapters[1] is None or isinstance(adapters[1], (int, float))):
        return ((Path(str(adapters[0])), adapters[1]),)
    return tuple(pair for each in adapters for pair in adapter_paths(each))  # type: ignore[arg-type]


def adapter_files(adapters: AdapterPaths, files: OpenFiles) -> tuple[tuple[AdapterFile, float | None], ...]:
    """Opens every adapter and pairs it with its weight. Raises as `open_adapter_file`."""
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
        model: the base, which knows names that its file does not have; None if only its specs are known.
        adapters: open files, each with its weight or None.
        specs: the model's tensors.
        weight: a factor for all of them; None if none was given.
        told: alpha and layout for adapters whose dialect has no config.
        with_heads: whether heads stored next to adapters belong to them.

    Raises:
        AdapterFormatError: `told` gives a value that none of them needs.
        NothingToDo: no adapter, one without tensors, or a weight of 0.
        NotMergeable: the same adapter is given twice.
        NotFinite: an adapter or a weight holds NaN or Inf.
        FormatError: as `open_adapter`.
    """
    found: dict[str, WeighedAdapter] = {}
    for file, own in adapters:
        path = file.path
        factor = _product(own, weight)
        if factor is not None and not math.isfinite(factor):
            raise NotFinite(
                "the weight is not finite", where=path, found=f"weight {factor}", then="pass a finite weight, such as 1"
            )
        adapter = file.read(specs, told=told) if model is None else read_adapter(model, file, specs, told)
        if with_heads and model is not None and file.dialect.has_head(path):
            adapter = _with_head(adapter, file.dialect.head(path, specs, model.config, file.files))
        if not adapter.tensors or factor == 0:
            raise NothingToDo(
                "the merge would change nothing",
                where=path,
                found=f"{len(adapter.tensors)} tensors, weight {1.0 if factor is None else factor}",
                then="pass an adapter with tensors, and a weight other than 0",
            )
        digest, tensors = fingerprint(adapter, file.files)
        if digest in found:
            raise NotMergeable(
                "the same adapter is given twice",
                where=path,
                found=f"the content of {found[digest].adapter.ref.path}",
                then="to apply it more strongly, name it once with a weight: PATH:2",
            )
        found[digest] = WeighedAdapter(adapter, factor, digest, tensors)
    if not found:
        raise NothingToDo("no adapter was given", where=None if model is None else model.path, then="name one")
    where = ", ".join(each.adapter.ref.path for each in found.values())
    refuse_unasked(told, [file.dialect for file, _ in adapters], where)
    return tuple(found[digest] for digest in sorted(found))


def _with_head(adapter: Adapter, head: Whole | None) -> Adapter:
    """The adapter together with the head that is stored next to it."""
    if head is None:
        return adapter
    if head.left:
        return replace(adapter, notes=(*adapter.notes, f"the head ({head.kind}) is left out: {head.left}"))
    carried = tuple(Replacement(name, source, False) for name, source in head.tensors.items())
    return replace(adapter, replacements=(*adapter.replacements, *carried))


def refuse_grafted(model: Path) -> None:
    """Raises NotMergeable for a folded model that keeps parts of its adapter in the graph: it is incomplete without."""
    beside = model / GRAFTS_FILE
    if beside.exists():
        raise NotMergeable(
            "an earlier fold left parts of an adapter next to this model; another merge or fold would lose them",
            where=beside,
            then="start from the original model: merge the adapter that goes into the weights, then fold the other",
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
    """Opens adapters against the outline of the merged model, and returns both.

    Args:
        model, adapters, weight, told: as for `open_adapters`.
        untie: whether a head tied to its embedding becomes a tensor of its own.
        with_heads: as for `open_adapters`.

    Raises:
        NotMergeable: an adapter changes a tied head and `untie` is false; or as `outline_of`, `refuse_grafted`.
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
    """The modules that adapt each weight, each with its factor, in the adapters' order.

    Args:
        adapters: the opened adapters.
        tensor: finds a tensor of the model by name, for modules that read another tensor besides their target.
    """
    modules: dict[str, tuple[tuple[AdapterModule, float], ...]] = {}
    for each in adapters:
        for module in each.adapter.modules:
            if module.reads is not None:
                module = replace(module, factors={**module.factors, "weight": tensor(module.reads)})
            modules[module.target] = (*modules.get(module.target, ()), (module, each.strength))
    return modules


def replacements(adapters: Sequence[WeighedAdapter]) -> dict[str, tuple[Replacement, ...]]:
    """The tensors that replace the base's or are added to it, by target: whole tensors first, then rows.

    Raises NotMergeable if two adapters replace the same tensor, because their order must not matter.
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
                    then="merge one of them without it, or merge one after the other: the later one wins",
                )
            found[full.target] = (*found.get(full.target, ()), full)
    return found


def check_receipt(path: str, adapters: Sequence[WeighedAdapter], receipt: Receipt) -> tuple[WeighedAdapter, ...]:
    """Gives the adapters the weights in the receipt. Raises NotMerged if it records other adapters or weights."""
    weights = {past.digest: past.weight for past in receipt.adapters}
    given = tuple(each.digest for each in adapters)
    if set(given) != set(weights):
        raise NotMerged(
            "another adapter was merged into this file last"
            if len(weights) == len(given) == 1
            else "other adapters were merged into this file last, and all adapters of one merge come off together",
            where=path,
            expected=", ".join(f"adapter {digest[:16]}" for digest in weights),
            found=", ".join(f"adapter {each.digest[:16]} ({each.adapter.ref.path})" for each in adapters),
            then="take adapters off in the reverse order of their merges",
        )
    for each in adapters:
        if each.weight is not None and each.weight != weights[each.digest]:
            raise NotMerged(
                "the receipt records another weight",
                where=each.adapter.ref.path,
                expected=weights[each.digest],
                found=each.weight,
                then="leave the weight out: the receipt knows it",
            )
    return tuple(replace(each, weight=weights[each.digest]) for each in adapters)
