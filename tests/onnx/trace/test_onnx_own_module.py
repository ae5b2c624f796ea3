"""--factory: modules that transformers does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from surgery.cli import main
from surgery.errors import MissingTensors, ReportedError, Unsupported
from surgery.operations.export.export_onnx import export_onnx

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, image, scale):
        return {"classes": self.head(self.features(image).mean((2, 3))) * scale}


def build():
    return Net()


def number():
    return 7


class Shifting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return x + self.weight


def shifting():
    return Shifting()
"""
INPUTS = ("image=float32[batch,3,height,width]", "scale=float32[batch,1]")


@pytest.fixture(autouse=True)
def _code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_net.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "their_net", raising=False)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The net's state dict, filled with noise, as a file."""
    import their_net  # type: ignore[import-not-found]

    torch.manual_seed(3)
    state = {
        name: torch.rand_like(tensor) + 0.5 if tensor.is_floating_point() else tensor
        for name, tensor in their_net.build().state_dict().items()
    }
    save_file(state, tmp_path / "net.st")
    return tmp_path / "net.st"


def test_an_own_module(tmp_path: Path, weights: Path) -> None:
    """Convolution, normalisation with its statistics, two inputs, three axes that vary; outputs by their names."""
    import their_net

    report = export_onnx(weights, tmp_path / "out/model.onnx", factory="their_net:build", inputs=INPUTS)
    assert report.model_class == "their_net:build"
    assert report.graphs[0].inputs == ("image", "scale")
    assert report.graphs[0].outputs == ("classes",)
    assert report.unused == ("features.1.num_batches_tracked",)
    onnx.checker.check_model(report.graphs[0].path, full_check=True)
    session = onnxruntime.InferenceSession(report.graphs[0].path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    rng = np.random.default_rng(0)
    feed = {"image": rng.random((4, 3, 9, 13), np.float32), "scale": rng.random((4, 1), np.float32)}
    net = their_net.build().eval()
    net.load_state_dict(load_file(weights))
    with torch.no_grad():
        expected = net(**{name: torch.from_numpy(array) for name, array in feed.items()})["classes"]
    np.testing.assert_allclose(session.run(None, feed)[0], expected.numpy(), rtol=1e-5)


def test_other_weights_under_its_graph(tmp_path: Path, weights: Path) -> None:
    """The graph of an own module serves its other weights too, without its code."""
    first = export_onnx(weights, tmp_path / "out/model.onnx", factory="their_net:build", inputs=INPUTS, verify=False)
    tensors = load_file(weights)
    tensors["head.bias"] += 1
    save_file(tensors, tmp_path / "tuned.st")
    second = export_onnx(tmp_path / "tuned.st", tmp_path / "tuned-onnx/model.onnx", graph=first.graphs[0].path)
    assert second.graphs[0].sha256 == first.graphs[0].sha256
    assert second.payload_blake3 != first.payload_blake3


@pytest.mark.parametrize(
    ("factory", "inputs", "said"),
    [
        ("their_net", INPUTS, "not name a function"),
        ("no_such_package.net:build", INPUTS, "cannot be imported"),
        ("their_net:nothing", INPUTS, "cannot be imported"),
        ("their_net:torch", INPUTS, "not a function"),
        ("their_net:number", INPUTS, "must return a torch.nn.Module"),
        ("their_net:build", (), "description of the module"),
        ("their_net:build", ("image",), "cannot be read"),
        ("their_net:build", ("image=float33[batch]",), "cannot be read"),
        ("their_net:build", ("image=float32[batch,-1]",), "cannot be read"),
        ("their_net:build", ("image=float32[batch,3,8,8]",), "torch cannot export"),
    ],
)
def test_factories_and_inputs_that_will_not_do(
    tmp_path: Path, weights: Path, factory: str, inputs: tuple[str, ...], said: str
) -> None:
    """One clear error each, and nothing is written."""
    with pytest.raises(Unsupported, match=said):
        export_onnx(weights, tmp_path / "out/model.onnx", factory=factory, inputs=inputs)
    assert not (tmp_path / "out").exists()


def test_weights_that_the_module_lacks(tmp_path: Path, weights: Path) -> None:
    """Missing tensors are named."""
    tensors = load_file(weights)
    del tensors["head.bias"]
    save_file(tensors, weights)
    with pytest.raises(MissingTensors, match="needs tensors") as caught:
        export_onnx(weights, tmp_path / "out/model.onnx", factory="their_net:build", inputs=INPUTS)
    assert caught.value.details["expected"] == "head.bias"


def test_an_axis_that_cannot_vary(tmp_path: Path) -> None:
    """What the module fixes must be declared as a number."""
    save_file({"weight": torch.ones(6)}, tmp_path / "w.st")
    with pytest.raises(ReportedError) as caught:
        export_onnx(
            tmp_path / "w.st", tmp_path / "out/model.onnx", factory="their_net:shifting", inputs=("x=float32[batch,n]",)
        )
    assert isinstance(caught.value, Unsupported)


@pytest.mark.parametrize(
    "words",
    [["--inputs", "x=float32[2]"], ["--factory", "a:b", "--with-cache"], ["--graph", "g.onnx", "--with-cache"]],
)
def test_options_that_do_not_go_together(words: list[str]) -> None:
    """A usage error, exit code 2, before anything is read."""
    done = CliRunner().invoke(main, ["export-onnx", "model", "-o", "out/model.onnx", *words])
    assert done.exit_code == 2, done.output
