"""A plan counts the memory that its methods take: what torch allocates stays within what a step declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_parity_methods import Case, made_by_peft
from torch import nn
from torch.profiler import ProfilerActivity, profile

from formats.paths import open_checkpoint
from surgery.operations.adapters import open_adapters
from surgery.operations.merge_plan import plan_merge
from surgery.operations.unmerge import plan_unmerge
from surgery.plan import Step, Streams

pytestmark = pytest.mark.filterwarnings("ignore")

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
    with open_checkpoint(base) as w0:
        opened = open_adapters(base, adapter, w0.specs)
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
