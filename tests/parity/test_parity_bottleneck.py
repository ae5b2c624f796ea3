"""AdapterHub's bottlenecks, prefixes and prompts, as tests/golden/make_bottleneck.py made them with the library itself:
what is read is enough to compute what the library's adapted models give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

from formats.dialects import open_adapter_file
from formats.dialects.adapterhub_beside import read_beside
from formats.dialects.bottleneck import Bottleneck, Bottlenecks, Dense, Hypercomplex
from formats.dialects.prompts import Network, Prefix, Prompt
from formats.errors import AdapterFormatError, ReportedError, ShapeMismatch, UnmatchedKeys
from formats.open_files import OpenFiles
from formats.paths import open_checkpoint
from formats.spec import TensorRef

WRITTEN = GOLDEN / "bottleneck"

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "swish": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "linear": lambda x: x,
    "tanh": torch.tanh,
}
BOTTLENECKS = ["compacter", "compacter++", "double_seq_bn", "double_seq_bn_linear", "par_bn", "scaled_par_bn", "seq_bn"]


def read(model: str, adapter: Path) -> Any:
    """An adapter of a golden model."""
    with OpenFiles() as files:
        opened, base = open_adapter_file(adapter, files), files.checkpoint(WRITTEN / model / "base.st")
        assert opened.config is not None
        (part,) = read_beside(opened.checkpoint, opened.config, base.specs)
        return part


def built(model: str) -> nn.Module:
    """transformers' golden model."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    if model == "bert":
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        loaded: nn.Module = BertModel(BertConfig(**sizes, vocab_size=16, max_position_embeddings=16))
    else:
        loaded = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16))
    loaded.load_state_dict(load_file(WRITTEN / model / "base.st"))
    return loaded.eval()


def tensor(ref: TensorRef) -> torch.Tensor:
    """A tensor of an adapter's file."""
    with open_checkpoint(ref.checkpoint.path) as checkpoint:
        return checkpoint.read(ref.name)


def projected(x: torch.Tensor, by: Dense | Hypercomplex) -> torch.Tensor:
    """What a projection makes of x."""
    if isinstance(by, Dense):
        return nn.functional.linear(x, tensor(by.weight), tensor(by.bias))
    rule, left, right = (tensor(ref) for ref in (by.rule, by.left, by.right))
    matrix = sum(torch.kron(one, a @ b) for one, a, b in zip(rule, left, right, strict=True))
    assert by.bias is not None
    return x @ matrix + tensor(by.bias)


def placed(model: nn.Module, adapter: Bottlenecks, one: Bottleneck) -> None:
    """Puts a bottleneck into a model, by hooks."""
    behind = model.get_submodule(one.behind.removesuffix(".weight"))
    residuals: list[torch.Tensor] = []
    holder, _, last = one.behind.removesuffix(".weight").rpartition(".")
    if last == "dense":  # BERT's modules get the residual as their second input
        source, place = model.get_submodule(holder), 1
    else:
        block, _, part = holder.rpartition(".")
        source, place = model.get_submodule(block if part == "attn" else f"{block}.ln_2"), 0
    source.register_forward_pre_hook(lambda module, args: residuals.append(args[place]))

    def adapted(module: nn.Module, args: Any, h: torch.Tensor) -> torch.Tensor:
        r = residuals.pop()
        x, to = h, h
        if adapter.parallel:
            x = r
        elif adapter.original_ln_before:
            x = h + r if one.norm is None else model.get_submodule(one.norm.removesuffix(".weight"))(h + r)
            to = {True: h, False: x, "post_add": h + r}[adapter.residual_before_ln]
        scaling = tensor(one.scaling) if isinstance(one.scaling, TensorRef) else one.scaling
        return to + scaling * projected(ACTIVATIONS[adapter.non_linearity](projected(x, one.down)), one.up)

    behind.register_forward_hook(adapted)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_bottlenecks_give_what_the_library_gives(model: str, name: str) -> None:
    """At the places that were read, with the settings that were read."""
    adapter = read(model, WRITTEN / model / name)
    assert adapter.original_ln_after
    one_a_layer = name in ("seq_bn", "par_bn", "scaled_par_bn", "compacter++")
    layers = [1] if name == "compacter++" else [0, 1]
    places = ["output_adapter"] if one_a_layer else ["mh_adapter", "output_adapter"]
    assert [(each.layer, each.place) for each in adapter.modules] == [(n, place) for n in layers for place in places]
    loaded = built(model)
    for one in adapter.modules:
        placed(loaded, adapter, one)
    golden = load_file(WRITTEN / model / name / "outputs.st")
    with torch.no_grad():
        found = loaded(golden["input_ids"]).last_hidden_state
    torch.testing.assert_close(found, golden["last_hidden_state"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_the_weights_around_a_bottleneck_are_the_base_s(model: str) -> None:
    """Those that a fold would change or read."""
    (first, second) = (read(model, WRITTEN / model / name).modules[0] for name in ("double_seq_bn", "seq_bn"))
    base = load_file(WRITTEN / model / "base.st")
    assert first.place == "mh_adapter"
    assert first.first is None
    assert second.first is not None
    assert {first.behind, second.behind, second.first} <= set(base)
    assert all((each.norm in base) if model == "bert" else each.norm is None for each in (first, second))


@pytest.mark.parametrize("name", ["prefix_tuning", "prefix_tuning_flat"])
def test_a_prefix_is_keys_and_values_before_the_others(name: str) -> None:
    """As a cache that GPT-2 begins with; positions count the input's own."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in prefix_states(read("gpt2", WRITTEN / "gpt2" / name)).items():
        cache.update(keys, values, layer)
    golden = load_file(WRITTEN / "gpt2" / name / "outputs.st")
    ids = golden["input_ids"]
    with torch.no_grad():
        positions = torch.arange(ids.shape[1]).view(1, -1)
        found = built("gpt2")(ids, past_key_values=cache, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found, golden["last_hidden_state"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["prefix_tuning", "prefix_tuning_flat"])
def test_a_prefix_of_an_encoder_is_read_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has it under the layers' names too; these copies are left aside."""
    states = iter(prefix_states(read("bert", WRITTEN / "bert" / name)).values())
    attention = nn.functional.scaled_dot_product_attention

    def prefixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
        assert how["attn_mask"] is None
        keys, values = next(states)
        return attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), **how)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", prefixed)
    golden = load_file(WRITTEN / "bert" / name / "outputs.st")
    with torch.no_grad():
        found = built("bert")(golden["input_ids"]).last_hidden_state
    torch.testing.assert_close(found, golden["last_hidden_state"], atol=1e-5, rtol=1e-5)


