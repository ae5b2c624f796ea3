"""`surgery convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from formats.dialects import WRITERS, writer_named
from formats.dialects.parts import PARTS
from formats.dialects.writing import DROPS
from formats.errors import AdapterFormatError, PluginError
from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.operations.convert.containers import ContainerReport
    from surgery.operations.convert.convert import ConvertReport
    from surgery.operations.lora.to_lora import ToLoraReport

CONTAINERS = ("safetensors", "torch")
LORA = "lora"  # of --to: no dialect but a method


class _Target(click.Choice[str]):
    """One of these, or a dialect that another distribution registers, which loads when it is named."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name. Fails as a choice does; for a plugin that cannot be loaded, with the reason."""
        try:
            if value not in self.choices:
                return writer_named(value).name
        except PluginError as error:
            self.fail(str(error), param, ctx)
        except AdapterFormatError:
            pass  # nobody's: said as for any choice
        return super().convert(value, param, ctx)


@running.verb(
    "convert",
    epilog="Examples: surgery convert style.safetensors --to diffusers --base unet/ -o style/; "
    "surgery convert loha/ --to lora --rank 16 --base model/ -o lora/; "
    "surgery convert pytorch_model.bin -o model.safetensors",
)
@click.argument("source", type=options.PATH, metavar="INPUT")
@click.option(
    "--to",
    type=_Target([*(writer.name for writer in WRITERS), LORA]),
    help="Dialect to write the adapter in; or lora: a plain LoRA in PEFT's names, of any method, at a given rank.",
)
@options.rank_options
@options.factor_dtype_option("their own")
@click.option(
    "--base",
    "bases",
    multiple=True,
    metavar="PATH|PART=PATH",
    help="Model that the adapter adapts, or one for each part of a pipeline [deduced from names and shapes].",
)
@click.option(
    "--drop",
    multiple=True,
    type=click.Choice(DROPS),
    help="What to leave out if the dialect cannot express it: changed biases, tensors stored in full, or layers.",
)
@click.option(
    "--container", type=click.Choice(CONTAINERS), help="Format of an output folder, without --to [safetensors]."
)
@options.max_shard_option("INPUT's shards")
@options.output_options
@options.told_options
def command(run: running.Run, source: str, to: str | None, out: str, force: bool, **how: Any) -> None:
    """Convert an adapter to another dialect, or to a plain LoRA; or a checkpoint to another file format.

    With --to, INPUT is an adapter. --to lora truncates the ΔW of any method to a rank and reports the error. An adapter
    for llama.cpp (--to gguf) is one .gguf file; writing and reading it needs --base, a folder with a config.json.

    Without --to, INPUT is a torch file (.bin, .pt, .pth, .ckpt), a safetensors file, or a folder with either; the
    output's suffix gives the new format. A folder keeps INPUT's shards and other files, and gets safetensors unless
    --container says otherwise. Nothing in a torch file is executed.
    """
    how = options.chosen_ranks(how, needed=to == LORA)
    ranked = how["rank"] is not None or how["overrides"] or how["dtype"]
    contained = {name: how.pop(name) for name in ("container", "max_shard_size")}
    if to is None and (how["bases"] or how["drop"] or any(how[name] for name in options.TOLD)):
        raise click.UsageError("without --to, another container is written, which takes no option of adapters")
    if to is not None and any(contained.values()):
        raise click.UsageError("--container and --max-shard-size are of models: they go without --to")
    if to != LORA and ranked:
        raise click.UsageError(
            f"a rank and a dtype of the factors go with --to {LORA}; surgery resize changes a LoRA's"
        )
    if to is None:
        from surgery.operations.convert.containers import prepare_convert_container

        run.carry_out(
            lambda resources: prepare_convert_container(source, out, **contained, force=force, resources=resources),
            _show_container,
        )
        return
    how["base"] = _bases(how.pop("bases"), parts=to != LORA)
    how = options.told(how)
    if to == LORA:
        from surgery.operations.lora.to_lora import prepare_to_lora

        run.carry_out(
            lambda resources: prepare_to_lora(source, out, **how, force=force, resources=resources), _show_lora
        )
        return
    from surgery.operations.convert.convert import prepare_convert

    how = {name: how[name] for name in ("base", "told", "drop")}
    run.carry_out(
        lambda resources: prepare_convert(source, out, to, **how, force=force, resources=resources), _show_adapter
    )


def _show_container(report: ContainerReport) -> None:
    printing.show(f"{report.source} → {report.container}, digest {report.digest}")
    printing.show_ending(report)


def _show_adapter(report: ConvertReport) -> None:
    weights = ", ".join(f"{count} {method}" for method, count in sorted(report.weights.items()))
    part = f" for {report.component}" if report.component else ""
    printing.show(f"{report.source} → {report.target}{part}: {weights or 'as it is'}")
    printing.show(f"{report.copied} tensors with their bytes as they are, {report.computed} computed")
    printing.show_ending(report)


def _show_lora(report: ToLoraReport) -> None:
    rows = printing.table("weight", "method", "shape", "rank", "energy", "residual")
    for module in report.modules:
        shape, loss = " × ".join(map(str, module.shape)), "exact" if module.exact else f"{module.residual:.4f}"
        rows.add_row(module.name, module.method, shape, str(module.rank), f"{module.energy:.2%}", loss)
    rows.add_section()
    rows.add_row("all", "", "", "", f"{report.energy:.2%}", f"{report.residual:.4f}")
    printing.show(rows, f"{report.exact} of {len(report.modules)} weights have all of ΔW in their factors")
    printing.show(f"{report.nbytes_before:,} bytes before, {report.nbytes:,} after")
    printing.show_ending(report)


def _bases(given: tuple[str, ...], *, parts: bool) -> str | dict[str, str] | None:
    """One model, or that of each part where the output may have several."""
    if not parts and len(given) > 1:
        raise click.UsageError(f"--to {LORA} takes one --base")
    named = {part: path for part, _, path in (text.partition("=") for text in given) if part in PARTS and path}
    if len(named) < len(given) and len(given) > 1:
        raise click.UsageError("--base takes one PATH, or PART=PATH for each of several parts")
    return (named if parts else None) or (given[0] if given else None)
