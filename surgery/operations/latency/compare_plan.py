"""Plans compare before any graph is made: names, methods and sizes of adapters, what folds, and which graphs to make.

Reads headers, and payloads only for digests. An adapter with any fault is refused here.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.adapter import NOTHING_TOLD, Adapter
from formats.dialects import AdapterFile
from formats.dialects.adapterhub_beside import Part
from formats.dialects.bottleneck import Bottleneck, Bottlenecks, Dense, Hypercomplex
from formats.dialects.prompts import Network, Prefix, Prompt
from formats.errors import PathNotFound, ReportedError
from formats.spec import TensorRef
from surgery.errors import NothingToDo, Unsupported
from surgery.methods import additive, method_named
from surgery.methods.activations import LINEAR, activation
from surgery.model.base_model import BaseModel
from surgery.onnx.adapters.bottleneck import HALF
from surgery.onnx.timing.compared import Becoming
from surgery.operations.export.loras import LorasInGraph
from surgery.operations.fold.fold import merged_verdicts
from surgery.operations.fold.open import fingerprint_beside, open_parts, open_single
from surgery.operations.fold.plan import plan_fold
from surgery.operations.fold.verdicts import Verdict, Way
from surgery.operations.merge.adapters import open_for_merge
from surgery.operations.merge.plan import plan_merge

BASE = "base"  # the name of the model's own graph
NamedAdapter = str | Path | tuple[str, str | Path]


@dataclass(frozen=True)
class Planned:
    """An adapter to compare.

    Attributes:
        file: the opened adapter.
        name, method, placement, non_linearity, parameters, tokens: see ComparedAdapter.
        becomes: what fold makes of its parts.
        form: form of its graph after fold.
        changes: whether fold changes a weight.
        branches: whether the whole adapter can be nodes of a graph, and this graph differs from the one after fold.
        notes: notes for the user.
    """

    file: AdapterFile
    name: str
    method: str
    placement: str
    non_linearity: str
    parameters: int
    tokens: int
    becomes: tuple[Becoming, ...]
    form: str
    changes: bool
    branches: bool
    notes: tuple[str, ...] = ()

    @property
    def folds(self) -> str:
        """How much of the adapter goes into the weights."""
        ways = {each.way for each in self.becomes}
        if ways <= {Way.FOLDED, Way.WIDENED}:
            return "yes"
        return "half" if ways == {Way.HALF} else "no" if ways == {Way.GRAPH} else "in part"


def named(adapters: Sequence[NamedAdapter]) -> dict[str, Path]:
    """The adapters' paths by name: the given names, or the names of their files and folders.

    Raises:
        NothingToDo: there are no adapters.
        PathNotFound: a path does not exist.
        Unsupported: two adapters have the same name, or a name is invalid.
    """
    found: dict[str, Path] = {}
    for each in adapters:
        name, path = each if isinstance(each, tuple) else ("", each)
        path = Path(path)
        if not path.exists():
            raise PathNotFound("no such file or folder", where=path, then="check the path of the adapter")
        whole = path.resolve()
        name = name or (whole.name if whole.is_dir() else whole.stem)
        if name in (BASE, ".", "..") or any(letter in "/\\\0" for letter in name):
            raise Unsupported(
                "an adapter cannot be called that",
                where=path,
                expected=f"a name without slashes, and not {BASE}, which is the model's own",
                found=name,
                then=f"give it another name: --adapter NAME={path}",
            )
        if name in found:
            raise Unsupported(
                "two adapters have the same name",
                where=f"{found[name]} and {path}",
                found=name,
                then=f"give one of them another name: --adapter NAME={path}",
            )
        found[name] = path
    if not found:
        raise NothingToDo("no adapter was named, so there is nothing to compare the model with", then="--adapter PATH")
    return found


@contextlib.contextmanager
def concerning(name: str, path: Path) -> Iterator[None]:
    """Adds the adapter's name to errors that are raised within."""
    try:
        yield
    except ReportedError as error:
        error.details = {"adapter": f"{name} ({path})", **error.details}
        raise


def plan_adapter(model: BaseModel, name: str, path: Path) -> Planned:
    """Describes an adapter, and plans the graphs to make of it.

    Args:
        model: the base.
        name: the adapter's name.
        path: its file or folder.

    Raises:
        ReportedError: as fold, and as merge for an adapter that is a change of weights.
    """
    with concerning(name, path):
        file = open_single(path, model.files)
        parts = open_parts(model, file)
        return _merging(model, name, file) if parts is None else _beside(model, name, file, parts)


def _beside(model: BaseModel, name: str, file: AdapterFile, parts: Sequence[Part]) -> Planned:
    """An adapter that adds modules next to the weights."""
    folding = plan_fold(model, parts, fingerprint_beside(file))
    ways = {each.way for each in folding.verdicts}
    refs = {ref for part in parts for ref in _trained(part)}
    return Planned(
        file=file,
        name=name,
        method=_joined(map(_method, parts)),
        placement=_joined(map(_placement, parts)),
        non_linearity=_joined(filter(None, map(_non_linearity, parts))) or "none",
        parameters=sum(ref.spec.size for ref in refs),
        tokens=sum(part.embedding.spec.shape[0] for part in parts if isinstance(part, Prompt)),
        becomes=_becomes(folding.verdicts),
        form=_form(ways, {each.verdict.way for _, each in folding.judged}),
        changes=bool(ways & {Way.FOLDED, Way.WIDENED}),
        branches=any(each.verdict.way is not Way.GRAPH for _, each in folding.judged),
    )


