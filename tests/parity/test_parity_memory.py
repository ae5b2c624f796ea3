"""A plan counts the memory that its methods take: what torch allocates stays within what a step declares."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity_methods import Case, made_by_peft
from torch import nn
from torch.profiler import ProfilerActivity, profile

from formats.dialects.adapterhub_beside import read_beside
from formats.open_files import OpenFiles
from surgery.model.base_model import BaseModel
from surgery.operations.fold.plan import plan_fold
from surgery.operations.merge.adapters import adapter_files, open_adapters
from surgery.operations.merge.plan import plan_merge
from surgery.operations.merge.unmerge import plan_unmerge
from surgery.pipeline.plan import Step, Streams, TakesOver
from surgery.receipts.receipt import MergedAdapter

pytestmark = [pytest.mark.processor, pytest.mark.filterwarnings("ignore")]

HUNGRY = {
    "boft": Case(peft.BOFTConfig, {"boft_block_size": 256, "boft_block_num": 0, "boft_n_butterfly_factor": 1}),
    "fourierft": Case(peft.FourierFTConfig, {"n_frequency": 2000}),
    "gralora": Case(peft.GraloraConfig, {"r": 128, "gralora_k": 4}),
    "lokr": Case(peft.LoKrConfig, {"r": 16, "decompose_factor": 2}),
    "lora": Case(peft.LoraConfig, {"r": 512}),
    "miss bat": Case(peft.MissConfig, {"r": 64, "init_weights": "bat"}, unmerges=False),
    "oft": Case(peft.OFTConfig, {"r": 0, "oft_block_size": 256, "use_cayley_neumann": False}),
    "randlora": Case(peft.RandLoraConfig, {"r": 8, "randlora_alpha": 6}),
    "shira": Case(peft.ShiraConfig, {"r": 200}),
    "supertuning": Case(peft.SupertuningConfig, {"sparsity": 0.5}),
    "vera from its seed": Case(peft.VeraConfig, {"r": 256, "save_projection": False, "projection_prng_key": 5}),
    "waveft": Case(peft.WaveFTConfig, {"n_frequency": 200_000}),
}
FILLS = ("fourierft", "oft", "randlora", "waveft")  # whose need is known well enough to be told from any larger one


class Square(nn.Module):
    """One layer, whose dense float64 copy takes 8 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1024, 1024, bias=False)


@pytest.mark.parametrize("name", HUNGRY)
def test_a_step_takes_no_more_memory_than_it_declares(tmp_path: Path, name: str) -> None:
    """Merging and unmerging one weight; of the largest methods a good part of it is taken too."""
    case = replace(HUNGRY[name], build=Square, targets=("wide",))
    made_by_peft(tmp_path, case)
    base, adapter = tmp_path / "base.st", tmp_path / "adapter"
    with OpenFiles() as files:
        w0 = BaseModel.open(base, files)
        opened = open_adapters(w0, adapter_files(adapter, files), w0.specs)
        plans = [plan_merge(w0, opened)[0]]
        plans += [plan_unmerge(w0, opened, None)] if case.unmerges else []
    tensors = load_file(base) | load_file(adapter / "adapter_model.safetensors")
    for plan in plans:
        (step,) = plan.steps
        inputs = [tensors[ref.name] for ref in step.inputs]
        held = inputs[1:] if isinstance(step.op, Streams) else inputs
        taken = most_allocated(lambda step=step, inputs=inputs: run(step, inputs))
        declared = step.nbytes - sum(tensor.nbytes for tensor in held)
        assert taken <= declared
        assert name not in FILLS or taken > 0.4 * declared


@pytest.mark.parametrize(
    ("f", "parallel"), [("linear", False), ("relu", False), ("gelu", True), ("linear", True), ("compacter", False)]
)
def test_folding_takes_no_more_memory_than_it_declares(tmp_path: Path, f: str, parallel: bool) -> None:
    """Folded, half-folded, widened; a compacter's dense form."""
    path, width, inner, rank = "encoder.layer.0", 512, 2048, 128
    base = {f"{path}.{name}.dense.weight": torch.randn(out, into) for name, out, into in mlp(width, inner)}
    base |= {f"{path}.{name}.dense.bias": torch.randn(out) for name, out, _ in mlp(width, inner)}
    base[f"{path}.output.LayerNorm.weight"] = torch.ones(width)
    module = f"{path}.output.adapters.a"
    own = {"output_adapter": True, "reduction_factor": 4, "is_parallel": parallel, "non_linearity": f}
    adapter = {}
    for name, out, into in (("adapter_down.0", rank, width), ("adapter_up", width, rank)):
        if f == "compacter":
            own |= {"non_linearity": "linear", "phm_layer": True}
            adapter["shared_parameters.a.phm_rule"] = torch.randn(4, 4, 4)
            adapter[f"{module}.{name}.W_left"] = torch.randn(4, into // 4, 1)
            adapter[f"{module}.{name}.W_right"] = torch.randn(4, 1, out // 4)
            adapter[f"{module}.{name}.b"] = torch.randn(out)
        else:
            adapter |= {f"{module}.{name}.weight": torch.randn(out, into), f"{module}.{name}.bias": torch.randn(out)}
    save_file(base, tmp_path / "base.st")
    save_file(adapter, tmp_path / "adapter.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "gelu", "intermediate_size": inner}))
    with OpenFiles() as files:
        w0 = BaseModel.open(tmp_path / "base.st", files)
        parts = read_beside(files.checkpoint(tmp_path / "adapter.safetensors"), {"config": own}, w0.specs)
        plan = plan_fold(w0, parts, MergedAdapter("0", 1.0, {})).plan
    tensors, tried = base | adapter, 0
    for step in plan.steps:
        if isinstance(step.op, TakesOver):
            continue
        inputs, tried = [tensors[ref.name] for ref in step.inputs], tried + 1
        taken = most_allocated(lambda step=step, inputs=inputs: step.op(*inputs))
        assert taken <= step.nbytes - sum(tensor.nbytes for tensor in inputs), step.name
    assert tried


def mlp(width: int, inner: int) -> list[tuple[str, int, int]]:
    """Of an MLP: name, outputs, inputs."""
    return [("intermediate", inner, width), ("output", width, inner)]


def run(step: Step, inputs: list[torch.Tensor]) -> object:
    """The step's work, in pieces where the engine would do it so."""
    if not isinstance(step.op, Streams):
        return step.op(*inputs)
    flat = inputs[0].view(-1)
    return step.op.streamed(
        lambda begin, count: flat[begin : begin + count], tuple(inputs[1:]), lambda begin, tensor: None
    )


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch held at once of those it allocated meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert result is not None
    return int(steps.cumsum(0).max())
