"""`surgery fold --approximate`: affine maps in place of non-linearities, and what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bottleneck_models import GOLDEN, built, saved, sites
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_fold import edited

import surgery
from formats.grafts import BranchGraft, read_grafts, tensor_names
from formats.paths import open_checkpoint
from surgery.cli import main
from surgery.onnx.against_torch.sites import in_module
from surgery.onnx.against_torch.torch_hooks import attach_branch
from surgery.operations.fold.verdicts import Way

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(0, 16, (16, 10), generator=torch.Generator().manual_seed(0))
HELD_OUT = [3, 7, 11, 15]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The golden BERT as a folder."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SIZES, vocab_size=16, max_position_embeddings=16))
    model.load_state_dict(load_file(GOLDEN / "bert" / "base.st"))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def calibration(folder: Path, **tensors: torch.Tensor) -> Path:
    """A file of rows."""
    save_file({"input_ids": IDS, **tensors}, folder / "rows.st")
    return folder / "rows.st"


def output(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """A folded model's, with what it left for the graph."""
    from transformers import BertModel

    model = BertModel.from_pretrained(folder).eval()
    if (folder / "grafts.safetensors").exists():
        with open_checkpoint(folder / "grafts.safetensors") as checkpoint:
            for site in read_grafts(checkpoint).sites:
                assert isinstance(site, BranchGraft)
                named = tensor_names(site).items()
                attach_branch(model, site, {role: checkpoint.read(name) for role, name in named})
    with torch.no_grad():
        hidden: torch.Tensor = model(ids).last_hidden_state
    return hidden


def bent(tensors: dict[str, torch.Tensor]) -> None:
    """Makes f take values where it is far from affine."""
    for name, tensor in tensors.items():
        if name.endswith("adapter_down.0.weight"):
            tensor *= 30


@pytest.mark.parametrize(("name", "way"), [("double_seq_bn", Way.FOLDED), ("par_bn", Way.WIDENED)])
def test_the_error_that_is_told_is_the_folded_model_s(tmp_path: Path, base: Path, name: str, way: Way) -> None:
    """On the rows held out, against the model with the adapter as it is."""
    adapter = edited(tmp_path, name, bent)
    surgery.fold(base, adapter, tmp_path / "exact")
    report = surgery.fold(base, adapter, tmp_path / "near", calibration=calibration(tmp_path))
    assert {each.way for each in report.verdicts} == {way}
    assert report.grafts is None
    found = report.approximation
    assert found is not None
    assert (found.rows, found.held_out, len(found.modules)) == (12, 4, len(report.verdicts))
    exact, near = (output(tmp_path / folder, IDS[HELD_OUT]) for folder in ("exact", "near"))
    assert float((near - exact).norm() / exact.norm()) == pytest.approx(found.output, rel=1e-3)
    assert 1e-4 < found.output < 1
    assert all(0 < error < 1 for error in found.modules.values())


@pytest.mark.parametrize("model", ["vit", "llama", "distilbert"])
def test_other_models_are_calibrated_too(tmp_path: Path, model: str) -> None:
    """On images, or without biases: what is told is what the folded model does on the rows held out."""
    from transformers import AutoModel

    rows = {"input_ids": IDS}
    if model == "vit":
        rows = {"pixel_values": torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))}
    save_file(rows, tmp_path / "rows.st")
    base, adapter = tmp_path / "base", GOLDEN / model / "double_seq_bn"
    wide = built(model)
    for parameter in wide.parameters():
        parameter.data *= 20 if parameter.dim() == 2 else 1  # so that tokens differ, and bend f
    wide.save_pretrained(base)
    surgery.fold(base, adapter, tmp_path / "exact")
    report = surgery.fold(base, adapter, tmp_path / "near", calibration=tmp_path / "rows.st")
    assert {each.way for each in report.verdicts} == {Way.FOLDED}
    given = {name: tensor[HELD_OUT] for name, tensor in rows.items()}
    exact, near = (AutoModel.from_pretrained(tmp_path / folder).eval() for folder in ("exact", "near"))
    for site, own in sites(tmp_path / "exact"):
        assert isinstance(site, BranchGraft)
        attach_branch(exact, in_module(site, exact), own)
    with torch.no_grad():
        one, other = (each(**given).last_hidden_state for each in (exact, near))
    assert report.approximation is not None
    assert float((other - one).norm() / one.norm()) == pytest.approx(report.approximation.output, rel=1e-3)
    assert report.approximation.output > 1e-4


