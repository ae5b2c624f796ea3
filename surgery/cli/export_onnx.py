"""`surgery export-onnx`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options, printing, running
from surgery.cli.merge import surviving_lines

if TYPE_CHECKING:
    from surgery.operations.export.export_onnx import ExportReport
    from surgery.operations.export.into_template import ReweighReport


@running.verb(
    "export-onnx",
    computes=False,
    epilog="Examples: surgery export-onnx base/ -o base-onnx/model.onnx; "
    "surgery export-onnx merged/ --graph base-onnx/model.onnx -o merged/model.onnx; "
    "surgery export-onnx base/ --adapter a/ --adapter b/ --as inputs -o base-onnx/model.onnx; "
    "surgery export-onnx base/ --template theirs.onnx --adapter a/:0.5 -o merged/theirs.onnx",
)
@click.argument("model", type=options.PATH)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=options.WeighedPath(),
    metavar="ADAPTER[:WEIGHT]",
    help="Adapter to put into the graph: LoRA of linear layers (with --as inputs any number of them), bottlenecks, a "
    "prefix or a prompt. With --template: adapter to merge into MODEL's weights, times WEIGHT.",
)
@click.option(
    "--as",
    "adapters_as",
    type=click.Choice(["branch", "inputs", "half-folded"]),
    help="Form of the adapter in the graph. branch: its own products beside the model's [default for LoRA]; inputs: "
    "LoRA's factors as inputs, filled from .onnx_adapter files; half-folded: the first product of a bottleneck in the "
    "projection before it, where that is exact [default for bottlenecks].",
)
@click.option(
    "--template",
    type=options.PATH,
    metavar="GRAPH",
    help="Put the weights into this graph, which any exporter may have written.",
)
@click.option(
    "--base",
    type=options.PATH,
    help="Checkpoint that the template was exported from [MODEL, with --adapter].",
)
@click.option(
    "--graph",
    type=options.PATH,
    metavar="BASE.onnx",
    help="Reuse this graph from an earlier export and write only the weights: no tracing, no torch.",
)
@click.option("--with-cache", is_flag=True, help="Add past keys and values as inputs and outputs, for generation.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Dtype the graph computes in [MODEL's own]."
)
@click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="Function of yours that returns the torch module. It is imported and called; MODEL is then the file with its "
    "weights.",
)
@click.option(
    "--inputs",
    multiple=True,
    metavar="NAME=DTYPE[AXES]",
    help="Input of the factory's module, such as 'x=float32[batch,3,32,32]'; a named axis is dynamic.",
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Compare with torch before the output appears [only when the graph is new].",
)
@options.output_options
@options.told_options
def command(
    run: running.Run,
    model: str,
    adapters: tuple[tuple[str, float | None], ...],
    adapters_as: str | None,
    template: str | None,
    base: str | None,
    out: str,
    force: bool,
    **how: Any,
) -> None:
    """Export MODEL, a Hugging Face folder, as an ONNX graph with its weights in a safetensors file beside it.

    The graph depends on the architecture alone: a base and its merged model give the same bytes, and only the weights
    differ. An encoder–decoder becomes two graphs, encoder_OUT and decoder_OUT, that share one file of weights.

    With -o MODEL/model.onnx only the graph is written; it refers to the weights already in that folder.

    A merged adapter costs nothing at inference. An adapter in the graph costs two small matrix products per adapted
    weight; with --as inputs it can change from run to run, so that one graph serves many adapters.

    With --template nothing is traced: surgery finds every weight of that graph in the base, byte for byte, and replaces
    it by MODEL's, with the adapters merged in. MODEL may be any checkpoint with the same tensors.

    Bottlenecks, prefixes and prompts cannot be held by weights and become nodes of the graph: those of --adapter, or
    those that fold wrote beside MODEL.
    """
    if not adapters and (adapters_as in ("branch", "inputs") or any(how[name] for name in options.TOLD)):
        raise click.UsageError("--as and what is told of an adapter need --adapter")
    if template is not None and base is None and not adapters:
        raise click.UsageError("--template needs --base, the checkpoint that it was exported from, or --adapter")
    if template is None and base is not None:
        raise click.UsageError("--base is what a --template was exported from")
    if template is not None:
        tracing = any(how[name] for name in ("graph", "with_cache", "dtype", "factory", "inputs"))
        if tracing or adapters_as is not None or how["verify"] is not None:
            raise click.UsageError("--template compares bytes and merges: nothing is traced, left in the graph or run")
        from surgery.operations.export.into_template import prepare_reweigh

        told = options.told(how)["told"]
        run.carry_out(
            lambda _: prepare_reweigh(template, model, out, base=base, adapters=adapters, told=told, force=force),
            _show_reweighed,
            given=nullcontext(),
        )
        return
    if any(weight is not None for _, weight in adapters):
        raise click.UsageError("ADAPTER:WEIGHT is for --template: what is left in the graph has its own scaling")
    from surgery.operations.export.export_onnx import prepare_export_onnx

    if how["inputs"] and how["factory"] is None:
        raise click.UsageError("--inputs describes the module of a --factory")
    if how["factory"] is not None and how["with_cache"]:
        raise click.UsageError("--with-cache is for models of transformers; a --factory's module has its own inputs")
    if how["graph"] is not None and how["with_cache"]:
        raise click.UsageError("--graph has a cache or has none already")
    how = options.told(how)
    paths = tuple(path for path, _ in adapters)
    run.carry_out(
        lambda _: prepare_export_onnx(model, out, adapters=paths, adapters_as=adapters_as, force=force, **how),
        _show,
        given=nullcontext(),
    )


def _show(report: ExportReport) -> None:
    for graph in report.graphs:
        run = "" if graph.nodes_run is None else f", {graph.nodes_run} run after the runtime's optimisation"
        known = {
            "graph sha256": graph.sha256[:16],
            "nodes": f"{graph.nodes}{run}",
            "inputs": _listed(graph.inputs),
            "outputs": _listed(graph.outputs),
        }
        printing.show(printing.facts(graph.path, known.items()))
    known = {"computes in": report.dtype, "weights": report.payload}
    if report.max_rel_error is not None:
        shapes = ", ".join("×".join(map(str, shape)) for shape in report.shapes)
        known["against torch"] = (
            f"max error {report.max_abs_error:.2g} abs, {report.max_rel_error:.2g} rel "
            f"(tolerance {report.tolerance:.2g} rel) in {report.worst}; tried {shapes}"
        )
    if report.adapters:
        known["adapter left as"] = f"{report.adapters}, {len(report.adapted)} places"
    if report.adapted_rel_error is not None:
        known["against merged weights"] = (
            f"max error {report.adapted_rel_error:.2g} rel (tolerance {report.adapted_tolerance:.2g} rel)"
        )
    if report.float32_error is not None:
        known["against float32"] = f"max error {report.float32_error:.2g} rel"
    printing.show(printing.facts(report.model_class, known.items()))
    printing.show_ending(report)


def _listed(names: tuple[str, ...]) -> str:
    """All of a few names; of a cache's many the ends."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:4])}, … {names[-1]} ({len(names)} in all)"


def _show_reweighed(report: ReweighReport) -> None:
    """What became of a graph whose weights were replaced."""
    same = "the template's, byte for byte" if report.same_graph else "the template's, but for its weights"
    known = {
        "graph": f"{report.graph_sha256[:16]}, {same}",
        "weights": f"{len(report.recipes)}, each the base's byte for byte before; {len(report.changed)} changed",
        "constants": f"{len(report.constants)} float tensors that are no weights stay as they are",
    }
    printing.show(*surviving_lines(report.surviving, "a template in a finer dtype"))
    printing.show(printing.facts(report.template, known.items()))
    printing.show_ending(report)
