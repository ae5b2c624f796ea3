"""Writes the dialects that store alpha as a tensor: kohya, LyCORIS, ComfyUI. `kohya` and `dotted` read them.

This module does no mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from formats.adapter import Adapter, AdapterModule
from formats.dialects.ia3_forms import difference
from formats.dialects.lycoris import KEYS, OWN, SCALE
from formats.dialects.parts import COMFYUI, UNDERSCORED, prefix_of
from formats.dialects.peft_writing import commonest
from formats.dialects.underscored import underscored
from formats.dialects.unet_names import NameForm, Names
from formats.dialects.writing import (
    SIDES,
    Piece,
    Product,
    Wanted,
    Written,
    cannot,
    constant,
    kept_metadata,
    named,
    taken,
    turned,
    without_dropped,
)
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, owner
from formats.spec import TensorSpec

_PLAIN = (LayerKind.LINEAR, LayerKind.CONV)
_MODULES = {"kohya": "networks.lora", "lycoris": "lycoris.kohya"}
_UNRANKED = ("full", "lora_bias", "lycoris_oft", "lycoris_boft", "lycoris_ia3", "ia3")
# The algorithm names of LyCORIS, and the methods here that each covers.
_ALGORITHMS = {
    "loha": {"loha", "dora_loha"},
    "lokr": {"lokr", "dora_lokr"},
    "diag-oft": {"lycoris_oft"},
    "boft": {"lycoris_boft"},
    "glora": {"lycoris_glora"},
    "ia3": {"lycoris_ia3", "ia3"},
    "full": {"full"},
}
_COMFYUI_DORA = (
    "ComfyUI computes DoRA differently: it divides by the norm of the base's weights, while trainers and surgery merge "
    "divide by the norm of the changed weights; merge the adapter into the model for the exact effect"
)


@dataclass(frozen=True)
class AlphaWriter:
    """Writes a dialect that has `lora_up`, `lora_down` and `alpha`.

    Attributes:
        name: name of the dialect.
        lyco: whether it also has LyCORIS's factors and DoRA.
        dotted: whether it names layers as the base does. Programs that read it then add to any weight by name, so
            layers stored as (in, out) are written in that layout, and biases are written too.
        weights: name of the weights file in an output folder.
    """

    name: str
    lyco: bool
    dotted: bool
    weights: str = "lora.safetensors"

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect."""
        whole = {owner(module.target) for module in adapter.modules if module.method == "full" and _is_weight(module)}

        def has(bias: AdapterModule) -> bool:  # LyCORIS reads a bias only together with a whole difference
            return self.lyco and (self.dotted or (bias.method == "full" and owner(bias.target) in whole))

        adapter, dropped = without_dropped(adapter, self.name, wanted, biases=has, whole=self.lyco)
        prefix, names = self._prefix(wanted), self._names(wanted)
        pieces: list[Piece] = []
        for module in adapter.modules:
            name = names.adapted(owner(module.target)) if self.dotted else names.get(owner(module.target))
            pieces += self._module(prefix + (name if self.dotted else underscored(name)), module, wanted)
        self._check_names(pieces)
        kept = kept_metadata(metadata)
        if not self.dotted:
            kept = self._training(adapter, wanted) | kept
            family = "lycoris" if self.lyco else "networks"
            if not kept["ss_network_module"].startswith(family):
                kept["ss_network_module"] = _MODULES[self.name]
        notes = []
        if not wanted.component and prefix != "lycoris_":
            notes.append(f"the part of the pipeline is unknown: written as {prefix}…; choose another with --component")
        if self.dotted and any(module.method.startswith("dora") for module in adapter.modules):
            notes.append(_COMFYUI_DORA)
        return Written(tuple(pieces), kept, None, dropped, tuple(notes))

    def _prefix(self, wanted: Wanted) -> str:
        """The prefix of the part. If it is unknown: the denoiser's, or for lycoris its prefix for any model."""
        table = COMFYUI if self.dotted else UNDERSCORED
        if not wanted.component:
            return "lycoris_" if self.name == "lycoris" else next(iter(table))
        found = prefix_of(wanted.component, table)
        if found is None:
            raise AdapterFormatError(
                f"{self.name} has no name for this part",
                expected=", ".join(filter(None, table.values())),
                found=wanted.component,
                then="choose a part that the dialect has with --component, or another dialect with --to",
            )
        return found

    def _names(self, wanted: Wanted) -> Names:
        """The layer names that readers know. ComfyUI knows those of the original checkpoint. kohya's trainer knows
        diffusers' names, and for SDXL (a UNet with a second embedding) either."""
        modules = {owner(name) for name in wanted.base}
        if self.dotted:
            return Names.of(self.name, NameForm.ORIGINAL, modules)
        sdxl = any(module.endswith("label_emb.0.0") for module in modules)
        return Names.of(self.name, NameForm.DIFFUSERS, () if sdxl else modules)

    def _module(self, layer: str, module: AdapterModule, wanted: Wanted) -> Iterator[Piece]:
        """The tensors of one adapted weight or bias."""
        weight = wanted.base.get(f"{owner(module.target)}.weight")
        vector = weight is not None and len(weight.shape) == 1  # a norm's
        product = wanted.product(module)
        magnitude = module.factors.get("lora_magnitude_vector")
        if magnitude is not None and product is None and self.lyco:
            yield taken(f"{layer}.dora_scale", magnitude)
        if self.dotted:
            _check_comfyui(module, weight)
        if module.method in ("lora_tucker", "dora_tucker") and self.lyco:
            yield taken(f"{layer}.lora_mid.weight", module.factors["lora_mid"])
            yield taken(f"{layer}.lora_down.weight", module.factors["lora_A"])
            yield taken(f"{layer}.lora_up.weight", module.factors["lora_B"])
            yield constant(f"{layer}.alpha", module.scaling * module.rank)
        elif product is not None:
            yield from self._product(layer, product)
        elif self.lyco and module.method in OWN:
            yield from self._own(layer, module)
        elif self.name == "lycoris" and module.method == "ia3" and weight is not None and _is_weight(module):
            yield from self._ia3(layer, module, weight)
        elif self.lyco and module.method in ("loha", "lokr", "dora_loha", "dora_lokr") and module.kind in _PLAIN:
            yield from self._kronecker(layer, module)
        elif self.lyco and module.method == "full":
            norm, plain = ("b_norm", "diff_b") if module.target.endswith(".bias") else ("w_norm", "diff")
            # ComfyUI reads b_norm only together with w_norm, but the plain names for any weight and bias.
            yield taken(f"{layer}.{norm if vector and not self.dotted else plain}", module.factors["diff"])
        elif self.dotted and module.method == "lora_bias":
            yield taken(f"{layer}.diff_b", module.factors["lora_B.bias"], factor=module.scaling)
        else:
            raise cannot(self.name, "", module, None if self.lyco else "--to lycoris has more methods")

    def _product(self, layer: str, product: Product) -> Iterator[Piece]:
        module, a, b = product.module, product.a, product.b
        if product.magnitude is not None and not self.lyco:
            raise cannot(self.name, "DoRA", module, "--to lycoris, peft, diffusers or comfyui keeps it")
        if module.kind in SIDES:
            if not self.dotted:
                raise cannot(self.name, "layers that are neither linear nor a convolution", module)
            if product.magnitude is not None:
                raise cannot(self.name, "DoRA of a weight stored (in, out)", module)
            a, b = turned(b), turned(a)  # ΔWᵀ = Aᵀ Bᵀ, in the base's layout
        yield named(b, f"{layer}.lora_up.weight")
        yield named(a, f"{layer}.lora_down.weight")
        yield constant(f"{layer}.alpha", product.alpha)
        if product.magnitude is not None:
            shape = (b.output.shape[0], *(1 for _ in a.output.shape[1:]))
            yield taken(f"{layer}.dora_scale", product.magnitude, shape)

    def _kronecker(self, layer: str, module: AdapterModule) -> Iterator[Piece]:
        """LoHa or LoKr. No reader scales LoKr with two whole factors by alpha, so the scaling goes into the first."""
        whole = {"lokr_w1", "lokr_w2"} <= module.factors.keys()
        if "lokr_w2" in module.factors and len(module.factors["lokr_w2"].spec.shape) == 3:
            raise cannot(self.name, "LoKr with a whole w2 on a one-dimensional convolution", module)
        for role, ref in sorted(module.factors.items()):
            if role == "lora_magnitude_vector":
                continue
            yield taken(f"{layer}.{role}", ref, factor=module.scaling if whole and role == "lokr_w1" else 1.0)
        yield constant(f"{layer}.alpha", 1.0 if whole else module.scaling * module.rank)

    def _own(self, layer: str, module: AdapterModule) -> Iterator[Piece]:
        """LyCORIS's OFT, BOFT, GLoRA or (IA)³. OFT's alpha is a constraint and is copied unchanged."""
        for role, ref in sorted(module.factors.items()):
            yield taken(f"{layer}.{KEYS.get(role, role)}", ref)
        if module.method == "lycoris_glora":
            yield constant(f"{layer}.alpha", module.alpha)
        elif module.method == "lycoris_boft" and "alpha" not in module.factors:
            yield constant(f"{layer}.alpha", 0.0)  # without alpha, ComfyUI ignores the layer

    def _ia3(self, layer: str, module: AdapterModule, weight: TensorSpec) -> Iterator[Piece]:
        """peft's (IA)³ as the difference from 1. The bias that it also scales has been refused or dropped before."""
        if module.kind not in _PLAIN or not all(module.settings.get("enabled", (True,))):
            raise cannot(self.name, "(IA)³ of a part of a layer, or of one that stores (in, out)", module)
        yield difference(f"{layer}.{KEYS[SCALE]}", module, weight)
        yield constant(f"{layer}.on_input", float(module.settings["feedforward"]))

    def _check_names(self, pieces: list[Piece]) -> None:
        seen: dict[str, Piece] = {}
        for piece in pieces:
            other = seen.setdefault(piece.output.name, piece)
            if other is not piece:
                raise AdapterFormatError(
                    f"{self.name} gives two layers one name, because it writes dots as underscores",
                    where=piece.output.name,
                    found=" and ".join(each.sources[0].name for each in (other, piece) if each.sources),
                    then="use a dialect with dotted names: --to diffusers, comfyui or peft",
                )

    def _training(self, adapter: Adapter, wanted: Wanted) -> dict[str, str]:
        """The metadata from which web interfaces read the network's module, rank and alpha."""
        methods = {module.method for module in adapter.modules}
        made = {"ss_network_module": _MODULES[self.name]}
        ranked = [module for module in adapter.modules if module.method not in _UNRANKED]
        sizes = [
            (product.rank, product.alpha) if product else (module.rank, module.alpha)
            for module, product in ((each, wanted.product(each)) for each in ranked)
        ]
        if sizes:
            made["ss_network_dim"] = str(commonest(rank for rank, _ in sizes))
            made["ss_network_alpha"] = str(commonest(alpha for _, alpha in sizes))
        if self.lyco:
            algorithms = [name for name, own in _ALGORITHMS.items() if methods <= own | {"full"}]
            dora = {"dora_wd": "True"} if any(method.startswith("dora") for method in methods) else {}
            made["ss_network_args"] = json.dumps({"algo": algorithms[0] if algorithms else "locon", **dora})
        return made


