"""How ComfyUI reads an adapter, restated from its comfy/lora.py and comfy/weight_adapter (late 2026): it cannot be
installed. For each of the model's weights it asks the file for every kind of factor under the weight's own name, takes
what it knows, and logs the keys that are left; a product it adds as a matrix, whatever the layer.
"""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def patched(model: Tensors, adapter: Tensors) -> tuple[Tensors, set[str]]:
    """The weights with an adapter at strength 1, and the adapter's keys that nobody asked for."""
    asked: set[str] = set()
    result = {name: tensor.clone() for name, tensor in model.items()}
    for name, weight in model.items():
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            _patch(result, weight, f"diffusion_model.{layer}", layer, _Asking(adapter, asked))
    return result, set(adapter) - asked


class _Asking:
    def __init__(self, adapter: Tensors, asked: set[str]) -> None:
        self.adapter, self.asked = adapter, asked

    def __call__(self, key: str) -> torch.Tensor | None:
        if key not in self.adapter:
            return None
        self.asked.add(key)
        return self.adapter[key]


def _patch(result: Tensors, weight: torch.Tensor, key: str, layer: str, ask: _Asking) -> None:
    number, magnitude = ask(f"{key}.alpha"), ask(f"{key}.dora_scale")
    alpha = None if number is None else number.item()
    for kind in (_lora, _loha, _lokr, _glora, _turned):
        changed = kind(key, weight, alpha, ask)
        if changed is None:
            continue
        delta, scale = changed
        if magnitude is None:
            result[f"{layer}.weight"] = weight + scale * delta
        else:  # its fault: the base's length, where those who train DoRA take that of the sum
            length = weight.flatten(1).norm(dim=1).view(-1, *(1 for _ in weight.shape[1:]))
            result[f"{layer}.weight"] = (weight + scale * delta) * (magnitude / (length + torch.finfo().eps))
    norm = ask(f"{key}.w_norm")
    if norm is not None:
        result[f"{layer}.weight"] = weight + norm
        bias = ask(f"{key}.b_norm")
        if bias is not None:
            result[f"{layer}.bias"] = result[f"{layer}.bias"] + bias
    for suffix, tensor in (("diff", "weight"), ("diff_b", "bias")):
        diff = ask(f"{key}.{suffix}")
        if diff is not None:
            result[f"{layer}.{tensor}"] = result[f"{layer}.{tensor}"] + diff


Change = tuple[torch.Tensor, float] | None


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _lora(key: str, weight: torch.Tensor, alpha: float | None, ask: _Asking) -> Change:
    up = ask(f"{key}.lora_up.weight")
    if up is None:
        return None
    down, mid = ask(f"{key}.lora_down.weight"), ask(f"{key}.lora_mid.weight")
    assert down is not None
    scale = _scale(alpha, down.shape[0])
    if mid is not None:
        down = torch.einsum("ri,srkl->sikl", down.flatten(1), mid)
    return (up.flatten(1) @ down.flatten(1)).reshape(weight.shape), scale


def _loha(key: str, weight: torch.Tensor, alpha: float | None, ask: _Asking) -> Change:
    factors = [ask(f"{key}.hada_{role}") for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
    w1a, w1b, w2a, w2b, t1, t2 = factors
    if w1a is None or w1b is None or w2a is None or w2b is None:
        return None
    if t1 is not None and t2 is not None:
        one = torch.einsum("ijkl,jr,ip->prkl", t1, w1b, w1a)
        other = torch.einsum("ijkl,jr,ip->prkl", t2, w2b, w2a)
    else:
        one, other = w1a @ w1b, w2a @ w2b
    return (one * other).reshape(weight.shape), _scale(alpha, w1b.shape[0])


def _lokr(key: str, weight: torch.Tensor, alpha: float | None, ask: _Asking) -> Change:
    w1, w1a, w1b = (ask(f"{key}.lokr_w1{end}") for end in ("", "_a", "_b"))
    w2, w2a, w2b = (ask(f"{key}.lokr_w2{end}") for end in ("", "_a", "_b"))
    core, rank = ask(f"{key}.lokr_t2"), None
    if w1a is not None and w1b is not None:
        w1, rank = w1a @ w1b, w1b.shape[0]
    if w2a is not None and w2b is not None:
        w2 = w2a @ w2b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, w2b, w2a)
        rank = w2b.shape[0]
    if w1 is None or w2 is None:
        return None
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1, w2.contiguous()).reshape(weight.shape), 1.0 if rank is None else _scale(alpha, rank)


def _glora(key: str, weight: torch.Tensor, alpha: float | None, ask: _Asking) -> Change:
    factors = [ask(f"{key}.{role}.weight") for role in ("a1", "a2", "b1", "b2")]
    if any(factor is None for factor in factors):
        return None
    a1, a2, b1, b2 = (factor.flatten(1) for factor in factors if factor is not None)
    inputs = torch.einsum("oi...,ij->oj...", torch.einsum("oi...,ij->oj...", weight, a1), a2)
    return inputs + (b1 @ b2).reshape(weight.shape), _scale(alpha, a2.shape[0])


def _turned(key: str, weight: torch.Tensor, alpha: float | None, ask: _Asking) -> Change:
    """OFT and BOFT; the constraint is alpha as it stands, OFT's rescale is read and left aside."""
    blocks, rescale = ask(f"{key}.oft_blocks"), ask(f"{key}.rescale")
    if blocks is None:
        return None
    skew = blocks - blocks.mT
    if blocks.dim() == 4 and alpha is None:
        return None  # an error in its log
    length = skew.norm() + 1e-8
    if alpha and length > alpha:
        skew = skew * alpha / length
    one = torch.eye(blocks.shape[-1])
    turns = (one + skew) @ torch.linalg.inv(one - skew)
    if blocks.dim() == 3:
        parts = weight.view(*blocks.shape[:2], *weight.shape[1:])
        return torch.einsum("knm,kn...->km...", turns, parts).reshape(weight.shape) - weight, 1.0
    made, half = weight, blocks.shape[-1] // 2
    for level, turn in enumerate(turns):
        made = made.unflatten(0, (-1, 2, half << level)).transpose(1, 2).flatten(0, 2)
        made = torch.einsum("bij,bj...->bi...", turn, made.unflatten(0, (-1, blocks.shape[-1]))).flatten(0, 1)
        made = made.unflatten(0, (-1, half << level, 2)).transpose(1, 2).flatten(0, 2)
    return (made if rescale is None else made * rescale) - weight, 1.0
