"""The five models of the LoRA paper's Table 1, on GPT-2's shape with random weights, and their graphs.

All are exported by `surgery export-onnx` itself: their classes are made known to transformers, where it looks them up,
so the graphs differ in nothing but what was added. The adapters are as lean as they can be built, and their activation
is the cheapest; real ones cost rather more.

- base: GPT-2 with its language-modelling head.
- LoRA, merged: rank 4 on the queries and values of every layer, a file of loralib merged by `surgery merge`.
- LoRA as a branch: the same factors beside the fused projection: two products and a sum
  (loralib's own layer takes more).
- AdapterL (Lin et al. 2020): x + U relu(D LN(x)) behind each block.
- AdapterH (Houlsby et al. 2019): h + U relu(D h) behind attention and behind the feed-forward, before their residuals.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import surgery

RANK, ALPHA = 4, 32
BASE, MERGED, BRANCH, ADAPTER_L, ADAPTER_H = "base", "LoRA, merged", "LoRA as a branch", "AdapterL", "AdapterH"
_STAMP = "graphs.json"  # written last: a folder that has it is complete


@dataclass(frozen=True)
class Size:
    """What a GPT-2 is made of; the defaults are GPT-2 medium's."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    vocabulary: int = 50_257
    positions: int = 1024

    def config(self) -> transformers.GPT2Config:
        """As transformers knows it."""
        return transformers.GPT2Config(
            n_layer=self.layers, n_embd=self.width, n_head=self.heads, vocab_size=self.vocabulary,
            n_positions=self.positions, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip


TINY = Size(layers=1, width=64, heads=4, vocabulary=100, positions=64)


@dataclass(frozen=True)
class Built:
    """A graph and what is known of it before any clock runs.

    Attributes:
        name: of the five.
        path: the `.onnx` file, from the folder that all are in.
        added: parameters beyond the base's.
        nodes: in the file.
        nodes_run: that ONNX Runtime executes on the CPU after its own optimisation.
        sha256: of the `.onnx` file.
        error: the largest difference from torch, in relation to the largest output.
    """

    name: str
    path: str
    added: int
    nodes: int
    nodes_run: int
    sha256: str
    error: float


class Bottleneck(nn.Module):
    """x + U relu(D x), or of its LayerNorm. (…, width) → (…, width)."""

    def __init__(self, width: int, bottleneck: int, *, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """`before` is what the adapted layer was given, `after` what it made of it."""
        return after + self.up(torch.relu(self.down(self.norm(after))))


class Branch(nn.Module):
    """after + (before Aᵀ) Bᵀ, the scaling in B. (…, in) and (…, out) → (…, out)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """`before` is what the adapted layer was given, `after` what it made of it."""
        return after + self.lora_B(self.lora_A(before))


def _add(layer: nn.Module, adapter: nn.Module) -> None:
    layer.adapter = adapter
    layer.register_forward_hook(lambda layer, given, after: layer.adapter(given[0], after))


class GPT2WithBranch(transformers.GPT2LMHeadModel):
    """Rank 4 on q and v of the fused projection: A stacked, B in blocks with zeros for k."""

    def __init__(self, config: transformers.GPT2Config) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            _add(block.attn.c_attn, Branch(config.n_embd, 3 * config.n_embd, 2 * RANK))


class GPT2WithAdapterL(transformers.GPT2LMHeadModel):
    """One adapter with a LayerNorm behind each block; at GPT-2 medium's width its bottleneck is 224."""

    def __init__(self, config: transformers.GPT2Config) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            _add(block, Bottleneck(config.n_embd, 7 * config.n_embd // 32, norm=True))


class GPT2WithAdapterH(transformers.GPT2LMHeadModel):
    """Two adapters in each block; at GPT-2 medium's width their bottleneck is 112."""

    def __init__(self, config: transformers.GPT2Config) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                _add(projection, Bottleneck(config.n_embd, 7 * config.n_embd // 64, norm=False))


_CLASSES = {BRANCH: GPT2WithBranch, ADAPTER_L: GPT2WithAdapterL, ADAPTER_H: GPT2WithAdapterH}


def build(work: Path, size: Size, dtype: str) -> list[Built]:
    """The five graphs, base first; taken as they are if `work` holds them already."""
    stamp = work / _STAMP
    if stamp.is_file():
        return [Built(**each) for each in json.loads(stamp.read_text())]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for made in _CLASSES.values():  # export-onnx looks there for what config.json names; the module loads itself anew
        setattr(sys.modules["transformers"], made.__name__, made)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(size.config()).to(getattr(torch, dtype))
    base.save_pretrained(work / "base-model")
    count = base.num_parameters()
    built = [exported(BASE, work / "base-model", 0)]

    factors = _factors(size)
    save_file(factors, work / "lora.safetensors")
    told = surgery.Told(alpha=ALPHA, enable_lora=(True, False, True))
    surgery.merge(work / "base-model", work / "lora.safetensors", work / "merged-model", told=told)
    shutil.rmtree(work / "base-model")
    built.append(exported(MERGED, work / "merged-model", 0))
    shutil.rmtree(work / "merged-model")

    weights = base.state_dict()
    del base
    for name, made in _CLASSES.items():
        model = made(size.config()).to(getattr(torch, dtype))
        model.load_state_dict(weights, strict=False)  # the adapters keep what they were born with
        if name == BRANCH:
            _set_branches(model, factors)
        added = model.num_parameters() - count
        model.save_pretrained(work / "model")
        del model
        built.append(exported(name, work / "model", added))
        shutil.rmtree(work / "model")
    stamp.write_text(json.dumps([asdict(each) for each in built]))
    return built


def exported(name: str, model: Path, added: int, *adapters: Path) -> Built:
    """Exports a model's folder beside it, adapters as branches, compared with torch."""
    out = model.parent / name.replace(", ", "-").replace(" ", "-") / "model.onnx"
    report = surgery.export_onnx(model, out, adapters=adapters)
    (graph,) = report.graphs
    assert graph.nodes_run is not None
    assert report.max_rel_error is not None
    return Built(
        name,
        str(out.relative_to(model.parent)),
        added,
        graph.nodes,
        graph.nodes_run,
        graph.sha256,
        report.max_rel_error,
    )


def _factors(size: Size) -> dict[str, Tensor]:
    """A state dict of loralib's: of every layer A (2 · rank, width) and B (2 · width, rank), for q and for v."""
    generator = torch.Generator().manual_seed(1)
    return {
        f"transformer.h.{layer}.attn.c_attn.lora_{role}": 0.02 * torch.randn(shape, generator=generator)
        for layer in range(size.layers)
        for role, shape in (("A", (2 * RANK, size.width)), ("B", (2 * size.width, RANK)))
    }


def _set_branches(model: nn.Module, factors: dict[str, Tensor]) -> None:
    """The same factors: A as it is; B's blocks where q and v are, times alpha / rank."""
    for number, block in enumerate(model.transformer.h):
        a, b = (factors[f"transformer.h.{number}.attn.c_attn.lora_{role}"] for role in "AB")
        width = b.shape[0] // 2
        whole = torch.zeros(3 * width, 2 * RANK)
        whole[:width, :RANK] = b[:width]
        whole[2 * width :, RANK:] = b[width:]
        with torch.no_grad():
            block.attn.c_attn.adapter.lora_A.weight.copy_(a)
            block.attn.c_attn.adapter.lora_B.weight.copy_(whole * (ALPHA / RANK))
