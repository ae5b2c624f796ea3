from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from places import ROOT
from safetensors.torch import load_file

from surgery.onnx.files.payload import PAYLOAD
from surgery.operations.export.export_onnx import ExportReport, export_onnx
from surgery.operations.extract.extract import extract
from surgery.operations.look.prove import prove
from surgery.operations.merge.merge import merge

pytestmark = pytest.mark.processor

DOCS = ROOT / "docs"


def _table() -> Any:
    spec = importlib.util.spec_from_file_location("onnx_table", DOCS / "onnx_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["onnx_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLE = _table()
TRACED_TWICE = ("llama", "vit", "resnet")  # the others' merged weights go under the base's graph


@dataclass(frozen=True)
class Pair:
    """A base and the base with a LoRA merged, each exported."""

    base: Path
    merged: Path
    base_report: ExportReport
    merged_report: ExportReport


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Base and merged of a class, exported once a session; made when asked for."""
    made: dict[str, Pair] = {}

    def export(name: str) -> Pair:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            small = TABLE.CLASSES[name]
            base, tuned = (TABLE.save(small, root / each, seed) for seed, each in enumerate(("base", "tuned")))
            extract(base, tuned, root / "adapter", rank=2)
            merge(base, root / "adapter", root / "merged")
            first = export_onnx(base, root / "base-onnx" / "model.onnx", with_cache=small.cached)
            target = root / "merged-onnx" / "model.onnx"
            if name in TRACED_TWICE:
                second = export_onnx(root / "merged", target, with_cache=small.cached)
            else:
                second = export_onnx(root / "merged", target, graph=first.output, verify=True)
            made[name] = Pair(base, root / "merged", first, second)
        return made[name]

    return export


@pytest.mark.parametrize("name", TABLE.CLASSES)
def test_base_and_merged_share_a_graph_that_runs_like_torch(
    exported: Callable[[str], Pair], loads_silently: Callable[..., Any], name: str
) -> None:
    """Identical graphs over other weights, as prove finds too; both agree with torch, pass onnx's checker, and load
    without a word."""
    pair = exported(name)
    assert pair.base_report.payload_blake3 != pair.merged_report.payload_blake3
    for report in (pair.base_report, pair.merged_report):
        assert report.max_rel_error is not None
        assert report.tolerance is not None
        assert report.max_rel_error < report.tolerance
    for base, merged in zip(pair.base_report.graphs, pair.merged_report.graphs, strict=True):
        assert Path(base.path).read_bytes() == Path(merged.path).read_bytes()
        assert base.nodes_run == merged.nodes_run
        onnx.checker.check_model(merged.path, full_check=True)
        loads_silently(merged.path)
        proof = prove(base.path, merged.path, shape=(2, 8))
        assert (proof.same, proof.level, proof.difference) == (True, "bytes", None)


def test_the_resnets_convolutions_were_adapted(exported: Callable[[str], Pair]) -> None:
    """What was merged there is LoRA of convolutions, and every one of them differs from the base's."""
    pair = exported("resnet")
    adapter = load_file(pair.base.parent / "adapter" / "adapter_model.safetensors")
    kernels = [name for name, tensor in adapter.items() if name.endswith("lora_A.weight") and tensor.ndim == 4]
    base, merged = (load_file(folder / "model.safetensors") for folder in (pair.base, pair.merged))
    changed = [name for name, tensor in merged.items() if tensor.ndim == 4 and not torch.equal(tensor, base[name])]
    assert 3 <= len(kernels) <= len(changed)


@pytest.mark.parametrize("name", TABLE.CLASSES)
def test_the_table_in_the_docs_is_what_was_exported(exported: Callable[[str], Pair], name: str) -> None:
    """docs/onnx.md has a row for every graph of every class; `python docs/onnx_table.py` writes it."""
    page = (DOCS / "onnx.md").read_text()
    for row in TABLE.rows(exported(name).base_report, TABLE.CLASSES[name].cached):
        assert row in page


@pytest.mark.parametrize("name", ["llama", "t5-cached"])
def test_axes_are_called_what_they_are(exported: Callable[[str], Pair], name: str) -> None:
    """No symbol of the tracer is left; what varies has a name at the inputs and the outputs."""
    allowed = {"batch", "sequence", "past_sequence", "total_sequence", "encoder_sequence"}
    for graph in exported(name).base_report.graphs:
        model = onnx.load(graph.path, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            for axis in value.type.tensor_type.shape.dim:
                assert axis.dim_value > 0 or axis.dim_param in allowed, value.name
        between = {axis.dim_param for v in model.graph.value_info for axis in v.type.tensor_type.shape.dim}
        assert between <= {"", *allowed}


def _session(path: str) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _run(session: Any, feed: dict[str, Any]) -> dict[str, Any]:
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, feed), strict=True))


