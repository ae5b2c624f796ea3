"""Translates the names of Stable Diffusion's UNet layers between the original checkpoints and diffusers.

Adapters with one kind of names are used with the other: kohya's trainer names SDXL's layers as the original does,
ComfyUI's keys are the original's, and diffusers knows only its own. How blocks correspond follows from the number of
layers per block, which the base's names show. Other denoisers (Flux, SD3) fuse layers in one of the two, so names alone
do not suffice. This module knows no factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from formats.errors import AdapterFormatError


class NameForm(StrEnum):
    """The two kinds of names."""

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"


# The original's and diffusers' names of layers outside the numbered blocks.
_SINGLE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
# The same for the layers in a residual block.
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SINGLE_BACK, _MIDDLE_BACK, _RESIDUAL_BACK = (
    {theirs: ours for ours, theirs in table.items()} for table in (_SINGLE, _MIDDLE, _RESIDUAL)
)
_ORIGINAL = re.compile(r"^(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d)\.?(.*)$")
_DIFFUSERS = re.compile(r"^(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.?(.*)$")
# Names in other denoisers that only this form has; the other form fuses or splits these layers.
_ELSEWHERE = {
    NameForm.ORIGINAL: ("single_transformer_blocks.",),
    NameForm.DIFFUSERS: ("double_blocks.", "single_blocks.", "joint_blocks."),
}


def other_names(modules: Iterable[str]) -> dict[str, str]:
    """A UNet's modules by their names in the other form; empty for other modules."""
    modules = set(modules)
    found = _names(modules, NameForm.ORIGINAL) or _names(modules, NameForm.DIFFUSERS)
    return {name: module for module, name in found.items()}


def relative(module: str) -> str:
    """A module's name within the denoiser, without the prefix it has in a checkpoint of the whole pipeline."""
    for head in ("model.diffusion_model.", "diffusion_model.", "unet."):
        if module.startswith(head):
            return module[len(head) :]
    return module


@dataclass(frozen=True)
class Names:
    """The names of a base's modules in a dialect whose readers know only one form of names.

    Attributes:
        dialect: the dialect's name.
        form: the form of names that its readers know.
        known: the names of those UNet modules that have another name in the base.
    """

    dialect: str
    form: NameForm
    known: Mapping[str, str]

    @classmethod
    def of(cls, dialect: str, form: NameForm, base: Iterable[str]) -> Names:
        """The names for a base's modules."""
        return cls(dialect, form, _names(set(base), form))

    def get(self, module: str) -> str:
        """A module's name in the dialect; its own name if no other is known."""
        return self.known.get(module, relative(module))

    def adapted(self, module: str) -> str:
        """The name of an adapted module. Raises AdapterFormatError if only the other form's name is known."""
        name = self.get(module)
        unet = (_DIFFUSERS if self.form is NameForm.ORIGINAL else _ORIGINAL).match(name)
        if module in self.known or not (unet or name.startswith(_ELSEWHERE[self.form])):
            return name
        then = "name the base with --base: one that has these names, or all layers of this model"
        if self.form is NameForm.ORIGINAL and not unet:
            then = "use --to diffusers: ComfyUI reads diffusers' files for such models"
        raise AdapterFormatError(
            f"{self.dialect}'s readers use another name for this layer, which is not known here",
            where=module,
            expected="the original checkpoint's names" if self.form is NameForm.ORIGINAL else "diffusers' names",
            then=then,
        )


def _names(modules: Iterable[str], form: NameForm) -> dict[str, str]:
    """The names in `form` of a UNet's modules that have names in the other form; empty for other modules."""
    named = {module: relative(module) for module in modules}
    if form is NameForm.ORIGINAL:
        layers = 1 + _largest(named.values(), r"down_blocks\.0\.resnets\.(\d+)\.conv1")
        crossed = {name.partition(".attentions.")[0] for name in named.values() if ".attentions." in name}
        found = {module: _original(name, layers, crossed) for module, name in named.items()} if layers else {}
    else:
        down = [name for name in named.values() if re.fullmatch(r"input_blocks\.\d+\.0\.op", name)]
        layers = _largest(named.values(), r"input_blocks\.(\d+)\.0\.in_layers\.2")
        layers = min([layers, *(int(name.split(".")[1]) - 1 for name in down)])
        found = {module: _diffusers(name, layers) for module, name in named.items()} if layers > 0 else {}
    return {module: name for module, name in found.items() if name}


def _largest(names: Iterable[str], pattern: str) -> int:
    """The largest number that the pattern finds; -1 if it finds none."""
    return max((int(match[1]) for name in names if (match := re.fullmatch(pattern, name))), default=-1)


def _original(name: str, layers: int, crossed: set[str]) -> str:
    match = _DIFFUSERS.match(name)
    if match is None:
        return _SINGLE_BACK.get(name, "")
    side, block, what, layer, rest = match.groups()
    if what in ("downsamplers", "upsamplers") and rest != "conv":
        return ""
    if what == "downsamplers":
        return f"input_blocks.{(layers + 1) * (int(block) + 1)}.0.op"
    if what == "upsamplers":
        place = 1 + (f"up_blocks.{block}" in crossed)
        return f"output_blocks.{(layers + 1) * int(block) + layers}.{place}.conv"
    if side is None:
        head = f"middle_block.{_MIDDLE_BACK.get(f'{what}.{layer}', '')}"
    else:
        blocks = "input_blocks" if side == "down" else "output_blocks"
        number = (layers + 1) * int(block) + int(layer) + (side == "down")
        head = f"{blocks}.{number}.{int(what == 'attentions')}"
    return _behind(head, rest, _RESIDUAL_BACK if what == "resnets" else None)


def _diffusers(name: str, layers: int) -> str:
    match = _ORIGINAL.match(name)
    if match is None or name in _SINGLE:
        return _SINGLE.get(name, "")
    side, number, place, rest = match.groups()
    if side is None:
        what = _MIDDLE.get(place, "")
        return _behind(f"mid_block.{what}", rest, _RESIDUAL if what.startswith("resnets") else None)
    block, layer = divmod(int(number) - (side == "input"), layers + 1)
    if (side, rest) in (("input", "op"), ("output", "conv")):
        return f"down_blocks.{block}.downsamplers.0.conv" if side == "input" else f"up_blocks.{block}.upsamplers.0.conv"
    head = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    what = "resnets" if place == "0" else "attentions"
    return _behind(f"{head}.{what}.{layer}", rest, _RESIDUAL if place == "0" else None)


def _behind(head: str, rest: str, table: Mapping[str, str] | None) -> str:
    """A block's name followed by one of its layers; empty if the block has no such layer."""
    if table is None or not rest:
        return f"{head}.{rest}".rstrip(".")
    return f"{head}.{table[rest]}" if rest in table else ""
