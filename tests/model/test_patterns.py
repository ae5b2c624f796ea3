from __future__ import annotations

import pytest

from formats.errors import UnknownTensor
from surgery.errors import SurgeryError
from surgery.model.patterns import rank_override, select
from surgery.operations.extract.plan import Extraction

NAMES = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), [0, 1, 2, 3, 4]),
        (("*.self_attn.*",), (), [0, 2]),  # a star crosses dots
        (("*",), ("*.1.*", "lm_head.weight"), [0, 1]),
        (("*.layers.[0-9].mlp.*", "lm_head.weigh?"), (), [1, 3, 4]),
        ((r"re:model\.layers\.\d+\.(self_attn|mlp)\.q_proj\.weight",), (), [0, 2]),
        (("*",), ("re:.*mlp.*",), [0, 2, 4]),
    ],
)
def test_patterns_select_whole_names_in_order(
    include: tuple[str, ...], exclude: tuple[str, ...], expected: list[int]
) -> None:
    """Any of the included and none of the excluded; without an include, all."""
    assert select(NAMES, include, exclude) == [NAMES[index] for index in expected]


@pytest.mark.parametrize("pattern", ["*.Self_Attn.*", "q_proj", "re:q_proj", "", "re:"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(pattern: str) -> None:
    """Another case and a part of a name match nothing."""
    for include, exclude in (((pattern,), ()), ((), (pattern,))):
        with pytest.raises(UnknownTensor) as caught:
            select(NAMES, include, exclude)
        assert caught.value.details["expected"] == pattern


@pytest.mark.parametrize(
    "pattern", ["*.self_atn.q_proj.weight", r"re:.*\.self_atn\.q_proj\.weight", "*.layr.*", "*.Self_Attn.*"]
)
def test_the_nearest_names_are_shown(pattern: str) -> None:
    """Of a typing mistake in a glob or in an expression."""
    with pytest.raises(UnknownTensor) as caught:
        select(NAMES, (pattern,))
    assert NAMES[0] in caught.value.details["found"]


def test_an_invalid_regular_expression_is_an_error_that_says_why() -> None:
    """A shell glob cannot be invalid: an open bracket is a bracket."""
    with pytest.raises(SurgeryError, match="not a regular expression") as caught:
        select(NAMES, ("re:layers.(0",))
    assert "unterminated" in caught.value.what
    with pytest.raises(UnknownTensor):
        select(NAMES, ("layers.[0",))


def test_the_last_override_that_matches_wins() -> None:
    """So that a general one can be amended by a special one after it."""
    overrides = dict(map(rank_override, ["*.layers.*=8", "*.mlp.*=16", r"re:(?=model).*\.1\.mlp.*=4"]))
    ranks = Extraction(rank=2, overrides=overrides).overridden(NAMES)
    assert ranks == {NAMES[0]: 8, NAMES[1]: 16, NAMES[2]: 8, NAMES[3]: 4}


@pytest.mark.parametrize("text", ["*.mlp.*", "*.mlp.*=", "*.mlp.*=0", "*.mlp.*=-1", "*.mlp.*=x", "=8"])
def test_an_override_without_a_pattern_or_a_rank_is_an_error(text: str) -> None:
    """The form is said."""
    with pytest.raises(SurgeryError) as caught:
        rank_override(text)
    assert caught.value.details["found"] == text


def test_an_override_that_matches_nothing_is_an_error() -> None:
    """Its pattern is named without the rank."""
    with pytest.raises(UnknownTensor) as caught:
        Extraction(rank=2, overrides={"*.nothing": 8}).overridden(NAMES)
    assert caught.value.details["expected"] == "*.nothing"
