"""Initialisations of LoRA that change the base: refused as they are, merged once peft has converted them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from peft_oracle import random
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from formats.errors import AdapterFormatError

pytestmark = pytest.mark.filterwarnings("ignore")


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 8)."""
        return self.down(self.up(x))


def trained(folder: Path, init: str, converted: bool) -> peft.PeftModel:
    """Saves a base and an adapter of this initialisation that was trained on."""
    torch.manual_seed(0)
    model = Two().eval()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "base.st")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], init_lora_weights=init)
    adapted = peft.get_peft_model(model, config).eval()
    if converted:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(folder / "first")
        adapted.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(random(*parameter.shape))
    initial = str(folder / "first") if converted else None
    adapted.save_pretrained(folder / "adapter", path_initial_model_for_weight_conversion=initial)
    return adapted


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_converted_adapters_merge_into_the_original_base(tmp_path: Path, init: str) -> None:
    """The rank is doubled and init_lora_weights true; the base itself was rounded once more by peft."""
    adapted = trained(tmp_path, init, converted=True)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged.st").items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_unconverted_adapters_are_refused(tmp_path: Path, init: str) -> None:
    """Added to the original they would count the first BA twice."""
    adapted = trained(tmp_path, init, converted=False)
    with pytest.raises(AdapterFormatError, match="initialisation changed its base") as caught:
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    assert "path_initial_model_for_weight_conversion" in caught.value.details["next"]
    residual = adapted.unload().state_dict()  # what peft left of the base
    base = load_file(tmp_path / "base.st")
    assert (residual["up.weight"] - base["up.weight"]).abs().max() > 1e-2


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq"])
def test_those_that_need_data_or_quantisation_are_refused_by_their_config(tmp_path: Path, init: str) -> None:
    """Each with what to do instead: peft converts all but LoftQ's."""
    trained(tmp_path, "gaussian", converted=False)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(AdapterFormatError, match="initialisation changed its base") as caught:
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    assert ("LoftQ" if init == "loftq" else "converted") in caught.value.details["next"]


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", "eva"])
def test_initialisations_that_leave_the_base_alone_merge_as_they_are(tmp_path: Path, init: str) -> None:
    """As peft merges them."""
    adapted = trained(tmp_path, init, converted=False)
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged.st").items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max()
