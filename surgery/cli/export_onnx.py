"""`surgery export-onnx`."""

from __future__ import annotations

import click

from surgery.cli import options


@click.command("export-onnx", epilog="Example: surgery export-onnx merged/ -o merged-onnx/model.onnx")
@click.argument("model", type=options.PATH)
@click.option("--no-verify", is_flag=True, help="Do not compare with torch before the output appears.")
@options.output_options
@options.json_option
def command(model: str, out: str, no_verify: bool, force: bool, as_json: bool) -> None:
    """Export MODEL, a Hugging Face folder, as a graph without weights and a safetensors file beside it.

    The graph depends on the architecture alone: base and merged give the same bytes, and only the weights differ.
    """
    from surgery.operations.export_onnx import export_onnx

    with options.reporting("export-onnx", as_json):
        report = export_onnx(model, out, force=force, verify=not no_verify)
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
        options.show(options.facts(report.model_class, known.items()))
        options.show_ending(report)
