"""`surgery export-onnx`."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import options


@click.command("export-onnx", epilog="Example: surgery export-onnx merged/ -o merged-onnx/model.onnx")
@click.argument("model", type=options.PATH)
@click.option(
    "--graph",
    type=options.PATH,
    metavar="BASE.onnx",
    help="Take this graph of an earlier export and write the weights alone: no tracing, no torch.",
)
@click.option("--with-cache", is_flag=True, help="Keys and values of tokens gone by as inputs and outputs.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="What the graph computes in; else MODEL's."
)
@click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="Your own code that returns the torch module; it is imported and called. MODEL is the file of its weights.",
)
@click.option(
    "--inputs",
    multiple=True,
    metavar="NAME=DTYPE[AXES]",
    help="An input of the factory's module: 'x=float32[batch,3,32,32]'; an axis with a name varies.",
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Compare with torch before the output appears; by default where the graph is new.",
)
@options.output_options
@options.json_option
def command(model: str, out: str, as_json: bool, **how: Any) -> None:
    """Export MODEL, a Hugging Face folder, as a graph without weights and a safetensors file beside it.

    The graph depends on the architecture alone: base and merged give the same bytes, and only the weights differ. An
    encoder–decoder becomes two graphs, encoder_OUT and decoder_OUT, over one file of weights.
    """
    from surgery.operations.export_onnx import export_onnx

    if how["inputs"] and how["factory"] is None:
        raise click.UsageError("--inputs describes the module of a --factory")
    if how["factory"] is not None and how["with_cache"]:
        raise click.UsageError("--with-cache is for models of transformers; a --factory's module has its own inputs")
    if how["graph"] is not None and how["with_cache"]:
        raise click.UsageError("--graph has a cache or has none already")
    with options.reporting("export-onnx", as_json):
        report = export_onnx(model, out, **how)
        if as_json:
            options.print_json(report)
            return
        for graph in report.graphs:
            run = "" if graph.nodes_run is None else f", {graph.nodes_run} run after the runtime's optimisation"
            known = {
                "graph sha256": graph.sha256[:16],
                "nodes": f"{graph.nodes}{run}",
                "inputs": _listed(graph.inputs),
                "outputs": _listed(graph.outputs),
            }
            options.show(options.facts(graph.path, known.items()))
        known = {"computes in": report.dtype, "weights": report.payload}
        if report.max_rel_error is not None:
            shapes = ", ".join("×".join(map(str, shape)) for shape in report.shapes)
            known["against torch"] = (
                f"max error {report.max_abs_error:.2g} abs, {report.max_rel_error:.2g} rel "
                f"(tolerance {report.tolerance:.2g} rel) in {report.worst}; tried {shapes}"
            )
        if report.float32_error is not None:
            known["against float32"] = f"max error {report.float32_error:.2g} rel"
        options.show(options.facts(report.model_class, known.items()))
        options.show_ending(report)


def _listed(names: tuple[str, ...]) -> str:
    """All of a few names; of a cache's many the ends."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:4])}, … {names[-1]} ({len(names)} in all)"
