"""The parts of a pipeline (denoiser, text encoders) that one file may adapt together, and each dialect's prefixes.

A base is the checkpoint of one part, so an adapter is read for one part at a time. This module knows no factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from formats.errors import AdapterFormatError

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # diffusers' names
_DENOISERS = ("unet", "transformer")  # the other dialects do not distinguish the two
# Prefixes of keys, and the part that each stands for. If a part has several, the first one is written.
UNDERSCORED = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",  # OneTrainer's
    "lycoris_": "",
}
DOTTED = {f"{part}.": part for part in PARTS}
COMFYUI = {
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}

_SEVERAL = (
    "to merge into a checkpoint of the whole pipeline, merge one part after the other; "
    "convert takes all parts at once with a base for each, --base PART=PATH"
)


def split_part(key: str, prefixes: Mapping[str, str]) -> tuple[str, str] | None:
    """A key's prefix and the rest of the key; None if it has none of these prefixes."""
    for prefix in prefixes:
        if key.startswith(prefix):
            return prefix, key[len(prefix) :]
    return None


def same_part(one: str, other: str) -> bool:
    """Whether two names stand for the same part."""
    return one == other or {one, other} == set(_DENOISERS)


def prefix_of(part: str, prefixes: Mapping[str, str]) -> str | None:
    """The prefix with which a part's keys are written; None if the dialect has none."""
    return next((prefix for prefix, meant in prefixes.items() if same_part(meant, part)), None)


def chosen_part(present: Iterable[str], told: str | None, where: str) -> str:
    """Chooses the part of a pipeline to read.

    Args:
        present: the parts that the file's keys name; empty names for keys that name none.
        told: the part that the caller chose; None if the caller did not choose.
        where: the file, for errors.

    Raises:
        AdapterFormatError: the file has several parts and none was chosen, or it lacks the chosen one.
    """
    found = sorted(set(present))
    if told is not None and told not in PARTS:
        raise AdapterFormatError(
            "no such part of a pipeline", expected=", ".join(PARTS), found=told, then="pass one of these as --component"
        )
    if told is None and len(found) == 1:
        return found[0]
    if told is not None and found == [""]:
        return told
    matching = [part for part in found if told is not None and same_part(part, told)]
    if not matching:
        raise AdapterFormatError(
            "the adapter changes several parts of a pipeline, and the base is only one of them"
            if told is None
            else "the adapter has nothing for this part of a pipeline",
            where=where,
            expected="one part" if told is None else told,
            found=", ".join(part or "keys without a part" for part in found),
            then=f"say which part the base is: --component {found[-1] or 'unet'}"
            + (f"; {_SEVERAL}" if told is None else ""),
        )
    return str(told)
