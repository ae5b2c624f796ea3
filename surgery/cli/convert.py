"""`surgery convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from formats.dialects import WRITERS, writer_named
from formats.dialects.parts import PARTS
from formats.dialects.writing import DROPS
from formats.errors import AdapterFormatError, PluginError
from surgery.cli import options

if TYPE_CHECKING:
    from surgery.pipeline.engine import Resources

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


@click.command(
    "convert",
    epilog="Examples: surgery convert style.safetensors --to diffusers --base unet/ -o style/; "
    "surgery convert loha/ --to lora --rank 16 --base model/ -o lora/; "
    "surgery convert pytorch_model.bin -o model.safetensors",
)
@click.argument("source", type=options.PATH, metavar="INPUT")
@click.option(
    "--to",
    type=_Target([*(writer.name for writer in WRITERS), LORA]),
    help="The dialect to write an adapter in [without it INPUT goes into another container]; or lora, which makes a "
    "plain LoRA in peft's names of any method, at the rank that is asked for.",
)
@options.rank_options
@options.factor_dtype_option("their own")
@click.option(
    "--base",
    "bases",
    multiple=True,
    metavar="PATH|PART=PATH",
    help="The model that an adapter adapts, or each part's of a pipeline [what its own names and shapes tell].",
)
@click.option(
    "--drop",
    multiple=True,
    type=click.Choice(DROPS),
    help="Leave these behind where the dialect cannot express them: changed biases, tensors carried in full, layers "
    "that it has no place for.",
)
@click.option("--container", type=click.Choice(CONTAINERS), help="Of an output folder, without --to [safetensors].")
@options.max_shard_option("INPUT's shards")
@options.output_options
@options.told_options
@options.dry_run_option
@options.engine_options
@options.json_option
def command(
    source: str, to: str | None, out: str, force: bool, jobs: int, memory: int, device: str, as_json: bool, **how: Any
) -> None:
    """Write an adapter in another dialect, with the same ΔW; as a LoRA; or any tensors in another container.

    With --to, INPUT is an adapter. With --to lora its ΔW, whatever the method, is truncated to the rank that is asked
    for, and the report tells what that leaves out. Without --to, INPUT is a file or folder of torch's (.bin, .pt, .pth,
    .ckpt) or safetensors, and the output's name says which of the two it becomes. A folder gets safetensors, or what
    --container says, in INPUT's shards, and INPUT's other files. Nothing in a torch file is executed. An adapter for
    llama.cpp (--to gguf) is one .gguf file, and needs --base, a folder with config.json, both to be written and to be
    read.
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
    with options.reporting("convert", as_json), options.resources(jobs, memory, device) as resources:
        if to is None:
            _container(source, out, force, as_json, resources, how["dry_run"], contained)
            return
        how["base"] = _bases(how.pop("bases"), parts=to != LORA)
        how = options.told(how)
        (_lora if to == LORA else _adapter)(source, to, out, force, as_json, resources, how)


def _container(
    source: str, out: str, force: bool, as_json: bool, resources: Resources, dry_run: bool, how: dict[str, Any]
) -> None:
    from surgery.operations.convert.containers import convert_container, planned

    if dry_run:
        options.show_plan(planned(source, out, **how))
        return
    report = convert_container(source, out, **how, force=force, resources=resources)
    if as_json:
        options.print_json(report)
        return
    options.show(f"{report.source} → {report.container}, digest {report.digest}")
    options.show_ending(report)


def _adapter(
    source: str, to: str, out: str, force: bool, as_json: bool, resources: Resources, how: dict[str, Any]
) -> None:
    from formats.dialects import open_adapter_file
    from surgery.operations.convert import convert as operation

    how = {name: value for name, value in how.items() if name not in ("rank", "overrides", "dtype")}
    if how.pop("dry_run"):
        checkpoint, config = open_adapter_file(source)
        with checkpoint:
            planned = operation.plan_convert(checkpoint, config, source, to, how["base"], how["told"], how["drop"])
            options.show_plan(planned[0])
        return
    report = operation.convert(source, out, to, **how, force=force, resources=resources)
    if as_json:
        options.print_json(report)
        return
    weights = ", ".join(f"{count} {method}" for method, count in sorted(report.weights.items()))
    part = f" for {report.component}" if report.component else ""
    options.show(f"{report.source} → {report.target}{part}: {weights or 'as it is'}")
    options.show(f"{report.copied} tensors with their bytes as they are, {report.computed} computed")
    options.show_ending(report)


def _lora(
    source: str, to: str, out: str, force: bool, as_json: bool, resources: Resources, how: dict[str, Any]
) -> None:
    from surgery.operations.extract.plan import Extraction
    from surgery.operations.lora import to_lora as operation

    if how.pop("dry_run"):
        asked = Extraction(rank=how["rank"], overrides=how["overrides"], dtype=how["dtype"])
        options.show_plan(operation.planned(source, asked, how["base"], how["told"], how["drop"]))
        return
    report = operation.to_lora(source, out, **how, force=force, resources=resources)
    if as_json:
        options.print_json(report)
        return
    rows = options.table("weight", "method", "shape", "rank", "energy", "residual")
    for module in report.modules:
        shape, loss = " × ".join(map(str, module.shape)), "exact" if module.exact else f"{module.residual:.4f}"
        rows.add_row(module.name, module.method, shape, str(module.rank), f"{module.energy:.2%}", loss)
    rows.add_section()
    rows.add_row("all", "", "", "", f"{report.energy:.2%}", f"{report.residual:.4f}")
    options.show(rows, f"{report.exact} of {len(report.modules)} weights have all of ΔW in their factors")
    options.show(f"{report.nbytes_before:,} bytes before, {report.nbytes:,} after")
    options.show_ending(report)


def _bases(given: tuple[str, ...], *, parts: bool) -> str | dict[str, str] | None:
    """One model, or that of each part where the output may have several."""
    if not parts and len(given) > 1:
        raise click.UsageError(f"--to {LORA} takes one --base")
    named = {part: path for part, _, path in (text.partition("=") for text in given) if part in PARTS and path}
    if len(named) < len(given) and len(given) > 1:
        raise click.UsageError("--base takes one PATH, or PART=PATH for each of several parts")
    return (named if parts else None) or (given[0] if given else None)
