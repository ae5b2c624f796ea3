"""Adds bottlenecks to a transformers model in torch by hooks. This is the reference for what grafts mean.

It is used for measuring and for tests; ONNX graphs get their bottlenecks elsewhere. It supports the models that the
readers support.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from formats.grafts import BranchGraft, Value
from formats.layers import owner
from surgery.methods.activations import function

if TYPE_CHECKING:
    import torch
    from torch import nn

_NORMS = ("ln_2", "layernorm_after", "post_attention_layernorm")  # what reads the residual of an MLP, if not the MLP


def attach_branch(model: nn.Module, site: BranchGraft, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts a bottleneck into a model.

    Args:
        model: a model that has the modules that the site names.
        site: the bottleneck and its place.
        tensors: down (rank, in), down_bias (rank), up (out, rank) and up_bias (out), in the model's dtype.
    """
    from torch.nn import functional

    residuals: list[torch.Tensor] = []
    if site.reads not in (Value.INPUT, Value.PRODUCT) and {site.reads, site.adds_to} != {Value.OUTPUT}:
        source, number = _residual(model, site.module)
        source.register_forward_pre_hook(lambda module, args: residuals.append(args[number]))
    norm = None if site.norm is None else model.get_submodule(site.norm)
    f = function(site.non_linearity)

    def adapted(module: nn.Module, args: Any, h: torch.Tensor) -> torch.Tensor:
        values = {Value.INPUT: args[0], Value.OUTPUT: h}
        if site.reads is Value.PRODUCT:
            values[Value.PRODUCT] = h - module.get_parameter("bias")
        if residuals:
            r = residuals.pop()
            values |= {Value.RESIDUAL: r, Value.SUM: h + r}
            if norm is not None:
                values[Value.NORMED] = norm(h + r)
        z = functional.linear(values[site.reads], tensors["down"], tensors["down_bias"])
        added: torch.Tensor = values[site.adds_to] + functional.linear(f(z), tensors["up"], tensors["up_bias"])
        return added

    model.get_submodule(site.module).register_forward_hook(adapted)


def _residual(model: nn.Module, projection: str) -> tuple[nn.Module, int]:
    """The module, and the index of its argument, that gives the residual that is added to a projection's output."""
    holder = owner(projection)
    block = owner(holder)
    if projection.endswith(".dense"):  # BERT's modules get the residual as their second input
        return model.get_submodule(holder), 1
    if holder.endswith((".attn", ".attention", ".self_attn")):
        return model.get_submodule(block), 0
    norms = (getattr(model.get_submodule(block), name, None) for name in _NORMS)
    return next((norm for norm in norms if norm is not None), model.get_submodule(holder)), 0
