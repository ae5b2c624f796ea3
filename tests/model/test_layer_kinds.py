"""What a weight is: names and shapes, the config, the model on the meta device, and at last the user's word."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import transformers
from safetensors.torch import save_file

from formats import Checkpoint, DType, TensorSpec
from formats.layers import LayerKind
from formats.open_files import OpenFiles
from surgery.errors import ReportedError
from surgery.model.base_model import BaseModel
from surgery.model.layer_kinds import Structure, learn_structure


def structure_of(folder: Path, specs: dict[str, TensorSpec], kinds: dict[str, str] | None = None) -> Structure:
    """The structure of a model in a folder, whose file has these tensors."""
    headers = cast(Checkpoint, SimpleNamespace(specs=specs))
    return learn_structure([BaseModel(folder, headers, OpenFiles())], kinds or {})


def learn(folder: Path, kinds: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> Structure:
    """The structure of a model given by shapes; `__` stands for a dot."""
    specs = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return structure_of(folder, {name: TensorSpec(name, DType.F32, shape) for name, shape in specs.items()}, kinds)


def of_model(model: transformers.PreTrainedModel, folder: Path) -> Structure:
    """The structure of a saved model."""
    model.save_pretrained(folder)
    specs = {name: TensorSpec(name, DType.F32, tuple(t.shape)) for name, t in model.state_dict().items()}
    return structure_of(folder, specs)


def test_names_and_shapes_settle_the_usual_model(tmp_path: Path) -> None:
    """Nothing in doubt, so transformers is not even imported."""
    found = learn(
        tmp_path, up__weight=(8, 4), up__bias=(8,), q__weight=(4, 4), conv__weight=(8, 3, 5, 5), norm__weight=(4,)
    )
    assert found.kinds == {
        "up.weight": LayerKind.LINEAR,
        "q.weight": LayerKind.LINEAR,
        "conv.weight": LayerKind.CONV,
    }
    assert not found.doubtful


def test_a_square_weight_with_a_bias_and_no_neighbours_is_in_doubt(tmp_path: Path) -> None:
    """Linear or GPT-2's Conv1D: the flag decides."""
    shapes = {"q__weight": (4, 4), "q__bias": (4,)}
    assert set(learn(tmp_path, **shapes).doubtful) == {"q.weight"}
    told = learn(tmp_path, {"q.*ght": "transposed"}, **shapes)
    assert told.kinds == {"q.weight": LayerKind.TRANSPOSED}
    assert not told.doubtful


def test_the_numbers_of_the_config_confirm_an_embedding(tmp_path: Path) -> None:
    """Named like one, but no number of the config has its length: in doubt."""
    (tmp_path / "config.json").write_text(json.dumps({"text": {"vocab_size": 60}}))
    found = learn(tmp_path, embed_tokens__weight=(60, 4), embed_projection__weight=(7, 4))
    assert set(found.doubtful) == {"embed_projection.weight"}


def test_the_model_on_the_meta_device_settles_doubts(tmp_path: Path) -> None:
    """OPT's positions have two rows more than the config says; its projections are known too."""
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, word_embed_proj_dim=16,
    )  # fmt: skip
    found = of_model(transformers.OPTForCausalLM(config), tmp_path)
    assert found.kinds["model.decoder.embed_positions.weight"] is LayerKind.EMBEDDING
    assert found.kinds["model.decoder.project_in.weight"] is LayerKind.LINEAR
    assert not found.doubtful


def test_a_stack_of_experts_is_told_by_the_model(tmp_path: Path) -> None:
    """gpt-oss stores (experts, in, out); its biases are no matrices."""
    config = transformers.GptOssConfig(
        vocab_size=60, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    found = of_model(transformers.GptOssForCausalLM(config), tmp_path)
    experts = "model.layers.0.mlp.experts."
    assert found.kinds[f"{experts}gate_up_proj"] is LayerKind.PARAMETER
    assert found.swapped == {f"{experts}gate_up_proj", f"{experts}down_proj"}
    assert f"{experts}gate_up_proj_bias" not in found.kinds
    assert not found.doubtful


def test_without_a_model_a_stack_of_experts_is_in_doubt(tmp_path: Path) -> None:
    """Both orientations can be told by the flag."""
    assert set(learn(tmp_path, experts__up=(4, 8, 6)).doubtful) == {"experts.up"}
    assert learn(tmp_path, {"experts.up": "experts"}, experts__up=(4, 8, 6)).swapped == frozenset()
    assert learn(tmp_path, {"experts.up": "experts-transposed"}, experts__up=(4, 8, 6)).swapped == {"experts.up"}


def test_what_is_told_to_be_full_is_no_matrix(tmp_path: Path) -> None:
    """It is then carried in full."""
    assert not learn(tmp_path, {"*": "full"}, up__weight=(8, 4)).kinds


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"up.weight": "square"}, "no such kind"),
        ({"down.*": "linear"}, "matches no"),
        ({"up.weight": "conv"}, "of that kind"),
    ],
)
def test_a_wrong_word_is_refused(tmp_path: Path, kinds: dict[str, str], message: str) -> None:
    """An unknown kind, a pattern without a match, a shape that cannot be that."""
    with pytest.raises(ReportedError, match=message):
        learn(tmp_path, kinds, up__weight=(8, 4))


def test_code_in_a_models_folder_never_runs(tmp_path: Path) -> None:
    """A class that transformers does not have is no evidence, whatever file stands beside it."""
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["EvilModel"], "auto_map": {"AutoModel": "modeling_evil.EvilModel"}})
    )
    save_file({"q.weight": torch.zeros(4, 4), "q.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert set(learn(tmp_path, q__weight=(4, 4), q__bias=(4,)).doubtful) == {"q.weight"}


def test_a_tensor_that_the_model_does_not_know_is_no_part_of_another(tmp_path: Path) -> None:
    """Old files hold buffers that the model has no more: nothing follows from them for the layers beside."""
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=24,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    model.register_buffer("position_ids", torch.arange(24.0))
    found = of_model(model, tmp_path)
    assert found.names  # the model was asked
    assert not found.fused
