"""Checks that a graph with bottlenecks, prefixes or prompts in it computes the same as the model with these adapters.

transformers loads the model in torch. Bottlenecks are added to it by hooks, prefixes by a custom attention, prompts as
embeddings. ONNX Runtime runs the graph with its payload on the CPU, on the same random inputs. So the model's own
weights are compared at the same time. The payload is passed as open files, as in `against_torch.model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from formats.grafts import BranchGraft, Graft, PrefixGraft, PromptGraft, tensor_names
from formats.spec import DType
from surgery.errors import Unsupported, VerificationFailed
from surgery.model.meta_model import known_names
from surgery.onnx.adapters.sites import positions_taken, tokens_added
from surgery.onnx.against_torch.model import Verification, distance, limit_of, relative, sessions
from surgery.onnx.against_torch.torch_hooks import attach_branch
from surgery.onnx.trace.architecture import quiet
from surgery.onnx.trace.program import Exportable
from surgery.onnx.trace.single_pass import SinglePass

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]  # the grafts' tensors, by name

_ATTENTION = "surgery_prefixed"


def check_grafted(
    model: Exportable,
    graphs: Mapping[str, bytes],
    payload: Mapping[str, int],
    dtype: DType,
    sites: Sequence[Graft],
    tensors: Tensors,
) -> Verification:
    """Compares torch with ONNX Runtime.

    Args:
        model: the model, whose kind must be a single pass.
        graphs: the grafted graph, by its prefix.
        payload: descriptors of the weights' files, open for reading, by the names that the graphs use.
        dtype: the dtype in which the graph computes.
        sites: the grafts in the graph.
        tensors: the grafts' tensors.

    Raises:
        VerificationFailed: the outputs differ by more than rounding explains, or one of them is not finite.
        Unsupported: the graph does not load, or the model lacks a module that a graft names.
    """
    import numpy as np

    kind = model.kind
    assert isinstance(kind, SinglePass)  # the caller has checked this
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    added, taken = tokens_added(sites, shapes), positions_taken(sites, shapes)
    tokens = {each.name for each in kind.program.inputs if each.axes[1:] == ("sequence",)}
    most = max(1, kind.longest - taken)
    feeds = [
        {name: array[:, :most] if name in tokens else array for name, array in feed.items()} for feed in kind.feeds(0)
    ]
    expected = _run_torch(model.load(dtype), sites, tensors, feeds)
    sizes: dict[str, tuple[float, float]] = {}  # for each output: the difference and the largest value
    with sessions(model, graphs, payload) as runtime:
        for feed, theirs in zip(feeds, expected, strict=True):
            ours = runtime.run("", feed)
            mask = feed.get("attention_mask", np.ones((1, 0)))
            valid = np.pad(mask, ((0, 0), (added, 0)), constant_values=1).astype(bool)  # (batch, tokens)
            for (name, output), reference in zip(ours.items(), theirs, strict=True):
                per_token = "attention_mask" in feed and reference.shape[:2] == valid.shape and reference.ndim > 2
                difference, scale = distance(reference, output, valid if per_token else None)
                before = sizes.get(name, (0.0, 0.0))
                sizes[name] = (max(before[0], difference), max(before[1], scale))
        nodes = runtime.nodes_run()
    worst, where = max((relative(*size), name) for name, size in sizes.items())
    largest = max(difference for difference, _ in sizes.values())
    limit = limit_of(dtype, graphs)
    if not worst <= limit:
        raise VerificationFailed(
            "the graph's outputs differ from those of the model with its adapter; nothing was written",
            where=f"{model.where}: {where}",
            expected=f"a relative difference of at most {limit:.2g}",
            found=f"{worst:.2g} (absolute {largest:.2g})",
            then="please report the model's class and the adapter's config",
        )
    tried = tuple(tuple(map(int, next(iter(feed.values())).shape)) for feed in feeds)
    return Verification(tried, largest, worst, where, limit, None, nodes)


def _run_torch(model: Any, sites: Sequence[Graft], tensors: Tensors, feeds: Sequence[Any]) -> list[list[Any]]:
    import torch

    bottlenecks = [site for site in sites if isinstance(site, BranchGraft)]
    for site in bottlenecks:
        own = {role: tensors[name] for role, name in tensor_names(site).items()}
        attach_branch(model, in_module(site, model), own)
    prefixes = {site.layer: site for site in sites if isinstance(site, PrefixGraft)}
    if prefixes:
        _attend_to_prefixes(model, {n: (tensors[site.keys], tensors[site.values]) for n, site in prefixes.items()})
    moved = positions_taken([*prefixes.values()], {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    outputs = []
    with torch.no_grad(), quiet():
        for feed in feeds:
            given = {name: torch.from_numpy(array.copy()) for name, array in feed.items()}
            if moved:
                given["position_ids"] = _positions(model, given["input_ids"], moved)
            with _prompted(model, given, sites, tensors) as longer:
                result = model(**longer)
            outputs.append([tensor.numpy() for tensor in result.to_tuple() if isinstance(tensor, torch.Tensor)])
    return outputs


def _positions(model: Any, ids: torch.Tensor, moved: int) -> torch.Tensor:
    """The positions of tokens after `moved` others; RoBERTa counts them without padding.  # (1 or batch, sequence)"""
    import torch

    embeddings = getattr(model.base_model, "embeddings", None)
    count = getattr(embeddings, "create_position_ids_from_input_ids", None)
    if count is None:
        return torch.arange(moved, moved + ids.shape[1])[None]
    found: torch.Tensor = count(ids, model.config.pad_token_id, moved)
    return found