def _empty(session: Any, batch: int) -> dict[str, Any]:
    """A past of no token for every input that holds one which grows."""
    shapes = {entry.name: entry.shape for entry in session.get_inputs() if "past_sequence" in entry.shape}
    return {name: np.zeros((batch, s[1], 0, s[3]), np.float32) for name, s in shapes.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoders_generate_what_transformers_generates(exported: Callable[[str], Pair], name: str) -> None:
    """Twenty greedy tokens of a merged model for two prompts, one of them padded on the left: the very same."""
    pair = exported(name)
    model = getattr(transformers, pair.base_report.model_class).from_pretrained(pair.merged).eval()
    ids = np.array([[5, 17, 42, 8, 99, 3], [0, 0, 7, 64, 21, 33]])
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    expected = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
    ).numpy()  # (2, 26)
    session = _session(pair.merged_report.graphs[0].path)
    past, fed, tokens = _empty(session, 2), ids, ids
    for _ in range(20):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -fed.shape[1] :]
        found = _run(session, {"input_ids": fed, "attention_mask": mask, "position_ids": positions, **past})
        logits = found["logits"][:, -1]
        logits[:, 0] = -np.inf  # the end, which min_new_tokens forbids
        fed = logits.argmax(-1)[:, None]  # (2, 1)
        tokens, mask = np.concatenate([tokens, fed], 1), np.concatenate([mask, np.ones_like(fed)], 1)
        past = {each: found[each.replace("past_key_values", "present")] for each in past}
    np.testing.assert_array_equal(tokens, expected)


def test_encoder_and_decoder_generate_what_transformers_generates(exported: Callable[[str], Pair]) -> None:
    """T5, merged: the encoder's graph once, the decoder's for every token."""
    pair = exported("t5-cached")
    model = transformers.T5ForConditionalGeneration.from_pretrained(pair.merged).eval()
    ids, mask = np.array([[5, 17, 42, 8], [7, 64, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
    ).numpy()  # (2, 21), beginning with the start token
    encoder, decoder = (_session(graph.path) for graph in pair.merged_report.graphs)
    encoded = _run(encoder, {"input_ids": ids, "attention_mask": mask})
    fixed = {name.replace("present", "past_key_values"): a for name, a in encoded.items() if name.startswith("present")}
    past, tokens = _empty(decoder, 2), np.zeros((2, 1), np.int64)
    for _ in range(20):
        found = _run(decoder, {"input_ids": tokens[:, -1:], "encoder_attention_mask": mask, **fixed, **past})
        logits = found["logits"][:, -1]
        logits[:, 0] = -np.inf
        tokens = np.concatenate([tokens, logits.argmax(-1)[:, None]], 1)
        past = {each: found[each.replace("past_key_values", "present")] for each in past}
    np.testing.assert_array_equal(tokens, expected)


def test_weights_of_two_graphs_are_one_file(exported: Callable[[str], Pair]) -> None:
    """Encoder and decoder point into one payload, each at what it uses, the shared embedding at the same place."""
    report = exported("t5-cached").base_report
    assert [Path(graph.path).name for graph in report.graphs] == ["encoder_model.onnx", "decoder_model.onnx"]
    folder = Path(report.payload).parent
    assert {path.name for path in folder.iterdir()} == {"encoder_model.onnx", "decoder_model.onnx", PAYLOAD}
    encoder, decoder = (
        {t.name: t.external_data for t in onnx.load(graph.path, load_external_data=False).graph.initializer}
        for graph in report.graphs
    )
    assert str(encoder["shared.weight"]) == str(decoder["shared.weight"])
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" not in decoder
