"""`surgery export-onnx`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options

if TYPE_CHECKING:
    from surgery.operations.reweigh import ReweighReport


@click.command(
    "export-onnx",
    epilog="Examples: surgery export-onnx merged/ -o merged-onnx/model.onnx; "
    "surgery export-onnx base/ --adapter a/ --adapter b/ --as inputs -o base-onnx/model.onnx",
)
@click.argument("model", type=options.PATH)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=options.PATH,
    metavar="ADAPTER",
    help="A LoRA of linear layers to leave in the graph, beside the weights; with --as inputs any number of them.",
)
@click.option(
    "--as",
    "adapters_as",
    type=click.Choice(["branch", "inputs"]),
    help="The factors are fixed weights of the graph [the default], or inputs that .onnx_adapter files fill.",
)
@click.option(
    "--template", type=options.PATH, metavar="GRAPH", help="Put the weights into this graph, which any tool exported."
)
@click.option("--base", type=options.PATH, help="The checkpoint that the template was exported from.")
@click.option("--no-verify", is_flag=True, help="Do not compare with torch before the output appears.")
@options.output_options
@options.told_options
@options.json_option
def command(
    model: str,
    adapters: tuple[str, ...],
    adapters_as: str | None,
    template: str | None,
    base: str | None,
    out: str,
    no_verify: bool,
    force: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Export MODEL, a Hugging Face folder, as a graph without weights and a safetensors file beside it.

    The graph depends on the architecture alone: base and merged give the same bytes, and only the weights differ.
    A merged adapter costs nothing; one that is left in the graph costs two small products for every adapted weight, and
    as inputs can be exchanged from run to run: one graph serves many adapters of the same weights.

    With --template and --base nothing is traced: every weight of that graph is found in the base, byte for byte, and
    those of MODEL, any checkpoint of the same tensors, are put in its place.
    """
    if not adapters and (adapters_as is not None or any(how[name] for name in options.TOLD)):
        raise click.UsageError("--as and what is told of an adapter need --adapter")
    if (template is None) != (base is None):
        raise click.UsageError("--template and --base go together: the graph, and what it was exported from")
    if template is not None and base is not None:
        if adapters:
            raise click.UsageError("an adapter goes into a template by surgery merge GRAPH ADAPTER --base BASE")
        if no_verify:
            raise click.UsageError("--no-verify is for exports that trace; --template compares bytes instead")
        from surgery.operations.reweigh import reweigh

        with options.reporting("export-onnx", as_json):
            show_reweighed(reweigh(template, model, out, base=base, force=force), as_json)
        return
    from surgery.operations.export_onnx import export_onnx

    with options.reporting("export-onnx", as_json):
        report = export_onnx(
            model,
            out,
            adapters=adapters,
            adapters_as=adapters_as or "branch",
            force=force,
            verify=not no_verify,
            **options.told(how),
        )
        if as_json:
            options.print_json(report)
            return
        run = "" if report.nodes_run is None else f", {report.nodes_run} run after the runtime's optimisation"
        known = {
            "graph sha256": report.graph_sha256[:16],
            "nodes": f"{report.nodes}{run}",
            "inputs": ", ".join(report.inputs),
            "outputs": ", ".join(report.outputs),
            "weights": report.payload,
        }
        if report.max_rel_error is not None:
            shapes = ", ".join(f"{batch}×{sequence}" for batch, sequence in report.shapes)
            known["against torch"] = (
                f"max error {report.max_abs_error:.2g} abs, {report.max_rel_error:.2g} rel "
                f"(tolerance {report.tolerance:.2g} rel) at {shapes}"
            )
        if report.adapters:
            known["adapter left as"] = f"{report.adapters}, {len(report.adapted)} weights"
        if report.adapted_rel_error is not None:
            known["against merged weights"] = (
                f"max error {report.adapted_rel_error:.2g} rel (tolerance {report.adapted_tolerance:.2g} rel)"
            )
        options.show(options.facts(report.model_class, known.items()))
        options.show_ending(report)


def show_reweighed(report: ReweighReport, as_json: bool) -> None:
    """What became of a graph whose weights were replaced."""
    if as_json:
        options.print_json(report)
        return
    same = "the template's, byte for byte" if report.same_graph else "the template's, but for its weights"
    known = {
        "graph": f"{report.graph_sha256[:16]}, {same}",
        "weights": f"{len(report.recipes)}, each the base's byte for byte before; {len(report.changed)} changed",
        "constants": f"{len(report.constants)} float tensors that are no weights stay as they are",
    }
    options.show(options.facts(report.template, known.items()))
    options.show_ending(report)
