"""Folding is exact: in float64, weights that hold an adapter give what the adapter gives beside the weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from formats import open_checkpoint
from formats.grafts import BranchGraft, Value, read_grafts
from surgery.methods.activations import function
from surgery.operations.fold.verdicts import Way

LAYER = "encoder.layer.{}"
BOUND = 1e-12
SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "width": st.integers(1, 40),
        "inner": st.integers(1, 60),
        "factors": st.tuples(st.integers(1, 9), st.integers(1, 9)),
        "scaling": st.sampled_from([1.0, 4.0, -0.37, "learned", "channel"]),
        "size": st.sampled_from([1e-3, 1.0, 30.0]),
    }
)


class Made:
    """A two-layer BERT-like base in float64 and an adapter of its MLPs."""

    def __init__(self, folder: Path, shape: dict[str, Any], activation: str = "gelu", **own: Any) -> None:
        generator = torch.Generator().manual_seed(shape["seed"])

        def drawn(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator, dtype=torch.float64)

        width, inner = shape["width"], shape["inner"]
        self.base: dict[str, torch.Tensor] = {}
        self.adapter: dict[str, torch.Tensor] = {}
        for layer, factor in enumerate(shape["factors"]):
            path, rank = LAYER.format(layer), max(width // factor, 1)
            for name, (out, into) in {"intermediate": (inner, width), "output": (width, inner)}.items():
                self.base |= {f"{path}.{name}.dense.weight": drawn(out, into), f"{path}.{name}.dense.bias": drawn(out)}
            self.base[f"{path}.output.LayerNorm.weight"] = drawn(width)
            module = f"{path}.output.adapters.a"
            for name, (out, into) in {"adapter_down.0": (rank, width), "adapter_up": (width, rank)}.items():
                self.adapter[f"{module}.{name}.weight"] = shape["size"] * drawn(out, into)
                self.adapter[f"{module}.{name}.bias"] = drawn(out)
            if isinstance(shape["scaling"], str):
                self.adapter[f"{module}.scaling"] = drawn(1 if shape["scaling"] == "learned" else width)
        own = {
            "output_adapter": True,
            "scaling": shape["scaling"],
            "reduction_factor": {str(layer): factor for layer, factor in enumerate(shape["factors"])},
            **own,
        }
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        save_file(self.base, folder / "base" / "model.safetensors")
        (folder / "base" / "config.json").write_text(json.dumps({"hidden_act": activation, "intermediate_size": inner}))
        save_file(self.adapter, folder / "adapter" / "adapter.safetensors")
        (folder / "adapter" / "adapter_config.json").write_text(
            json.dumps({"config": own, "version": "adapters.1.3.0"})
        )
        self.folder, self.x = folder, drawn(7, inner)
        self.r = drawn(7, width)
        self.scaling = shape["scaling"]

    def folded(self, way: Way) -> dict[str, torch.Tensor]:
        """The tensors of the folded model."""
        report = surgery.fold(self.folder / "base", self.folder / "adapter", self.folder / "out")
        assert {each.way for each in report.verdicts} == {way}
        return load_file(self.folder / "out" / "model.safetensors")

    def branch(self, x: torch.Tensor, layer: int, f: str) -> torch.Tensor:
        """What the bottleneck of a layer adds."""
        module = f"{LAYER.format(layer)}.output.adapters.a"
        down, up = (
            [self.adapter[f"{module}.{name}.{what}"] for what in ("weight", "bias")]
            for name in ("adapter_down.0", "adapter_up")
        )
        scaling = self.adapter.get(f"{module}.scaling", self.scaling)
        return scaling * nn.functional.linear(function(f)(nn.functional.linear(x, *down)), *up)


def projected(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """What a layer of the model gives."""
    return nn.functional.linear(x, tensors[f"{name}.dense.weight"], tensors[f"{name}.dense.bias"])


def close(found: torch.Tensor, expected: torch.Tensor, *terms: torch.Tensor) -> bool:
    """Within the bound, against the largest of what was added up."""
    return float((found - expected).norm()) <= BOUND * max(float(each.norm()) for each in (expected, *terms))


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_a_linear_bottleneck_goes_into_the_projection(shape: dict[str, Any]) -> None:
    """W' x + b' = h + s(U(D h + b_D) + b_U), h = W x + b."""
    with tempfile.TemporaryDirectory() as name:
        made = Made(Path(name), shape, non_linearity="linear")
        folded = made.folded(Way.FOLDED)
        for layer in (0, 1):
            module = f"{LAYER.format(layer)}.output"
            h = projected(made.base, module, made.x)
            added = made.branch(h, layer, "linear")
            assert close(projected(folded, module, made.x), h + added, h, added)


@given(SHAPES, st.sampled_from(["relu", "silu", "tanh"]))
@settings(max_examples=30, deadline=None)
def test_a_bottleneck_s_first_projection_joins_the_base_s(shape: dict[str, Any], f: str) -> None:
    """up f(rows x + rows_bias) + up_bias = s(U f(D h + b_D) + b_U); or f(D (W x) + …), where x is wider than h."""
    with tempfile.TemporaryDirectory() as name:
        made = Made(Path(name), shape, non_linearity=f)
        assert made.folded(Way.HALF).keys() == made.base.keys()
        grafts = load_file(made.folder / "out" / "grafts.safetensors")
        with open_checkpoint(made.folder / "out" / "grafts.safetensors") as checkpoint:
            sites = [site for site in read_grafts(checkpoint).sites if isinstance(site, BranchGraft)]
        reads = {site.module: site.reads for site in sites}
        for layer in (0, 1):
            module = f"{LAYER.format(layer)}.output"
            h = projected(made.base, module, made.x)
            path = f"{module}.dense.output_adapter"
            wide = made.x.shape[-1] > h.shape[-1]
            assert reads[f"{module}.dense"] is (Value.PRODUCT if wide else Value.INPUT)
            read = h - made.base[f"{module}.dense.bias"] if wide else made.x
            z = nn.functional.linear(read, grafts[f"{path}.down"], grafts[f"{path}.down_bias"])
            found = nn.functional.linear(function(f)(z), grafts[f"{path}.up"], grafts[f"{path}.up_bias"])
            # f moves no further than what it takes, which is that much in the output.
            assert close(found, made.branch(h, layer, f), h, made.branch(h, layer, "linear"))


@given(SHAPES, st.sampled_from(["relu", "gelu", "silu", "gelu_new", "quick_gelu", "linear"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_parallel_bottleneck_becomes_neurons(shape: dict[str, Any], g: str, linear: bool) -> None:
    """Those of the MLP's own activation, or two for each of a linear one; layers differ in how many they need."""
    f = "linear" if linear else g
    with tempfile.TemporaryDirectory() as name:
        made = Made(Path(name), shape, g, non_linearity=f, is_parallel=True)
        folded = made.folded(Way.WIDENED)
        assert len({folded[f"{LAYER.format(layer)}.intermediate.dense.bias"].shape for layer in (0, 1)}) == 1
        for layer in (0, 1):
            first, second = (f"{LAYER.format(layer)}.{which}" for which in ("intermediate", "output"))
            mlp = [
                projected(tensors, second, function(g)(projected(tensors, first, made.r)))
                for tensors in (made.base, folded)
            ]
            added = made.branch(made.r, layer, f)
            assert close(mlp[1], mlp[0] + added, mlp[0], added)


