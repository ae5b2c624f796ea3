"""Converts an adapter of every kind from every dialect to every other, merges each, and compares: docs/round-trips.md.

A test runs the same and fails where a cell differs; `make docs` writes the file.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from formats.dialects import WRITERS, dialect_named

if TYPE_CHECKING:
    import torch

TARGET = Path(__file__).parent / "round-trips.md"
DIALECTS = tuple(writer.name for writer in WRITERS)
PART = "text_encoder"
TOLERANCE = 1e-6
Shapes = Mapping[str, tuple[int, ...]]

_LLAMA: Shapes = {
    "model.embed_tokens.weight": (30, 24),
    **{
        f"model.layers.{number}.{name}.weight": shape
        for number in (0, 1)
        for name, shape in {
            "self_attn.q_proj": (24, 24), "self_attn.k_proj": (12, 24), "self_attn.v_proj": (12, 24),
            "self_attn.o_proj": (24, 24), "mlp.gate_proj": (20, 24), "mlp.up_proj": (20, 24),
            "mlp.down_proj": (24, 20), "conv": (6, 4, 3, 3), "input_layernorm": (24,),
        }.items()
    },
    "model.layers.0.mlp.gate_proj.bias": (20,),
    "model.norm.weight": (24,),
    "lm_head.weight": (30, 24),
}  # fmt: skip
_LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 30,
}  # fmt: skip
_GPT2: Shapes = {
    "transformer.h.0.attn.c_attn.weight": (16, 48),
    "transformer.h.0.attn.c_attn.bias": (48,),
    "transformer.h.0.mlp.c_fc.weight": (16, 64),
    "transformer.h.0.mlp.c_fc.bias": (64,),
    "transformer.wte.weight": (30, 16),
}
_GPT2_CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2,
    "vocab_size": 30, "n_positions": 64,
}  # fmt: skip
_ATTENTION = "model.layers.{}.self_attn"
_VALUES = tuple(f"{_ATTENTION.format(number)}.v_proj" for number in (0, 1))


@dataclass(frozen=True)
class Kind:
    """An adapter that each dialect may have or not.

    Attributes:
        label: what the table calls it.
        factors: shapes by key, in the dialect that it starts from.
        config: peft's; empty for one that starts in LyCORIS's names or loralib's.
        gpt2: whether its base is a GPT-2; else a Llama with a convolution.
        start: the dialect that it starts from.
        numbers: tensors of one number, by key.
        told: what must be said of the start's file.
    """

    label: str
    factors: Shapes
    config: Mapping[str, Any] = field(default_factory=dict)
    gpt2: bool = False
    start: str = "peft"
    numbers: Mapping[str, float] = field(default_factory=dict)
    told: surgery.Told = field(default_factory=surgery.Told)


def _lora(
    layers: Mapping[str, tuple[int, ...]], rank: int = 3, a: str = "lora_A.weight", b: str = "lora_B.weight"
) -> Shapes:
    """peft's factors of layers, by their weights' shapes (out, in, *kernel)."""
    found: dict[str, tuple[int, ...]] = {}
    for layer, (out, into, *kernel) in layers.items():
        found[f"base_model.model.{layer}.{a}"] = (rank, into, *kernel)
        found[f"base_model.model.{layer}.{b}"] = (out, rank, *(1 for _ in kernel))
    return found


def _peft(label: str, factors: Shapes, *, gpt2: bool = False, **settings: Any) -> Kind:
    layers = {
        re.sub(r"\.(base_layer|lora_|hada_|lokr_|ia3_).*", "", key.removeprefix("base_model.model.")) for key in factors
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": sorted(layers), **settings}
    return Kind(label, factors, config, gpt2)


def _lycoris(label: str, layer: str, factors: Shapes, **numbers: float) -> Kind:
    prefix = f"lycoris_{layer.replace('.', '_')}"
    return Kind(
        label,
        {f"{prefix}.{name}": shape for name, shape in factors.items()},
        start="lycoris",
        numbers={f"{prefix}.{name}": number for name, number in numbers.items()},
    )


def kinds() -> tuple[Kind, ...]:
    """All of them."""
    values = dict.fromkeys(_VALUES, (12, 24))
    linear = _lora(values)
    conv = {"model.layers.0.conv": (6, 4, 3, 3)}
    turned = {"transformer.h.0.mlp.c_fc": (64, 16)}
    fused = "transformer.h.0.attn.c_attn"
    q, v = f"{_ATTENTION.format(0)}.q_proj", _VALUES[0]
    kernel = {"lora_down.weight": (3, 4, 1, 1), "lora_mid.weight": (3, 3, 3, 3), "lora_up.weight": (6, 3, 1, 1)}
    loha = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 24), "hada_w2_a": (12, 2), "hada_w2_b": (2, 24)}
    lokr = {"lokr_w1": (3, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 6)}
    biased = "model.layers.0.mlp.gate_proj"
    gate, bias = {biased: (20, 24)}, f"base_model.model.{biased}"
    magnitudes = {f"base_model.model.{name}.lora_magnitude_vector": (12,) for name in values}
    own = {f"base_model.model.{v}.{name}": shape for name, shape in loha.items()}
    return (
        _peft("LoRA, linear layers", linear),
        _peft("LoRA, queries and keys of a Llama", _lora({q: (24, 24), q.replace("q_", "k_"): (12, 24)})),
        _peft("LoRA, a convolution", _lora(conv)),
        _peft(
            "LoRA, an embedding",
            {"base_model.model.model.embed_tokens.lora_embedding_A": (3, 30),
             "base_model.model.model.embed_tokens.lora_embedding_B": (24, 3)},
        ),
        _peft("LoRA, a layer that stores (in, out)", _lora(turned), gpt2=True, fan_in_fan_out=True),
        _peft(
            "LoRA, other ranks and alphas",
            _lora({_VALUES[0]: (12, 24)}, 2) | _lora({_VALUES[1]: (12, 24)}, 3),
            rank_pattern={_VALUES[0]: 2}, alpha_pattern={_VALUES[0]: 5},
        ),
        _peft("rsLoRA", linear, use_rslora=True),
        Kind(
            "a fused layer of loralib's", {f"{fused}.lora_A": (6, 16), f"{fused}.lora_B": (32, 3)}, gpt2=True,
            start="loralib", told=surgery.Told(alpha=6, enable_lora=(True, False, True)),
        ),
        _peft("DoRA", linear | magnitudes, use_dora=True),
        _peft("the change of a bias", _lora(gate) | {f"{bias}.lora_B.bias": (20,)}, lora_bias=True),
        _peft("a bias in full", _lora(gate) | {f"{bias}.base_layer.bias": (20,)}, bias="lora_only"),
        _lycoris("LoCon with a core", "model.layers.0.conv", kernel, alpha=2.0),
        _peft("LoHa", own, peft_type="LOHA", r=2, alpha=3),
        _peft(
            "LoKr", {f"base_model.model.{v}.{name}": shape for name, shape in lokr.items()}, peft_type="LOKR", r=2,
            alpha=3, decompose_factor=4,
        ),
        _peft(
            "(IA)³ of outputs, without a bias", {f"base_model.model.{name}.ia3_l": (12, 1) for name in values},
            peft_type="IA3", feedforward_modules=[],
        ),
        _peft(
            "(IA)³ of inputs", {"base_model.model.model.layers.0.mlp.down_proj.ia3_l": (1, 20)}, peft_type="IA3",
            feedforward_modules=["model.layers.0.mlp.down_proj"],
        ),
        _lycoris("DoRA around LoHa", v, loha | {"dora_scale": (12, 1)}, alpha=1.0),
        _lycoris("LyCORIS's (IA)³ of outputs, with a bias", biased, {"weight": (20,)}, on_input=0.0),
        _lycoris("LyCORIS's OFT", v, {"oft_blocks": (3, 4, 4)}, alpha=0.0),
        _lycoris("LyCORIS's BOFT", v, {"oft_blocks": (1, 3, 4, 4)}, alpha=0.0),
        _lycoris(
            "LyCORIS's GLoRA", v,
            {"a1.weight": (24, 2), "a2.weight": (2, 24), "b1.weight": (12, 2), "b2.weight": (2, 24)}, alpha=1.0,
        ),
        _lycoris("a whole difference", v, {"diff": (12, 24)}),
        _lycoris("a norm", "model.layers.0.input_layernorm", {"w_norm": (24,)}),
    )  # fmt: skip


def cells(kind: Kind, folder: Path) -> dict[str, dict[str, str]]:
    """What becomes of a kind: by the dialect it is first written in, and then by the one it is converted to."""
    source, base = _made(kind, folder)
    expected = _merged(base, source, kind.told, folder)
    before = _tensors(base / "model.safetensors")
    found: dict[str, dict[str, str]] = {}
    for first in DIALECTS:
        told, path = kind.told, source
        if first != kind.start:
            try:
                path, told = _converted(source, base, kind.start, first, told, folder / "first")
            except surgery.ReportedError as error:
                _expected(error)
                continue
        found[first] = {}
        for second in DIALECTS:
            if second == first:
                out, said = path, told
            else:
                try:
                    out, said = _converted(path, base, first, second, told, folder / "second")
                except surgery.ReportedError as error:
                    _expected(error)
                    continue
            found[first][second] = _compared(expected, _merged(base, out, said, folder), before)
    return found


def section(kind: Kind, folder: Path) -> str:
    """A kind's table, as Markdown."""
    found = cells(kind, folder)
    columns = [name for name in DIALECTS if any(name in row for row in found.values())]
    refused = [name for name in DIALECTS if name not in columns]
    lines = [
        f"## {kind.label[0].upper()}{kind.label[1:]}",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    lines += [f"| {first} | {' | '.join(row.get(second, '–') for second in columns)} |" for first, row in found.items()]
    if refused:
        lines += ["", f"Refused by {', '.join(refused)}."]
    return "\n".join(lines) + "\n"


def _made(kind: Kind, folder: Path) -> tuple[Path, Path]:
    """Saves the base and the adapter, every factor random."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shapes, config = (_GPT2, _GPT2_CONFIG) if kind.gpt2 else (_LLAMA, _LLAMA_CONFIG)
    base, source = folder / "base", folder / "source"
    for path in (base, source, folder / "first", folder / "second"):
        path.mkdir()
    save_file(
        {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()},
        base / "model.safetensors",
    )
    (base / "config.json").write_text(json.dumps(config))
    factors = {key: 0.5 * torch.randn(shape, generator=generator) for key, shape in kind.factors.items()}
    factors |= {key: torch.tensor(number) for key, number in kind.numbers.items()}
    if not kind.config:
        save_file(factors, source / "source.safetensors")
        return source / "source.safetensors", base
    save_file(factors, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps(kind.config))
    return source, base


def _converted(
    source: Path, base: Path, first: str, second: str, told: surgery.Told, folder: Path
) -> tuple[Path, surgery.Told]:
    """The converted adapter, and what must be said of it."""
    end = {"gguf": ".gguf", "ort": ".onnx_adapter", "peft": "", "adapterhub": ""}.get(second, ".safetensors")
    out = folder / f"{first}-{second}{end}"
    part = PART if any(dialect_named(name).in_parts for name in (first, second)) else None
    said = surgery.Told(alpha=told.alpha, enable_lora=told.enable_lora, component=part)
    report = surgery.convert(source, out, second, base=base, told=said)
    if second != "loralib":
        return out, surgery.Told()
    (alpha,) = (found[1] for note in report.notes if (found := re.search(r"lora_alpha = ([\d.]+)", note)))
    return out, surgery.Told(alpha=float(alpha))


def _merged(base: Path, adapter: Path, told: surgery.Told, folder: Path) -> dict[str, torch.Tensor]:
    surgery.merge(base, adapter, folder / "merged", told=told, force=True)
    return _tensors(folder / "merged" / "model.safetensors")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _compared(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
) -> str:
    """= for the same bits, ≈ within the tolerance of the largest change of its weight."""
    import torch

    if all(torch.equal(found[name], tensor) for name, tensor in expected.items()):
        return "="
    for name, tensor in expected.items():
        change = float((tensor - before[name]).abs().max())
        error = float((found[name] - tensor).abs().max())
        if error > TOLERANCE * change:
            raise AssertionError(f"{name}: {error} of {change}")
    return "≈"


def _expected(error: surgery.ReportedError) -> None:
    if "cannot express" not in str(error):
        raise error


_TEXT = """# Round trips between dialects

Generated by docs/round_trips.py, which converts and merges; do not edit. A test runs it again.

A row is the dialect that the adapter is first written in, a column the one that it is then converted to. What is merged
into the base is compared with what the adapter gave at first: *=* has the same bits, *≈* is within 1e-6 of the largest
change of its weight, in float32, *–* is refused with the reason. Dialects without a row refuse the kind itself.
"""


def main() -> None:
    """Writes the file."""
    sections = []
    for kind in kinds():
        with tempfile.TemporaryDirectory() as folder:
            sections.append(section(kind, Path(folder)))
    TARGET.write_text("\n".join([_TEXT, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
