"""What kind of layer a weight belongs to, from names and shapes."""

from __future__ import annotations

from formats import DType, TensorSpec
from formats.layers import LayerKind, layer_kinds


def kinds(**shapes: tuple[int, ...]) -> dict[str, LayerKind]:
    """Layer kinds of a model given by shapes; `__` stands for a dot."""
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return layer_kinds({name: TensorSpec(name, DType.F32, shape) for name, shape in names.items()})


def test_the_bias_tells_which_side_is_the_output() -> None:
    """(out, in) with a bias of out is linear, (in, out) is GPT-2's Conv1D."""
    found = kinds(a__weight=(6, 4), a__bias=(6,), b__weight=(4, 6), b__bias=(6,))
    assert found == {"a": LayerKind.LINEAR, "b": LayerKind.TRANSPOSED}


def test_square_weights_follow_their_neighbours() -> None:
    """A square projection beside a Conv1D is one too; in another block it is not."""
    found = kinds(
        h__attn__c_attn__weight=(4, 12), h__attn__c_attn__bias=(12,),
        h__attn__c_proj__weight=(4, 4), h__attn__c_proj__bias=(4,),
        bert__up__weight=(8, 4), bert__up__bias=(8,),
        bert__query__weight=(4, 4), bert__query__bias=(4,),
    )  # fmt: skip
    assert found["h.attn.c_proj"] is LayerKind.TRANSPOSED
    assert found["bert.query"] is LayerKind.LINEAR


def test_embeddings_are_known_by_name_and_have_no_bias() -> None:
    """The usual names of embeddings; a patch projection with a bias is no embedding."""
    found = kinds(
        wte__weight=(50, 8), model__embed_tokens__weight=(50, 8), x__word_embeddings__weight=(50, 8),
        patch_embed__weight=(8, 48), patch_embed__bias=(8,), lm_head__weight=(50, 8), norm__weight=(8,),
    )  # fmt: skip
    embeddings = {name for name, kind in found.items() if kind is LayerKind.EMBEDDING}
    assert embeddings == {"wte", "model.embed_tokens", "x.word_embeddings"}
    assert found["patch_embed"] is LayerKind.LINEAR
    assert found["lm_head"] is LayerKind.LINEAR
    assert "norm" not in found


def test_more_dimensions_are_a_convolution() -> None:
    """Of one, two or three dimensions; their biases do not vote on what the square weights beside them are."""
    found = kinds(
        a__one__weight=(4, 12, 3), a__one__bias=(4,), a__two__weight=(6, 4, 3, 3), a__three__weight=(6, 4, 3, 3, 3),
        a__square__weight=(4, 4), a__square__bias=(4,), a__up__weight=(4, 8), a__up__bias=(8,),
    )  # fmt: skip
    assert [found[f"a.{name}"] for name in ("one", "two", "three")] == [LayerKind.CONV] * 3
    assert found["a.square"] is LayerKind.TRANSPOSED