@given(SHAPES, st.sampled_from(["linear", "relu"]))
@settings(max_examples=20, deadline=None)
def test_a_projection_without_a_bias_gets_one(shape: dict[str, Any], f: str) -> None:
    """Llama's: W' x + b' = h + s(U(D h + b_D) + b_U), h = W x; and half-folded, where f is not linear."""
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), torch.Generator().manual_seed(shape["seed"])

        def drawn(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator, dtype=torch.float64)

        width, inner, rank = shape["width"], shape["inner"], max(shape["width"] // shape["factors"][0], 1)
        mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        base = {f"layers.0.mlp.{proj}.weight": drawn(*sizes) for proj, sizes in mlp.items()}
        base["layers.0.post_attention_layernorm.weight"] = drawn(width)
        sizes = {"adapter_down.0": (rank, width), "adapter_up": (width, rank)}
        weights = {role: shape["size"] * drawn(*both) for role, both in sizes.items()}
        biases = {role: drawn(out) for role, (out, _) in sizes.items()}
        adapter = {f"layers.0.output_adapters.adapters.a.{role}.weight": each for role, each in weights.items()}
        adapter |= {f"layers.0.output_adapters.adapters.a.{role}.bias": each for role, each in biases.items()}
        own = {"output_adapter": True, "reduction_factor": shape["factors"][0], "non_linearity": f, "scaling": -0.37}
        for path, tensors, file, config in (
            ("base", base, "model.safetensors", {"model_type": "llama"}),
            ("adapter", adapter, "adapter.safetensors", {"config": own, "version": "adapters.1.3.0"}),
        ):
            (folder / path).mkdir()
            save_file(tensors, folder / path / file)
            (folder / path / ("config.json" if path == "base" else "adapter_config.json")).write_text(
                json.dumps(config)
            )
        report = surgery.fold(folder / "base", folder / "adapter", folder / "out")
        x = drawn(7, inner)
        h = nn.functional.linear(x, base["layers.0.mlp.down_proj.weight"])
        z = nn.functional.linear(h, weights["adapter_down.0"], biases["adapter_down.0"])
        added = -0.37 * nn.functional.linear(function(f)(z), weights["adapter_up"], biases["adapter_up"])
        folded = load_file(folder / "out" / "model.safetensors")
        if f == "linear":
            assert report.settings == {"mlp_bias": True}
            module = "layers.0.mlp.down_proj"
            found = nn.functional.linear(x, folded[f"{module}.weight"], folded[f"{module}.bias"])
            assert close(found, h + added, h, added)
            assert not any(folded[f"layers.0.mlp.{proj}.bias"].any() for proj in ("gate_proj", "up_proj"))
        else:
            grafts, path = load_file(folder / "out" / "grafts.safetensors"), "layers.0.mlp.down_proj.output_adapter"
            z = nn.functional.linear(x, grafts[f"{path}.down"], grafts[f"{path}.down_bias"])
            found = nn.functional.linear(function(f)(z), grafts[f"{path}.up"], grafts[f"{path}.up_bias"])
            assert close(found, added, h, 0.37 * z @ weights["adapter_up"].mT)
