"""A user's own module: a function builds it, a file holds its weights.

A weight file does not say which code to run, so the user must name the function; only then is it imported and called.
It should return the untrained module; its parameter values are never read.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.spec import DType
from surgery.errors import MissingTensors, Unsupported
from surgery.model.base_model import BaseModel
from surgery.onnx.trace.program import FLOAT, Input, Program
from surgery.onnx.trace.single_pass import SinglePass, forward

_INPUT = re.compile(r"([A-Za-z_]\w*)=(\w+)\[([^\[\]]*)\]")
_FLOATS = ("float16", "float32", "bfloat16", FLOAT)
_DTYPES = (*_FLOATS, "float64", "int64", "int32", "bool")
_AXIS = re.compile(r"[A-Za-z_]\w*|[1-9]\d*")


@dataclass(frozen=True)
class OwnModule:
    """A function that makes a module, its weights, and its inputs."""

    weights: BaseModel
    factory: str
    make: Callable[[], Any]
    kind: SinglePass

    @property
    def where(self) -> Path:
        """The file of the weights."""
        return self.weights.path

    @property
    def name(self) -> str:
        """The function, as the user named it."""
        return self.factory

    @property
    def settings(self) -> Mapping[str, Any]:
        """Empty: the settings of the function are unknown."""
        return {}

    def build(self, dtype: DType) -> Any:
        """What the function returns, in a dtype and for inference."""
        import torch

        from formats.tensors import torch_dtype

        module = self.make()
        if not isinstance(module, torch.nn.Module):
            raise Unsupported(
                "the factory must return a torch.nn.Module",
                where=self.factory,
                found=type(module).__name__,
                then="name a function that returns the module: --factory package.module:function",
            )
        return module.to(torch_dtype(dtype)).eval()

    def load(self, dtype: DType) -> Any:
        """The module with its weights, by torch's own strict loading."""
        module = self.build(dtype)
        checkpoint = self.weights.checkpoint
        tensors = {name: checkpoint.read(name) for name in checkpoint.specs}
        missing, _ = module.load_state_dict(tensors, strict=False)
        tied = {id(tensor) for name, tensor in module.state_dict(keep_vars=True).items() if name in tensors}
        state = module.state_dict(keep_vars=True)
        lost = [name for name in missing if id(state[name]) not in tied]
        if lost:
            raise MissingTensors(
                "the module needs tensors that the file does not have",
                where=self.where,
                expected=lost,
                then="check that the factory builds the module that the file was saved from",
            )
        return module


def own_module(weights: BaseModel, factory: str, inputs: Sequence[str]) -> OwnModule:
    """Finds the function, and parses the inputs; does not call the function.

    Raises:
        Unsupported: a factory that cannot be imported, or inputs that cannot be read.
    """
    module, colon, function = factory.partition(":")
    if not (module and colon and function):
        raise Unsupported(
            "--factory does not name a function",
            expected="package.module:function",
            found=factory,
            then="name it as --factory package.module:function",
        )
    try:
        make = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's own code may raise anything while it is imported
        raise Unsupported(
            "the factory cannot be imported",
            where=factory,
            found=f"{type(error).__name__}: {error}",
            then="run in a folder from which Python finds it, or add its folder to PYTHONPATH",
        ) from error
    if not callable(make):
        raise Unsupported(
            "the factory is not a function",
            where=factory,
            found=type(make).__name__,
            then="name a function that returns the module",
        )
    if not inputs:
        raise Unsupported(
            "--factory needs a description of the module's inputs",
            where=factory,
            then="pass for example --inputs 'x=float32[batch,3,32,32]'",
        )
    program = Program("", tuple(_input(text) for text in inputs), forward)
    return OwnModule(weights, factory, make, SinglePass(program))


def _input(text: str) -> Input:
    """`x=float32[batch,3,32,32]`; a floating-point input takes the dtype that the graph computes in."""
    found = _INPUT.fullmatch(text.strip())
    axes = tuple(axis.strip() for axis in found[3].split(",") if axis.strip()) if found else ()
    if found is None or found[2] not in _DTYPES or not all(_AXIS.fullmatch(axis) for axis in axes):
        raise Unsupported(
            "an input of the module cannot be read",
            expected=f"NAME=DTYPE[AXES], such as x=float32[batch,3,32,32]; the dtype one of {', '.join(_DTYPES)}",
            found=text,
            then="correct --inputs",
        )
    dtype = FLOAT if found[2] in _FLOATS else found[2]
    return Input(found[1], dtype, tuple(int(axis) if axis.isdecimal() else axis for axis in axes))
