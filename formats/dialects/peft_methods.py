"""Describes how peft stores its methods other than LoRA: the tensors of a module, and the settings the method needs.

Also lists the methods that cannot be merged, each with its reason. A new method is one line in one of the two tables; a
test compares them with the installed peft. This module does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.adapter import AdapterModule
from formats.checkpoint import Checkpoint
from formats.dialects.peft_factors import Context, Factors, first_match
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, owner
from formats.spec import TensorRef


@dataclass(frozen=True)
class Scheme:
    """How one method is stored in a file.

    Attributes:
        method: the method's name in surgery.methods.
        factors: key suffixes that every adapted module has; they also name the factors' roles.
        optional: key suffixes that a module may have.
        shared: tensors that all modules share, by their names after `base_model.`.
        alpha: the config's key of alpha, if the method scales by alpha / rank.
        settings: the config's settings that the method needs, with peft's defaults.
        sizes: whether the method also needs the sizes of the layer and of the largest layer.
        bias: the factors that also change the layer's bias.
        alone: whether the method changes the bias and not the weight.
        reads: whether the change of the bias depends on the weight.
    """

    method: str
    factors: tuple[str, ...]
    optional: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    alpha: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: bool = False
    bias: tuple[str, ...] = ()
    alone: bool = False
    reads: bool = False


_DEEPEST = 16  # the most inner layers of PEANuT that are read
_GLORA = tuple(f"glora_{path}.{part}" for path in "ABCDE" for part in ("X", "Xd", "Xu", "zeros"))
_DRAWN = {"r": 256, "projection_prng_key": 0}
SCHEMES: Mapping[str, Scheme] = {
    "ADALORA": Scheme("adalora", ("lora_A", "lora_B", "lora_E"), alpha="lora_alpha", settings={"init_r": 12}),
    "BEFT": Scheme("beft", ("beft_bias",), bias=("beft_bias",), alone=True),
    "BOFT": Scheme("boft", ("boft_R", "boft_s")),
    "C3A": Scheme("c3a", ("c3a_kernel",)),
    "DEFT": Scheme(
        "deft", ("deft_P",), ("deft_R",), settings={"alpha": None, "para": False, "decomposition_method": "relu"}
    ),
    "DELORA": Scheme("delora", ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")),
    "FOURIERFT": Scheme(
        "fourierft", ("fourierft_spectrum",), settings={"scaling": 150.0, "random_loc_seed": 777}, sizes=True
    ),
    "GLORA": Scheme("glora", (), _GLORA, bias=_GLORA, reads=True),
    "GRALORA": Scheme(
        "gralora",
        ("gralora_A", "gralora_B"),
        ("gralora_A_general.weight", "gralora_B_general.weight"),
        settings={"alpha": 64, "hybrid_r": 0},
    ),
    "HIRA": Scheme("hira", (), ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")),
    "HRA": Scheme("hra", ("hra_u",), settings={"apply_GS": False}),
    "IA3": Scheme("ia3", ("ia3_l",), bias=("ia3_l",)),
    "LOHA": Scheme("loha", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2"), alpha="alpha"),
    "LOKR": Scheme(
        "lokr",
        (),
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        alpha="alpha",
    ),
    "MISS": Scheme("miss", ("miss_block",), settings={"init_weights": True, "mini_r": 1}, sizes=True),
    "OFT": Scheme(
        "oft",
        ("oft_R.weight",),
        settings={
            "block_share": False,
            "coft": False,
            "eps": 6e-5,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
        },
    ),
    "PEANUT": Scheme(
        "peanut",
        ("peanut_A.weight", "peanut_B.weight"),
        tuple(f"peanut_{side}.{number}.weight" for side in ("encoders", "decoders") for number in range(_DEEPEST)),
        settings={"scaling": 1.0, "depth": 0, "act_fn": "relu"},
    ),
    "PVERA": Scheme(
        "pvera",
        ("pvera_lambda_b", "pvera_lambda_d"),
        shared=("pvera_A", "pvera_B"),
        settings={**_DRAWN, "sample_at_inference": False},
        sizes=True,
    ),
    "RANDLORA": Scheme(
        "randlora",
        ("randlora_lambda", "randlora_gamma"),
        ("randlora_A", "randlora_B"),  # peft also writes the shared bases for each module
        shared=("randlora_A", "randlora_B"),
        settings={"randlora_alpha": 640},
        sizes=True,
    ),
    "ROAD": Scheme(
        "road",
        ("road_theta", "road_alpha"),
        settings={"variant": "road_1", "group_size": 64},
        bias=("road_theta", "road_alpha"),
    ),
    "SHIRA": Scheme("shira", ("shira_weight", "shira_indices"), sizes=True),
    "SUPERTUNING": Scheme(
        "supertuning",
        ("supertuning_values", "supertuning_indices"),
        ("supertuning_lora_A.weight", "supertuning_lora_B.weight"),
        settings={"lora_alpha": 8},
        sizes=True,
    ),
    "UNILORA": Scheme(
        "unilora",
        ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"),
        shared=("unilora_theta_d",),
    ),
    "VBLORA": Scheme(
        "vblora",
        (),
        tuple(f"vblora_logits_{side}{what}" for side in "AB" for what in ("", "_topk_indices", "_topk_weights")),
        shared=("vblora_vector_bank",),
        settings={"topk": 2},
    ),
    "VERA": Scheme(
        "vera", ("vera_lambda_b", "vera_lambda_d"), shared=("vera_A", "vera_B"), settings=_DRAWN, sizes=True
    ),
    "WAVEFT": Scheme(
        "waveft",
        ("waveft_spectrum",),
        settings={"scaling": 25.0, "random_loc_seed": 777, "use_idwt": True, "wavelet_family": "db1"},
        sizes=True,
    ),
}
# Settings that select another method: peft_type, setting, its value, the method's name in surgery.methods.
VARIANTS = (("MISS", "init_weights", "bat", "miss_bat"),)
# Methods whose files hold only tensors that replace the base's: no factors, no mathematics.
REPLACING = ("LN_TUNING", "TRAINABLE_TOKENS")
_PREFIX = "it puts learned vectors before the input, and the attention to them depends on the input"
_GATE = "it mixes adapters by weights that depend on the input"
REFUSED: Mapping[str, str] = {
    "ADAMSS": "the outputs that each of its parts acts on come from a clustering of the base and are not in the file",
    "ADAPTION_PROMPT": "it adds a gated attention to learned vectors, which depends on the input",
    "CARTRIDGE": "it is a learned cache of keys and values, and the attention to it depends on the input",
    "CPT": _PREFIX,
    "FROD": "its left factor is not in the file: peft solves it from the base, and its last bits depend on the solver",
    "LILY": _GATE,
    "MULTITASK_PROMPT_TUNING": _PREFIX,
    "OSF": "it replaces the base's lower singular directions, which peft recomputes from the base; where singular "
    "values are close, each SVD routine finds others",
    "POLY": "it mixes adapters by weights that depend on the task, which is part of the input",
    "PREFIX_TUNING": _PREFIX,
    "PROMPT_TUNING": _PREFIX,
    "PSOFT": "it rotates singular vectors of the base, which are not in the file and whose signs depend on the SVD "
    "routine",
    "P_TUNING": _PREFIX,
    "SHADOW": "it runs a second network and adds its hidden states, which are not a function of one weight",
    "TINYLORA": "which of its vectors belongs to which layer follows from the order of the model's layers, which is "
    "in no file, and its factors are singular vectors of the base, whose signs depend on the SVD routine",
    "XLORA": _GATE,
}


def scheme_of(config: Mapping[str, Any], where: str) -> Scheme | None:
    """How the config's method is stored in the file; None for LoRA and for methods that only replace tensors.

    Raises:
        AdapterFormatError: the method cannot be merged (the error gives the reason), or is unknown.
    """
    peft_type = str(config.get("peft_type"))
    if peft_type == "LORA" or peft_type in REPLACING:
        return None
    if peft_type in REFUSED:
        raise AdapterFormatError(
            f"{peft_type} cannot be merged into weights: {REFUSED[peft_type]}",
            where=where,
            then="keep the adapter unmerged, and load base and adapter with peft",
        )
    if peft_type not in SCHEMES:
        raise AdapterFormatError(
            "an unknown method of peft",
            where=where,
            expected=", ".join(["LORA", *SCHEMES, *REPLACING]),
            found=peft_type,
            then="correct peft_type in adapter_config.json, or merge this adapter with peft itself",
        )
    return SCHEMES[peft_type]


def factor_pattern(scheme: Scheme) -> re.Pattern[str]:
    """A regular expression for the path of a factor, with the groups `module` and `role`."""
    roles = "|".join(sorted((re.escape(role) for role in (*scheme.factors, *scheme.optional)), key=len, reverse=True))
    return re.compile(rf"^(?P<module>.+)\.(?P<role>{roles})$")


def no_factors(scheme: Scheme, where: str) -> AdapterFormatError:
    """The error for a file without factors, such as a Uni-LoRA saved without its indices, which peft draws layer by
    layer in the model's order."""
    return AdapterFormatError(
        "the file has no factors of any layer",
        where=where,
        expected=", ".join(scheme.factors or scheme.optional),
        then="save the adapter with everything it draws at random (save_indices, save_projection)",
    )