def prefix_states(adapter: Prefix) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (1, heads, length, 4) of every layer."""
    values = adapter.values
    if isinstance(values, Network):
        inner = ACTIVATIONS[values.non_linearity](projected(tensor(values.embedding), values.first))
        flat = projected(inner, values.second)
    else:
        flat = tensor(values)
    states = flat.view(1, adapter.length, len(adapter.layers) * 2, 2, 4).permute(2, 0, 3, 1, 4)
    return {layer: (states[2 * n], states[2 * n + 1]) for n, layer in enumerate(adapter.layers)}


def test_a_prompt_is_embeddings_before_the_others() -> None:
    """Behind BERT's embeddings, norm included."""
    adapter: Prompt = read("bert", WRITTEN / "bert" / "prompt_tuning")
    assert not adapter.after_first
    loaded = built("bert")
    prompt = tensor(adapter.embedding)[None]
    loaded.get_submodule("embeddings").register_forward_hook(lambda module, args, h: torch.cat([prompt, h], dim=1))
    golden = load_file(WRITTEN / "bert" / "prompt_tuning" / "outputs.st")
    with torch.no_grad():
        found = loaded(golden["input_ids"]).last_hidden_state
    torch.testing.assert_close(found, golden["last_hidden_state"], atol=1e-5, rtol=1e-5)


def edited(folder: Path, source: Path, change: Callable[[dict[str, torch.Tensor]], None], **settings: Any) -> Path:
    """A copy of an adapter with other tensors and settings."""
    copy = folder / "adapter"
    shutil.copytree(source, copy)
    tensors = load_file(copy / "adapter.safetensors")
    change(tensors)
    save_file(tensors, copy / "adapter.safetensors")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["config"] |= settings
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


LAYER = "encoder.layer.0.output.adapters.style"


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Takes tensors away."""
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(names)] and None


@pytest.mark.parametrize(
    ("name", "change", "settings", "kind", "message"),
    [
        ("seq_bn", without(f"{LAYER}.adapter_up.weight"), {}, AdapterFormatError, "a part of the adapter is missing"),
        ("seq_bn", without(LAYER), {}, AdapterFormatError, "disagree about a bottleneck"),
        ("seq_bn", without(), {"leave_out": [0]}, AdapterFormatError, "disagree about a bottleneck"),
        ("seq_bn", without(), {"reduction_factor": 4}, ShapeMismatch, "does not fit the base"),
        ("seq_bn", without(), {"reduction_factor": {"0": 2}}, AdapterFormatError, "no valid reduction factor"),
        ("seq_bn", without(), {"use_gating": True}, AdapterFormatError, "depends on the input"),
        ("seq_bn", without(), {"inv_adapter": "nice"}, AdapterFormatError, "invertible"),
        ("seq_bn", without(), {"architecture": "reft"}, AdapterFormatError, "not an adapter of bottlenecks"),
        ("seq_bn", without(), {"architecture": "prefix_tuning"}, AdapterFormatError, "another method"),
        ("scaled_par_bn", without(), {"scaling": 4.0}, AdapterFormatError, "belong to no part"),
        ("par_bn", without(), {"scaling": "learned"}, AdapterFormatError, "a part of the adapter is missing"),
        ("compacter", without("bert.shared_parameters"), {}, AdapterFormatError, "from a model with a head"),
        ("seq_bn", without(), {"non_linearity": None}, AdapterFormatError, "lacks a setting"),
        ("prompt_tuning", without(), {"prompt_length": "4"}, AdapterFormatError, "lacks a setting"),
        ("prompt_tuning", without(), {"prompt_length": 4}, ShapeMismatch, "does not fit the base"),
    ],
)
def test_what_is_not_whole_or_known_is_refused(
    tmp_path: Path,
    name: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    settings: dict[str, Any],
    kind: type[ReportedError],
    message: str,
) -> None:
    """With the reason."""
    adapter = edited(tmp_path, WRITTEN / "bert" / name, change, **settings)
    with pytest.raises(kind, match=message):
        read("bert", adapter)


def test_another_model_s_adapter_is_refused() -> None:
    """By the names of its layers, or by its prefix's size."""
    with pytest.raises(UnmatchedKeys):
        read("gpt2", WRITTEN / "bert" / "seq_bn")
