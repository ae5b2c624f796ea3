"""`surgery export-onnx`."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import options


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
    help="What to leave in the graph: a LoRA of linear layers, with --as inputs any number of them; or bottlenecks, a "
    "prefix or a prompt.",
)
@click.option(
    "--as",
    "adapters_as",
    type=click.Choice(["branch", "inputs", "half-folded"]),
    help="An adapter's own products beside the model's [LoRA's default]; LoRA's factors as inputs that .onnx_adapter "
    "files fill; or the first product of a bottleneck in the projection's before it, where that is exact [the default "
    "of bottlenecks].",
)
@click.option("--no-verify", is_flag=True, help="Do not compare with torch before the output appears.")
@options.output_options
@options.told_options
@options.json_option
def command(
    model: str,
    adapters: tuple[str, ...],
    adapters_as: str | None,
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

    Bottlenecks, prefixes and prompts, which no weight can hold, are put into the graph at their sites: an adapter's, or
    what fold left beside the MODEL that it wrote.
    """
    if not adapters and (adapters_as in ("branch", "inputs") or any(how[name] for name in options.TOLD)):
        raise click.UsageError("--as and what is told of an adapter need --adapter")
    from surgery.operations.export_onnx import export_onnx

    with options.reporting("export-onnx", as_json):
        report = export_onnx(
            model,
            out,
            adapters=adapters,
            adapters_as=adapters_as,
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
            known["adapter left as"] = f"{report.adapters}, {len(report.adapted)} places"
        if report.adapted_rel_error is not None:
            known["against merged weights"] = (
                f"max error {report.adapted_rel_error:.2g} rel (tolerance {report.adapted_tolerance:.2g} rel)"
            )
        options.show(options.facts(report.model_class, known.items()))
        options.show_ending(report)
