"""`surgery bench`."""

from __future__ import annotations

import sys

import click

from surgery.cli import options


class Shape(click.ParamType[tuple[int, int]]):
    """Batch and sequence: `1x128`."""

    name = "BxS"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parses it, or fails as a usage error."""
        if isinstance(value, tuple):
            return value
        batch, _, sequence = str(value).partition("x")
        if not (batch.isdigit() and sequence.isdigit()):
            self.fail(f"{value!r} is not a shape such as 1x128", param, ctx)
        return int(batch), int(sequence)


@click.command("bench", epilog="Example: surgery bench base-onnx/model.onnx merged-onnx/model.onnx --expect equivalent")
@click.argument("a", type=options.PATH)
@click.argument("b", type=options.PATH)
@click.option("--shape", type=Shape(), default="1x128", show_default=True, help="Batch and sequence.")
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda, tensorrt … It must really run.")
@click.option("--margin", type=float, default=0.02, show_default=True, help="The difference that does not matter.")
@click.option("--seconds", type=float, default=60.0, show_default=True, help="How long to measure.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each session [the runtime's choice].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of inputs, order and bootstrap.")
@click.option(
    "--expect",
    type=click.Choice(["equivalent", "faster", "slower"]),
    help="Exit with 3 on another verdict, with 4 on inconclusive.",
)
@options.json_option
def command(
    a: str,
    b: str,
    shape: tuple[int, int],
    provider: str,
    margin: float,
    seconds: float,
    threads: int | None,
    seed: int,
    expect: str | None,
    as_json: bool,
) -> None:
    """Compare the latency of B.onnx with A.onnx: paired blocks, an interval, a verdict against a margin."""
    from surgery.operations.bench import bench

    with options.reporting("bench", as_json):
        report = bench(a, b, shape=shape, provider=provider, margin=margin, seconds=seconds, threads=threads, seed=seed)
        if as_json:
            options.print_json(report)
        else:
            low, high = report.interval
            rows = options.table(f"{report.provider}, {shape[0]}×{shape[1]}", "A", "B", "B/A", "interval")
            latencies = [f"{1e3 * latency:.3f} ms" for latency in (report.latency_a, report.latency_b)]
            rows.add_row("median of one run", *latencies, f"{report.ratio:.4f}", f"{low:.4f} – {high:.4f}")
            first, last = report.control_interval
            rows.add_row("control: A against A", "", "", f"{report.control_ratio:.4f}", f"{first:.4f} – {last:.4f}")
            same = "the two graphs are byte-identical" if report.same_graph else "the two graphs differ"
            options.show(
                rows, f"{same}; {report.blocks} blocks of {report.runs_per_block} runs in {report.seconds:.0f} s"
            )
            options.show(f"verdict: {report.verdict} at a margin of {margin:.1%} ({report.reason})")
    if expect is not None and report.verdict != expect:
        sys.exit(4 if report.verdict == "inconclusive" else 3)