def in_module(site: BranchGraft, model: Any) -> BranchGraft:
    """The site under the torch module's names, which may differ from the file's. Raises Unsupported if the model has no
    such module."""
    wanted = [f"{name}.weight" for name in (site.module, site.norm) if name]
    known = {name: new.removesuffix(".weight") for name, new in known_names(model, wanted)[0].items()}
    if len(known) < len(wanted):
        raise Unsupported("the model has no such module", where=wanted[0], then="report the model's class")
    module, *norm = (known[name] for name in wanted)
    return replace(site, module=module, norm=norm[0] if norm else None)


def _attend_to_prefixes(model: Any, prefixes: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Gives a model an attention that puts keys and values (length, width), by layer number, before its own."""
    import torch
    from torch.nn import functional
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    numbered = ((module, re.search(r"\.(\d+)\.", name)) for name, module in model.named_modules())
    layers = {module: int(match[1]) for module, match in numbered if match}

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **how: Any) -> Any:
        batch, heads, _, size = key.shape
        own = prefixes.get(layers[module])
        if own is not None:
            before = [each.view(-1, heads, size).transpose(0, 1).expand(batch, -1, -1, -1) for each in own]
            key, value = (torch.cat(pair, 2) for pair in zip(before, (key, value), strict=True))
            if attention_mask is not None:
                attention_mask = functional.pad(attention_mask, (len(own[0]), 0))
        groups = query.shape[1] // heads  # number of queries that share a key
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        found = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=how.get("scaling")
        )  # (batch, heads, sequence, size)
        return found.transpose(1, 2), None

    AttentionInterface.register(_ATTENTION, attend)  # type: ignore[no-untyped-call, unused-ignore]
    AttentionMaskInterface.register(_ATTENTION, eager_mask)  # type: ignore[no-untyped-call, unused-ignore]
    model.set_attn_implementation(_ATTENTION)


@contextmanager
def _prompted(
    model: Any, given: dict[str, torch.Tensor], sites: Sequence[Graft], tensors: Tensors
) -> Iterator[dict[str, Any]]:
    """The inputs of a model for an input with prompts. Inside the context, the model's embeddings include the
    prompts."""
    import torch
    from torch.nn import functional

    hooks = []
    for site in sites:
        if not isinstance(site, PromptGraft):
            continue
        prompt, first = tensors[site.embedding], int(site.after_first)

        def joined(h: torch.Tensor, prompt: torch.Tensor = prompt, first: int = first) -> torch.Tensor:
            return torch.cat([h[:, :first], prompt.expand(len(h), -1, -1), h[:, first:]], 1)

        given = dict(given)
        if "attention_mask" in given:
            given["attention_mask"] = functional.pad(given["attention_mask"], (len(prompt), 0), value=1)
        if site.among_words:
            given["inputs_embeds"] = joined(model.get_input_embeddings()(given.pop("input_ids")))
            if "token_type_ids" in given:
                given["token_type_ids"] = functional.pad(given["token_type_ids"], (len(prompt), 0))
        else:
            inside = model.base_model.get_submodule("embeddings")
            hooks.append(inside.register_forward_hook(lambda module, args, h, joined=joined: joined(h)))
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()