def _check_comfyui(module: AdapterModule, weight: TensorSpec | None) -> None:
    """Raises AdapterFormatError for what ComfyUI ignores or reads differently."""
    kernel = () if weight is None else weight.shape[2:]
    cored = {"lora_mid", "hada_t1", "lokr_t2"} & module.factors.keys()
    reason = ""
    if module.method in ("lycoris_ia3", "ia3"):
        reason = "(IA)³, which ComfyUI does not read"
    elif module.method == "lycoris_oft" and "rescale" in module.factors:
        reason = "OFT's rescale, which ComfyUI ignores"
    elif module.method in ("lycoris_oft", "lycoris_boft") and module.settings["constraint"]:
        reason = "OFT's constraint, which ComfyUI does not multiply by the number of outputs"
    elif cored and len(kernel) != 2:
        reason = "a core of a convolution that is not two-dimensional"
    if reason:
        raise cannot("comfyui", reason, module, "--to lycoris keeps it; surgery merge puts it into the model")


def _is_weight(module: AdapterModule) -> bool:
    return module.target.endswith(".weight")


WRITERS = (
    AlphaWriter("kohya", lyco=False, dotted=False),
    AlphaWriter("lycoris", lyco=True, dotted=False),
    AlphaWriter("comfyui", lyco=True, dotted=True),
)