def _merging(model: BaseModel, name: str, file: AdapterFile) -> Planned:
    """An adapter that changes weights."""
    opened, outline = open_for_merge(model, ((file, None),))
    plan_merge(model, opened, outline)
    adapter = opened[0].adapter
    try:
        LorasInGraph.of(model, [file], "branch", model.specs, NOTHING_TOLD)
        notes = []
    except Unsupported as error:
        notes = [f"{name} cannot be a branch: {error.what}"]
    methods = [method_named(module.method).title for module in adapter.modules]
    whole = ["in full"] if adapter.replacements else []
    return Planned(
        file=file,
        name=name,
        method=_joined([*methods, *whole]),
        placement=_joined(_placements(adapter)),
        non_linearity="none",
        parameters=sum(size for _, size in {(ref.name, ref.spec.size) for ref in _factors(adapter)}),
        tokens=0,
        becomes=_becomes(merged_verdicts(model, file, opened)),
        form="merged",
        changes=True,
        branches=not notes,
        notes=tuple(notes),
    )


def _form(ways: Collection[str], of_bottlenecks: Collection[Way]) -> str:
    """The part that goes into the weights, and the form of the rest in the graph, in export-onnx's terms."""
    inside = [way for way in (Way.WIDENED, Way.FOLDED) if way in ways][:1]
    left = [HALF] if Way.HALF in of_bottlenecks else ["branch"] if Way.GRAPH in of_bottlenecks else []
    return " + ".join([*inside, *(left or (["constants"] if Way.GRAPH in ways else []))])


def _factors(adapter: Adapter) -> Iterator[TensorRef]:
    for module in adapter.modules:
        frozen = method_named(module.method).frozen
        for role, ref in module.factors.items():
            if ref.spec.dtype.is_float and role not in frozen:
                yield ref
    yield from (full.source for full in adapter.replacements)


def _placements(adapter: Adapter) -> Iterator[str]:
    for module in adapter.modules:
        yield "parallel" if additive(module) else "sequential"
    if adapter.replacements:
        yield "in place"


def _joined(said: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(said))


def _becomes(verdicts: Iterable[Verdict]) -> tuple[Becoming, ...]:
    counts = Counter((str(each.way), each.reason) for each in verdicts)
    return tuple(Becoming(way=way, reason=reason, parts=parts) for (way, reason), parts in counts.items())


def _method(part: Part) -> str:
    """The method's usual name, from its places and its projections."""
    if isinstance(part, Prefix):
        return "prefix"
    if isinstance(part, Prompt):
        return "prompt"
    if not isinstance(part, Bottlenecks):
        return "in full"
    places = {one.place for one in part.modules}
    if any(isinstance(one.down, Hypercomplex) for one in part.modules):
        return "compacter" if "mh_adapter" in places else "compacter++"
    if part.parallel:
        return "parallel" if all(one.scaling == 1 for one in part.modules) else "scaled parallel"
    if part.original_ln_before:
        return "Pfeiffer" if places == {"output_adapter"} else "bottleneck"
    return "Houlsby" if places == {"mh_adapter", "output_adapter"} else "bottleneck"


def _placement(part: Part) -> str:
    if isinstance(part, Prompt):
        return "input"
    if isinstance(part, Prefix):
        return "parallel"
    if isinstance(part, Bottlenecks):
        return "parallel" if part.parallel else "sequential"
    return "in place"


def _non_linearity(part: Part) -> str:
    """The non-linearity that runs with every input; a network that makes a prefix runs once in advance."""
    if isinstance(part, Prefix):
        return "softmax"
    if not isinstance(part, Bottlenecks):
        return ""
    f = activation(part.non_linearity)
    assert f is not None  # judged
    return "" if f is LINEAR else f.name


def _trained(part: Part) -> Iterator[TensorRef]:
    if isinstance(part, Bottlenecks):
        for one in part.modules:
            yield from _of_bottleneck(one)
    elif isinstance(part, Prefix):
        if isinstance(part.values, Network):
            network = part.values
            yield network.embedding
            yield from (ref for each in (network.first, network.second) for ref in (each.weight, each.bias))
        else:
            yield part.values
    elif isinstance(part, Prompt):
        yield part.embedding
    else:
        yield from part.tensors.values()


def _of_bottleneck(one: Bottleneck) -> Iterator[TensorRef]:
    for each in (one.down, one.up):
        if isinstance(each, Dense):
            yield from (each.weight, each.bias)
        else:
            yield from (each.rule, each.left, each.right)
            if each.bias is not None:
                yield each.bias
    if isinstance(one.scaling, TensorRef):
        yield one.scaling
