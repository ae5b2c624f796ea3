"""What can go wrong between a Hugging Face folder and a running ONNX graph.

    ReportedError
    └── OnnxError
        ├── UnknownArchitecture   config.json does not say which class to build, or names one that is not there
        ├── UnsupportedModel      a class whose forward pass is not the one graph we can export
        ├── MissingTensors        the graph needs tensors that the checkpoint does not have
        ├── PayloadConflict       another model's payload stands where this one's would go
        ├── OutputMismatch        ONNX Runtime and torch disagree
        ├── InputsDiffer          two graphs that cannot be fed the same inputs
        └── ProviderUnavailable   the execution provider asked for is not the one that would run
"""

from __future__ import annotations

from formats.errors import ReportedError


class OnnxError(ReportedError):
    """Something in the ONNX half of the house."""


class UnknownArchitecture(OnnxError):
    """config.json does not say which class to build, or names one that is not there."""


class UnsupportedModel(OnnxError):
    """A class whose forward pass is not the one graph we can export."""


class MissingTensors(OnnxError):
    """The graph needs tensors that the checkpoint does not have."""


class PayloadConflict(OnnxError):
    """Another model's payload stands where this one's would go."""


class OutputMismatch(OnnxError):
    """ONNX Runtime and torch disagree."""


class InputsDiffer(OnnxError):
    """Two graphs that cannot be fed the same inputs."""


class ProviderUnavailable(OnnxError):
    """The execution provider asked for is not the one that would run."""