@pytest.mark.parametrize("shape", [(16, 3, 8, 8), (1, 3, 4, 4), (16, 4, 4)])
def test_images_of_another_size_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Or too few, or none at all."""
    base, adapter = saved("vit", tmp_path / "base"), GOLDEN / "vit" / "double_seq_bn"
    for name in ("pixel_values", "input_ids"):
        save_file({name: torch.zeros(shape)}, tmp_path / "rows.st")
        with pytest.raises(surgery.ReportedError, match="no calibration rows"):
            surgery.fold(base, adapter, tmp_path / "out", calibration=tmp_path / "rows.st")
    assert not (tmp_path / "out").exists()


def test_what_is_affine_on_every_token_is_folded_as_it_is(tmp_path: Path, base: Path) -> None:
    """relu above zero."""

    def lifted(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("adapter_down.0.bias"):
                tensor += 100
            if name.endswith("adapter_up.weight"):
                tensor *= 0.01

    adapter = edited(tmp_path, "double_seq_bn", lifted, non_linearity="relu")
    report = surgery.fold(base, adapter, tmp_path / "near", calibration=calibration(tmp_path))
    assert report.approximation is not None
    assert report.approximation.output < 1e-5
    assert max(report.approximation.modules.values()) < 1e-5


def test_padding_has_no_say(tmp_path: Path, base: Path) -> None:
    """Whatever tokens it has."""
    mask = torch.ones_like(IDS)
    mask[::2, 7:] = 0
    digests = set()
    for token in (0, 9):
        ids = torch.where(mask.bool(), IDS, token)
        rows = calibration(tmp_path, input_ids=ids, attention_mask=mask)
        report = surgery.fold(base, GOLDEN / "bert" / "par_bn", tmp_path / "near", calibration=rows, force=True)
        assert report.approximation is not None
        digests.add(round(report.approximation.output, 5))
    assert len(digests) == 1


def test_a_larger_error_than_allowed_is_refused(tmp_path: Path, base: Path) -> None:
    """With exit code 3, and nothing is written."""
    rows, out = calibration(tmp_path), tmp_path / "near"
    arguments = ["fold", str(base), str(GOLDEN / "bert" / "double_seq_bn"), "-o", str(out)]
    arguments += ["--approximate", "--calibration", str(rows)]
    done = CliRunner().invoke(main, [*arguments, "--max-error", "1e-9"])
    assert done.exit_code == 3
    assert "errs more than it may" in done.stderr
    assert not out.exists()
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "4 rows held out" in done.output


@pytest.mark.parametrize("name", ["double_seq_bn", "par_bn"])
def test_a_model_with_a_head_is_run_as_such(tmp_path: Path, name: str) -> None:
    """RoBERTa's names have a part before those of the adapter; its output is the head's, padding or not."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    made = RobertaForSequenceClassification(RobertaConfig(**SIZES, vocab_size=16, max_position_embeddings=16))
    made.save_pretrained(tmp_path / "roberta")
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0
    adapter = edited(tmp_path, name, bent)
    rows = calibration(tmp_path, attention_mask=mask)
    report = surgery.fold(tmp_path / "roberta", adapter, tmp_path / "near", calibration=rows)
    assert report.approximation is not None
    assert 0 < report.approximation.output < 1
    loaded = RobertaForSequenceClassification.from_pretrained(tmp_path / "near")
    assert loaded.config.intermediate_size == (12 if name == "double_seq_bn" else 12 + 2 * 4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": IDS[:1]}, "no calibration rows"),
        ({"input_ids": IDS.view(-1)}, "no calibration rows"),
        ({"attention_mask": IDS[:2].clone()}, "no calibration rows"),
        ({"input_ids": IDS + 10}, "tokens that the model does not have"),
        ({"input_ids": IDS[:3, :2].contiguous()}, "too few tokens"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, base: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    """Nothing is written."""
    rows = calibration(tmp_path, **tensors)
    with pytest.raises(surgery.ReportedError, match=message):
        surgery.fold(base, GOLDEN / "bert" / "double_seq_bn", tmp_path / "near", calibration=rows)
    assert not (tmp_path / "near").exists()


@pytest.mark.parametrize("name", ["seq_bn", "double_seq_bn_linear"])
def test_what_no_affine_map_would_fold_is_said(tmp_path: Path, base: Path, name: str) -> None:
    """Or what folds exactly anyway."""
    with pytest.raises(surgery.ReportedError, match="no bottleneck would fold"):
        surgery.fold(base, GOLDEN / "bert" / name, tmp_path / "near", calibration=calibration(tmp_path))


def test_a_prefix_beside_is_refused(tmp_path: Path, base: Path) -> None:
    """The model would be run without it."""
    with pytest.raises(surgery.ReportedError, match="not with a prefix"):
        surgery.fold(base, GOLDEN / "bert" / "mam", tmp_path / "near", calibration=calibration(tmp_path))
