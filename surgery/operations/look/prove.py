"""prove: is MERGED.onnx the same program as BASE.onnx, with other weights?

It checks three levels: the same bytes; the same canonical graph, before and after ONNX Runtime's own optimisation; the
same assignment of nodes to providers, and the same cost of one run. It writes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from formats.open_files import OpenFiles
from surgery.errors import Unsupported
from surgery.onnx.files.graph_file import count_nodes, files_of, load_graph
from surgery.onnx.run.runtime import assignment_difference, optimise
from surgery.onnx.run.session import provider_name
from surgery.onnx.same_program.canonical import canonical
from surgery.onnx.same_program.cost import Cost, cost
from surgery.onnx.same_program.difference import ProgramDifference, first_difference
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Job, header, runs
from surgery.pipeline.plan import Elsewhere, Plan, Step
from surgery.report import Report, Stopwatch


@dataclass(frozen=True)
class Check:
    """One check: its name, whether both graphs agree, and the first difference if they do not."""

    name: str
    same: bool
    difference: ProgramDifference | None = None


@dataclass(frozen=True, kw_only=True)
class ProveReport(Report):
    """The result of prove. Nothing is written, so the ledger is empty.

    Attributes:
        a, b: paths of the two graphs.
        same: whether they are the same program on this provider.
        level: the strongest level that is the same: "bytes", "graph", or "" if the programs differ.
        checks: every check in order: bytes, graph, optimised graph, assignment, cost.
        provider: the execution provider, as ONNX Runtime names it.
        nodes_a, nodes_b: number of nodes in the graph, and in the optimised graph.
        cost_a, cost_b: cost of one run at `shape`.
        shape: batch and sequence.
        sha256: SHA-256 of each graph's file.
    """

    a: str
    b: str
    same: bool
    level: str
    checks: tuple[Check, ...]
    provider: str
    nodes_a: tuple[int, int]
    nodes_b: tuple[int, int]
    cost_a: Cost
    cost_b: Cost
    shape: tuple[int, int]
    sha256: tuple[str, str]

    @property
    def difference(self) -> Check | None:
        """The first check that shows why the programs differ; None if they are the same."""
        return next((check for check in self.checks[1:] if not check.same), None)


def prepare_prove(
    a: str | Path, b: str | Path, *, provider: str = "cpu", shape: tuple[int, int] = (1, 128)
) -> Job[ProveReport]:
    """Prepares a job that compares two graphs as programs.

    Args:
        a: the base's graph.
        b: the merged model's graph.
        provider: `cpu`, `cuda` or another that this ONNX Runtime has; a provider that would not really run is an error.
        shape: batch and sequence of the run whose operations and bytes are counted.

    Raises:
        PathNotFound, CorruptFile: the graph or its weights are missing or damaged.
        UnsafeFile: weights are outside the graph's folder.
        ProviderUnavailable: the provider is not installed, or would not run the graph.
        Unsupported: ONNX Runtime does not load the graph, or the shape is not positive.
    """
    watch, files = Stopwatch(), OpenFiles()
    paths = (Path(a), Path(b))
    if min(shape) < 1:
        raise Unsupported(
            "batch and sequence must be positive", found=f"{shape[0]}x{shape[1]}", then="choose another --shape"
        )
    name = provider_name(provider)
    models = (load_graph(paths[0], files), load_graph(paths[1], files))
    read = tuple(files_of(model, path) for model, path in zip(models, paths, strict=True))
    steps = (Step(f"{a} and {b}", (*read[0], *read[1]), (), Elsewhere("compare")),)
    plan = Plan("prove", steps)

    def work(resources: Resources) -> ProveReport:
        digests = (_sha256(paths[0]), _sha256(paths[1]))
        checks = [Check("bytes", digests[0] == digests[1])]
        programs = [canonical(model, path) for model, path in zip(models, paths, strict=True)]
        checks.append(_check("graph", first_difference(*programs)))
        ready = (optimise(paths[0], name, shape), optimise(paths[1], name, shape))
        checks.append(_check("optimised graph", first_difference(ready[0].program, ready[1].program)))
        checks.append(_check("assignment", assignment_difference(*ready)))
        costs = (cost(ready[0].executed), cost(ready[1].executed))
        checks.append(_check("cost", _cost_difference(*costs)))
        same = all(check.same for check in checks[1:])
        notes = tuple(
            f"{path} does not run at this shape, so its cost is not counted: {each.refusal}"
            for path, each in zip(paths, ready, strict=True)
            if each.refusal
        )
        return ProveReport(
            **{**header(plan, watch, None), "ledger": {}, "notes": notes},
            a=str(a),
            b=str(b),
            same=same,
            level="" if not same else "bytes" if checks[0].same else "graph",
            checks=tuple(checks),
            provider=name,
            nodes_a=(count_nodes(models[0]), ready[0].nodes),
            nodes_b=(count_nodes(models[1]), ready[1].nodes),
            cost_a=costs[0],
            cost_b=costs[1],
            shape=shape,
            sha256=digests,
        )

    return Job(plan, paths, (), files, work, Resources())


prove = runs(prepare_prove)


def _check(name: str, difference: ProgramDifference | None) -> Check:
    return Check(name, difference is None, difference)


def _cost_difference(a: Cost, b: Cost) -> ProgramDifference | None:
    """The first op, by name, whose operations or bytes differ between the two."""
    if a.uncounted != b.uncounted:
        return ProgramDifference(
            "the ops that are not counted", *(", ".join(each.uncounted) or "none" for each in (a, b))
        )
    for op in sorted({*a.by_op, *b.by_op}):
        if a.by_op.get(op) != b.by_op.get(op):
            texts = (
                f"{tally.nodes} nodes, {tally.flops:,} operations, {tally.nbytes:,} bytes" if tally else "no node"
                for tally in (a.by_op.get(op), b.by_op.get(op))
            )
            return ProgramDifference(f"the cost of {op}", *texts)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
