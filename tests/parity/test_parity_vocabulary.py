"""Trainable tokens and vocabularies that have grown: peft on a resized base is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models as models
import torch
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import AdapterFormatError, ShapeMismatch
from surgery.errors import NotMerged

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = ["embed_tokens", "lm_head"]


def made_by_peft(folder: Path, *, size: int | None = None, tied: bool = False, **settings: Any) -> None:
    """Saves a Llama and an adapter that peft made for it, or for it resized; what peft trains is random."""
    models.build("llama", tie_word_embeddings=tied).save_pretrained(folder / "base")
    model = models.load("llama", folder / "base")
    if size:
        model.resize_token_embeddings(size)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], **settings})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "adapter")


def merged_by_peft(folder: Path, size: int | None) -> dict[str, torch.Tensor]:
    """The weights of peft's own merge, into a base that was resized first."""
    model = models.load("llama", folder / "base")
    if size:
        model.resize_token_embeddings(size)
    return peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().state_dict()


CASES: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": [3, 1, 59]},
    "tokens of a tied head": {"trainable_token_indices": [3, 1, 59], "tied": True},
    "tokens by module": {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [5]}},
    "tokens of a grown vocabulary": {"trainable_token_indices": [3, 62], "size": 64},
    "grown": {"size": 64},
    "grown and tied": {"size": 64, "tied": True},
    "grown and adapted": {"size": 64, "target_modules": ["q_proj", *BOTH]},
    "grown and adapted by DoRA": {"size": 64, "target_modules": ["q_proj", *BOTH], "use_dora": True},
    "grown and saved": {"size": 64, "modules_to_save": BOTH},
}


@pytest.mark.parametrize("case", CASES)
def test_merge_equals_peft_merge_into_a_resized_base(tmp_path: Path, case: str) -> None:
    """Rows and full tensors to the bit, adapted weights within 1e-6; the folder loads with its config."""
    size = CASES[case].get("size")
    made_by_peft(tmp_path, **CASES[case])
    report = surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert any("grows from 60 to 64" in note for note in report.notes) is bool(size)
    expected = merged_by_peft(tmp_path, size)
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((tmp_path / "base" / "config.json").read_text()) | {"vocab_size": size or 60}
    model = models.load("llama", tmp_path / "merged")
    logits = models.logits(model)
    model.load_state_dict(expected)
    torch.testing.assert_close(logits, models.logits(model), atol=1e-5, rtol=0)


def test_replaced_rows_come_back_and_a_grown_vocabulary_does_not(tmp_path: Path) -> None:
    """The receipt keeps what rows replaced; a grown vocabulary is refused, as merge had said."""
    for name, settings in (("rows", {"trainable_token_indices": [3, 1]}), ("grown", {"size": 64})):
        (tmp_path / name).mkdir()
        made_by_peft(tmp_path / name, **settings)
        base, adapter, merged = (tmp_path / name / part for part in ("base", "adapter", "merged"))
        surgery.merge(base, adapter, merged)
        if name == "grown":
            with pytest.raises(NotMerged, match=r"replaced \d+ tensors"):
                surgery.unmerge(merged, adapter, tmp_path / "back")
        else:
            back = tmp_path / name / "back"
            surgery.unmerge(merged, adapter, back)
            key = "model.embed_tokens.weight"
            before, after, again = (load_file(each / "model.safetensors")[key] for each in (base, merged, back))
            assert torch.equal(before, again)
            assert not torch.equal(before, after)


def test_a_vocabulary_grows_whole(tmp_path: Path) -> None:
    """An embedding that grows without its head, which peft does not save beside an adapted embedding, is refused; so
    is growth of what is no vocabulary."""
    made_by_peft(tmp_path, size=64, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ShapeMismatch, match="lacks tensors"):
        surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({"base_model.model.lm_head.weight": torch.zeros(64, 32)}, file)
    with pytest.raises(ShapeMismatch, match="another shape"):
        surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("indices", [[3], [3, 3], [3, 60], {"other": [3, 1]}])
def test_rows_that_contradict_the_config_are_refused(tmp_path: Path, indices: object) -> None:
    """Another number of indices, one twice, one beyond the vocabulary, none for this module."""
    made_by_peft(tmp_path, trainable_token_indices=[3, 1])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(AdapterFormatError, match="contradict each other"):
        surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_factors_beside_replaced_rows_are_refused(tmp_path: Path) -> None:
    """peft does not make such an adapter, and no order of the two is said."""
    made_by_peft(tmp_path, trainable_token_indices=[3, 1])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file(load_file(file) | {f"{key}A": torch.zeros(2, 60), f"{key}B": torch.zeros(32, 2)}, file)
    with pytest.raises(AdapterFormatError, match="one embedding has both"):
        surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_dora_on_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    """Its columns would have lengths as an embedding and its rows as a head, in one tensor."""
    made_by_peft(
        tmp_path, tied=True, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True, use_dora=True
    )
    with pytest.raises(AdapterFormatError, match="the base stores one"):
        surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
