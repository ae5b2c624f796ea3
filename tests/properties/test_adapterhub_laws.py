"""One config for all layers says what any LoRA of reachable layers says: hypothesis makes up layers, ranks, alphas."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from safetensors.torch import load_file, save_file

import surgery
from formats.dialects.adapterhub_sites import sites_of
from formats.paths import open_checkpoint

WRITTEN = GOLDEN / "adapterhub" / "written"
LAYER = st.none() | st.tuples(st.integers(1, 5), st.sampled_from([1, 3, 8]))  # rank and alpha, where it is adapted


@settings(max_examples=20, deadline=None)
@given(data=st.data(), model=st.sampled_from(["bert", "gpt2", "llama"]), rslora=st.booleans())
def test_every_low_rank_change_survives_the_way_there_and_back(data: st.DataObject, model: str, rslora: bool) -> None:
    """peft → adapterhub → peft: the same ΔW, however ranks and alphas differ and whichever layers are left out."""
    base = WRITTEN / f"{model}.st"
    with open_checkpoint(base) as opened:
        sites = sorted(sites_of(opened.specs))
        shapes = {site: opened.specs[f"{site}.weight"].shape for site in sites}
    chosen = data.draw(st.lists(LAYER, min_size=len(sites), max_size=len(sites)).filter(any))
    torch.manual_seed(0)
    tensors, ranks, alphas = {}, {}, {}
    for site, wanted in zip(sites, chosen, strict=True):
        if wanted is not None:
            ranks[site], alphas[site] = wanted
            out, into = shapes[site][:: -1 if model == "gpt2" else 1]
            tensors[f"base_model.model.{site}.lora_A.weight"] = torch.randn(ranks[site], into)
            tensors[f"base_model.model.{site}.lora_B.weight"] = torch.randn(out, ranks[site])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "peft").mkdir()
        save_file(tensors, folder / "peft" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "target_modules": list(ranks), "rank_pattern": ranks, "alpha_pattern": alphas}
        (folder / "peft" / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": rslora}))
        surgery.convert(folder / "peft", folder / "hub", "adapterhub", base=base)
        surgery.convert(folder / "hub", folder / "back.st", "peft", base=base)
        merged = []
        for adapter in ("peft", "hub", "back.st"):
            surgery.merge(base, folder / adapter, folder / "m.st", force=True)
            merged.append(load_file(folder / "m.st"))
    for other in merged[1:]:
        for tensor, expected in merged[0].items():
            torch.testing.assert_close(other[tensor], expected, atol=1e-5, rtol=1e-5)