def shared_tensors(scheme: Scheme, checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """The tensors that all modules share, by role."""
    return {
        role: checkpoint.tensor(f"base_model.{role}")
        for role in scheme.shared
        if f"base_model.{role}" in checkpoint.specs
    }


def scheme_modules(
    scheme: Scheme, modules: Mapping[str, Factors], shared: Factors, context: Context
) -> list[AdapterModule]:
    """The adapted weights and biases.

    Args:
        scheme: how the method is stored.
        modules: the factors by module and role.
        shared: the factors that all modules share.
        context: the adapter's context.

    Raises:
        AdapterFormatError: a module lacks a factor.
    """
    sizes = {module: _sizes(module, context) for module in modules} if scheme.sizes else {}
    largest = {f"largest_{side}": max(size[side] for size in sizes.values()) for side in ("out", "in") if sizes}
    found = []
    for module, factors in sorted(modules.items()):
        missing = [role for role in scheme.factors if role not in factors]
        if missing:
            raise AdapterFormatError(
                "a module lacks some of its factors",
                where=f"{context.where}: {module}",
                expected=", ".join(scheme.factors),
                found=", ".join(factors),
                then="save the adapter again, from the library that trained it",
            )
        settings = _settings(scheme, module, context)
        method = _mathematics(scheme, settings)
        settings |= sizes.get(module, {}) | largest
        rank, alpha = (_rank(module, context), _alpha(scheme, module, context)) if scheme.alpha else (1, 1.0)
        target, bias = (context.rename(f"{module}.{last}") for last in ("weight", "bias"))
        if not scheme.alone:
            kind = _kind(target, factors, context)
            found.append(AdapterModule(target, method, kind, {**shared, **factors}, rank, alpha, settings=settings))
        if scheme.bias and bias in context.base and not settings.get("feedforward"):
            ours = {role: factors[role] for role in scheme.bias if role in factors}
            reads = target if scheme.reads else None
            found.append(
                AdapterModule(bias, method, LayerKind.LINEAR, ours, rank, alpha, settings=settings, reads=reads)
            )
    return found


def _settings(scheme: Scheme, module: str, context: Context) -> dict[str, Any]:
    settings = {key: context.config.get(key, default) for key, default in scheme.settings.items()}
    if scheme.method == "ia3":
        configured = context.config.get("feedforward_modules") or ()
        settings["feedforward"] = (
            bool(re.fullmatch(configured, module))
            if isinstance(configured, str)
            else any(module.endswith(entry) for entry in configured)
        )
    return settings


def _mathematics(scheme: Scheme, settings: Mapping[str, Any]) -> str:
    chosen = [
        method
        for peft_type, setting, value, method in VARIANTS
        if SCHEMES[peft_type] is scheme and settings[setting] == value
    ]
    return chosen[0] if chosen else scheme.method


def _rank(module: str, context: Context) -> int:
    pattern = context.config.get("rank_pattern")  # AdaLoRA's rank_pattern has another meaning; its rank is not used
    return context.rank(module) if isinstance(pattern, Mapping) or not pattern else int(context.config.get("r", 8))


def _alpha(scheme: Scheme, module: str, context: Context) -> float:
    return float(first_match(context.config.get("alpha_pattern"), module, context.config.get(scheme.alpha, 8)))


def _kind(target: str, factors: Factors, context: Context) -> LayerKind:
    """How the base stores the weight. A square one is stored like its neighbours, or as the config says for all."""
    shape, module = context.base[target].shape, owner(target)
    if any("embedding" in role for role in factors):
        return LayerKind.EMBEDDING
    if len(shape) > 2:
        return LayerKind.CONV
    told = LayerKind.TRANSPOSED in context.kinds.values()
    square = len(shape) == 2 and shape[0] == shape[1]
    transposed = context.kinds.get(module) is LayerKind.TRANSPOSED or (
        square and not told and bool(context.config.get("fan_in_fan_out"))
    )
    return LayerKind.TRANSPOSED if transposed else LayerKind.LINEAR


def _sizes(module: str, context: Context) -> dict[str, int]:
    target = context.rename(f"{module}.weight")
    shape = context.base[target].shape
    transposed = len(shape) == 2 and _kind(target, {}, context) is LayerKind.TRANSPOSED
    return dict(zip(("in", "out") if transposed else ("out", "in"), shape[:2], strict=True))
