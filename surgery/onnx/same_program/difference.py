"""The first difference between two programs, in words: which node, which attribute, which input. Knows no file."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from surgery.onnx.same_program.canonical import Body, CanonicalProgram, Node


@dataclass(frozen=True)
class ProgramDifference:
    """What differs, and what either side has there."""

    what: str
    a: str
    b: str


def first_difference(a: CanonicalProgram, b: CanonicalProgram) -> ProgramDifference | None:
    """Where the walks through two programs part; None where they are the same program."""
    found = _bodies(a.body, b.body)
    if found is None and a.opsets != b.opsets:
        return ProgramDifference("the versions of the operator sets", _opsets(a), _opsets(b))
    return found


def _opsets(program: CanonicalProgram) -> str:
    return ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in program.opsets)


def _bodies(a: Body, b: Body) -> ProgramDifference | None:
    if a.inputs != b.inputs:
        return ProgramDifference("the inputs", _inputs(a), _inputs(b))
    for index, (one, other) in enumerate(zip_longest(a.nodes, b.nodes)):
        if one != other:
            return _nodes(one, other, index)
    for (name, source, kind), (other_name, other_source, other_kind) in zip(a.outputs, b.outputs, strict=False):
        if (name, source, kind) != (other_name, other_source, other_kind):
            texts = (f"{name} {kind.text}, {source}", f"{other_name} {other_kind.text}, {other_source}")
            return ProgramDifference("an output", *texts)
    if len(a.outputs) != len(b.outputs):
        return ProgramDifference("the number of outputs", str(len(a.outputs)), str(len(b.outputs)))
    if a.idle != b.idle:
        return ProgramDifference("nodes that reach no output", ", ".join(a.idle) or "none", ", ".join(b.idle) or "none")
    return None


def _inputs(body: Body) -> str:
    return ", ".join(f"{name} {kind.text}".strip() for name, kind in body.inputs) or "none"


def _nodes(a: Node | None, b: Node | None, index: int) -> ProgramDifference:
    if a is None or b is None or a.op != b.op:
        return ProgramDifference(f"node {index}", _node(a), _node(b))
    where = f"{a.op} (node {index}, {a.name})"
    attributes, others = dict(a.attributes), dict(b.attributes)
    for name in sorted({*attributes, *others}):
        one, other = attributes.get(name), others.get(name)
        if one != other:
            inside = _inside(one, other)
            if inside is not None:
                return ProgramDifference(f"{inside.what}, in {name} of {where}", inside.a, inside.b)
            return ProgramDifference(f"attribute {name} of {where}", _plain(one), _plain(other))
    for place, (source, other_source) in enumerate(zip_longest(a.inputs, b.inputs)):
        if source != other_source:
            return ProgramDifference(f"input {place} of {where}", _plain(source), _plain(other_source))
    texts = [", ".join("absent" if kind is None else kind.text for kind in node.outputs) for node in (a, b)]
    return ProgramDifference(f"the declared outputs of {where}", *texts)


def _inside(one: Any, other: Any) -> ProgramDifference | None:
    """The difference within a subgraph that both have."""
    pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (one, other)), strict=False)
    for left, right in pairs:
        if isinstance(left, Body) and isinstance(right, Body) and left != right:
            return _bodies(left, right)
    return None


def _node(node: Node | None) -> str:
    if node is None:
        return "no further node"
    return f"{node} of " + ", ".join(_plain(source) for source in node.inputs) if node.inputs else str(node)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "absent" if value is None else str(value)
