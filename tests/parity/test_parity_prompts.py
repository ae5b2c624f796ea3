"""peft's prompts, p-tuning and prefixes: from what fold leaves for the graph, what peft's models give is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import build, load

import surgery
from formats.grafts import PrefixGraft, PromptGraft, read_grafts, tensor_names
from formats.paths import open_checkpoint
from surgery.operations.fold.verdicts import Way

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS: dict[str, Any] = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "p-tuning": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=3, encoder_hidden_size=8, encoder_num_layers=1
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix by a network": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
}
TASKS = {"bert": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM"}
IDS = torch.tensor([[1, 5, 2, 9, 7]])


def left(folder: Path) -> list[Any]:
    """What stays in the graph, each with its tensors."""
    with open_checkpoint(folder / "grafts.safetensors") as checkpoint:
        return [
            (site, {role: checkpoint.read(name) for role, name in tensor_names(site).items()})
            for site in read_grafts(checkpoint).sites
        ]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_or_prefix_of_peft_is_left_for_the_graph(tmp_path: Path, kind: str, name: str) -> None:
    """With the values that peft's own model uses."""
    base = build(kind) if kind == "gpt2" else build(kind).bert
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base, CONFIGS[name](TASKS[kind])).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        own = adapted.get_prompt(1)
        expected = adapted(input_ids=IDS, attention_mask=torch.ones_like(IDS))[0]
    report = surgery.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {each.way for each in report.verdicts} == {Way.GRAPH}
    sites = left(tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out") if kind == "bert" else load(kind, tmp_path / "out")
    model = model.eval()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == base.state_dict().keys() - {"lm_head.weight"}
    if "prefix" in name:
        from transformers import DynamicCache

        cache = DynamicCache()
        for site, tensors in sites:
            assert isinstance(site, PrefixGraft)
            assert site.moves_positions
            heads = [tensors[role].view(3, 2, 16).transpose(0, 1)[None] for role in ("keys", "values")]
            cache.update(*heads, site.layer)
        if kind == "bert":  # transformers' encoders take no cache: what peft would give them is compared instead
            for mine, (keys, values, *_) in zip(cache.layers, own, strict=True):
                torch.testing.assert_close(mine.keys, keys, atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(mine.values, values, atol=1e-6, rtol=1e-5)
            return
        with torch.no_grad():
            found = model(input_ids=IDS, past_key_values=cache)[0]
    else:
        ((site, tensors),) = sites
        assert isinstance(site, PromptGraft)
        assert site.among_words
        words = model.get_input_embeddings()(IDS)
        with torch.no_grad():
            found = model(inputs_embeds=torch.cat([tensors["embedding"][None], words], dim=1))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_head_trained_beside_a_prompt_replaces_the_base_s(tmp_path: Path) -> None:
    """As peft saves a classifier's; a base without one is refused."""
    base = build("bert")
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, CONFIGS["prompt"]("SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "classifier" in name:
                parameter.add_(1)
    adapted.save_pretrained(tmp_path / "adapter")
    report = surgery.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(each.way for each in report.verdicts) == [Way.FOLDED, Way.FOLDED, Way.GRAPH]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(after["classifier.bias"], before["classifier.bias"] + 1)
    build("bert").bert.save_pretrained(tmp_path / "headless")
    with pytest.raises(surgery.ReportedError, match="match nothing in the base"):
        surgery.fold(tmp_path / "headless", tmp_path / "adapter", tmp_path / "again")


def test_a_prompt_of_another_width_is_refused(tmp_path: Path) -> None:
    """With both sizes."""
    base = build("gpt2")
    base.save_pretrained(tmp_path / "base")
    peft.get_peft_model(base, CONFIGS["prefix"]("CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_virtual_tokens": 3', '"num_virtual_tokens": 4'))
    with pytest.raises(surgery.ReportedError, match="does not fit the base"):
        surgery.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
