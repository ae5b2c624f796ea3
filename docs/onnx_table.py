"""The model classes that export-onnx is tested with, each at a small size, and the table of them in docs/onnx.md.

`python docs/onnx_table.py` exports each and writes the table; the tests export them too and compare their rows with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.operations.export.export_onnx import ExportReport, export_onnx

TARGET = Path(__file__).parent / "onnx.md"
MARK = "<!-- the table is written by docs/onnx_table.py -->"
_HEAD = (
    "| class | inputs | outputs | nodes, and after optimisation | shapes compared with torch |\n|---|---|---|---|---|"
)
_WIDTH = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
_TOKENS = {"vocab_size": 100, "max_position_embeddings": 64, **_WIDTH}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_DECODER = {**_TOKENS, **_ENDS, "num_key_value_heads": 2}
_SEQ2SEQ = {
    **_ENDS, "vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Small:
    """A class of transformers by name, its config's class and entries, and whether it is exported with a cache."""

    model: str
    config: str
    settings: dict[str, Any]
    cached: bool = False


_DISTILBERT = {"vocab_size": 100, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}
_GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, **_ENDS}
_WINDOWED = {"head_dim": 8, "sliding_window": 8}
_GEMMA3 = {**_WINDOWED, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, **_ENDS}
_WHISPER = {**_SEQ2SEQ, "max_source_positions": 20, "max_target_positions": 64, "num_mel_bins": 8}

CLASSES: dict[str, Small] = {
    "roberta": Small("RobertaForTokenClassification", "RobertaConfig", _TOKENS),
    "distilbert": Small("DistilBertForSequenceClassification", "DistilBertConfig", _DISTILBERT),
    "bert-mlm": Small("BertForMaskedLM", "BertConfig", _TOKENS),
    "gpt2": Small("GPT2LMHeadModel", "GPT2Config", _GPT2, cached=True),
    "llama": Small("LlamaForCausalLM", "LlamaConfig", _DECODER, cached=True),
    "qwen3": Small("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 8}, cached=True),
    "mistral": Small("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 8}, cached=True),
    "gemma3": Small("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, **_GEMMA3}, cached=True),
    "qwen2-plain": Small("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "mistral-plain": Small("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 8}),
    "gemma-plain": Small("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 8}),
    "t5-cached": Small("T5ForConditionalGeneration", "T5Config", {**_T5, "decoder_start_token_id": 0}, cached=True),
    "whisper": Small("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "vit": Small("ViTForImageClassification", "ViTConfig", {**_WIDTH, "image_size": 32, "patch_size": 8}),
    "resnet": Small(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
}


def save(small: Small, folder: Path, seed: int) -> Path:
    """A random model of the class as a Hugging Face folder, its norms and biases random too."""
    import torch
    import transformers

    torch.manual_seed(seed)
    make: Callable[..., Any] = getattr(transformers, small.model)
    model = make(getattr(transformers, small.config)(**small.settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    model.save_pretrained(folder)
    return folder


def rows(report: ExportReport, cached: bool) -> list[str]:
    """The table's rows for one export: one for each graph."""
    said = f"`{report.model_class}`{', with a cache' if cached else ''}"
    made = []
    for graph in report.graphs:
        part = Path(graph.path).name.removesuffix("model.onnx").strip("_")
        cells = (
            f"{said}{f': {part}' if part else ''}",
            _names(graph.inputs),
            _names(graph.outputs),
            f"{graph.nodes}, {_optimised(graph.path)}",
            str(len(report.shapes)),
        )
        made.append(f"| {' | '.join(cells)} |")
    return made


def _optimised(graph: str) -> int:
    """Nodes after those of ONNX Runtime's optimisations that are the same on every processor."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # The level above lays convolutions out in blocks as wide as the processor's vectors.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimised.onnx")
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return len(onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node)


def _names(names: tuple[str, ...]) -> str:
    """A cache's layers once, as layer N."""
    shown = dict.fromkeys(".".join("N" if part.isdecimal() else part for part in name.split(".")) for name in names)
    return ", ".join(f"`{name}`" for name in shown)


def main() -> None:
    """Exports every class and writes the table."""
    lines = [MARK, _HEAD]
    with tempfile.TemporaryDirectory() as scratch:
        for name, small in CLASSES.items():
            model = save(small, Path(scratch) / name / "model", 0)
            report = export_onnx(model, Path(scratch) / name / "out" / "model.onnx", with_cache=small.cached)
            lines += rows(report, small.cached)
    before, mark, _ = TARGET.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{TARGET} has lost its mark"
    TARGET.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
