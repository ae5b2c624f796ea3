"""An editable graph: readers and makers of values, known shapes, and sorting of the nodes at the end.

New nodes may be added in any order. `finish` puts each before the first node that reads its value, so that ONNX Runtime
still fuses what it fused before. This module knows names, shapes and connections; no adapter, no payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from formats.spec import TensorSpec
from surgery.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    import onnx

Axes = Sequence[int | str]  # sizes, or names of dynamic axes; empty if unknown


class Graph:
    """An editable copy of a model. The model itself is not changed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.proto = self.model.graph
        self.nodes = list(self.proto.node)
        self.inputs = [value.name for value in self.proto.input]
        self.initialisers = {tensor.name: tensor for tensor in self.proto.initializer}
        self.values = {
            value.name: value for value in (*self.proto.input, *self.proto.value_info, *self.proto.output)
        }  # the values whose type is known
        self.makers = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._read = set(self._readers)

    def readers(self, value: str) -> list[onnx.NodeProto]:
        """The nodes that read a value; each is listed once."""
        return self._readers.get(value, [])

    def only_reader(self, value: str) -> onnx.NodeProto | None:
        """The only node that reads a value; None if there are several, or none."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 else None

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that makes a value; None for inputs and initialisers."""
        return self.makers.get(value)

    def axes(self, value: str) -> tuple[int | str, ...]:
        """A value's axes; empty if the graph does not give them."""
        if value in self.initialisers:
            return tuple(self.initialisers[value].dims)
        if value not in self.values:
            return ()
        return tuple(axis.dim_value or axis.dim_param for axis in self.values[value].type.tensor_type.shape.dim)

    def add(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[tuple[str, str, Axes]] = (),
        like: str = "",
        last: int | str | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node and returns the name of its value, which is the node's name unless `outputs` are given.

        Args:
            kind: the operator.
            inputs: names of the input values.
            name: name of the node.
            outputs: for nodes with explicit outputs: each value's name, a value with the same type, and its axes.
            like: a value that has the same type and axes as the output.
            last: the output's last axis, if it differs.
            attributes: the operator's attributes; those that are None are left out.
        """
        import onnx

        names = [each for each, _, _ in outputs] or [name]
        given = {key: value for key, value in attributes.items() if value is not None}
        node = self.proto.node.add()
        node.CopyFrom(onnx.helper.make_node(kind, list(inputs), names, name, **given))
        self.nodes.append(node)
        for each in names:
            self.makers[each] = node
        for each in dict.fromkeys(inputs):
            self._readers.setdefault(each, []).append(node)
        for each, source, axes in outputs or [(name, like, ())]:
            known = self.axes(source)
            self.note(each, source, axes or (known if last is None or not known else (*known[:-1], last)))
        return names[0]

    def note(self, value: str, like: str, axes: Axes) -> None:
        """Records a value's axes and its type, which is that of the value `like`, if they are known."""
        import onnx

        element = self._element(like)
        if not axes or not element:
            return
        known = onnx.helper.make_tensor_value_info(value, element, [axis or None for axis in axes])
        if value in self.values:
            self.values[value].CopyFrom(known)
        else:
            self.values[value] = self.proto.value_info.add()
            self.values[value].CopyFrom(known)

    def _element(self, name: str) -> int:
        """The element type of a tensor or a value; 0 if the graph does not give it."""
        if name in self.initialisers:
            return int(self.initialisers[name].data_type)
        return int(self.values[name].type.tensor_type.elem_type) if name in self.values else 0

    def reroute(self, node: onnx.NodeProto, old: str, new: str) -> None:
        """Lets a node read the value `new` instead of `old`."""
        node.input[:] = [new if name == old else name for name in node.input]
        self._readers[old] = [each for each in self.readers(old) if each is not node]
        self._readers.setdefault(new, []).append(node)

    def drop_unread(self, value: str) -> None:
        """Removes the nodes that are needed only for a value that nothing reads any more."""
        node = self.makers.get(value)
        if node is None or any(self.readers(name) for name in node.output):
            return
        self.nodes = [each for each in self.nodes if each is not node]
        for name in dict.fromkeys(node.input):
            self._readers[name] = [each for each in self.readers(name) if each is not node]
            self.drop_unread(name)

    def rename_axis(self, value: str, old: str, new: str) -> None:
        """Renames a dynamic axis."""
        for axis in self.values[value].type.tensor_type.shape.dim if value in self.values else ():
            if axis.dim_param == old:
                axis.dim_param = new

    def declare(self, spec: TensorSpec, like: str) -> str:
        """Declares a tensor of the payload, with the type of another tensor or value. Its location is set later."""
        import onnx

        kind, external = self._element(like), onnx.TensorProto.EXTERNAL
        tensor = self.proto.initializer.add(name=spec.name, dims=spec.shape, data_type=kind, data_location=external)
        self.initialisers[spec.name] = tensor
        return spec.name

    def constant(self, name: str, array: np.ndarray[Any, np.dtype[Any]]) -> str:
        """Adds a small tensor that is stored in the graph. There is one per name."""
        import onnx

        if name not in self.initialisers:
            self.initialisers[name] = self.proto.initializer.add()
            self.initialisers[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
        return name

    def integers(self, *numbers: int) -> str:
        """A constant 1-D tensor of integers."""
        import numpy as np

        return self.constant(f"integers/{'_'.join(map(str, numbers))}", np.array(numbers, np.int64))

    def integer(self, number: int) -> str:
        """A constant integer scalar."""
        import numpy as np

        return self.constant(f"integer/{number}", np.array(number, np.int64))

    def products(self, weight: str, turned: bool, then: str) -> list[onnx.NodeProto]:
        """The nodes that multiply by a weight, which is (in, out), or is transposed by a node or by Gemm.

        Args:
            weight: the weight's initialiser.
            turned: whether the weight is stored (in, out) rather than (out, in).
            then: advice for the user if there are none.

        Raises:
            Unsupported: the graph does not multiply by the weight, or uses it in other ways too.
        """
        found = []
        for node in self.readers(weight):
            name, transposed, users = weight, False, [node]
            if node.op_type == "Transpose" and attribute(node, "perm") == [1, 0]:
                name, transposed, users = node.output[0], True, self.readers(node.output[0])
            for user in users:
                plain = list(user.input).index(name) == 1 and is_product(user)
                if not plain or (transposed != (attribute(user, "transB") == 1)) is turned:
                    raise Unsupported(
                        "the graph does not use an adapted weight only to multiply by it",
                        where=weight,
                        expected="x · W, in a MatMul or Gemm",
                        found=user.name,
                        then=then,
                    )
                found.append(user)
        if not found:
            raise Unsupported("the graph does not multiply by this adapted weight", where=weight, then=then)
        return found

    def finish(self) -> onnx.ModelProto:
        """The model, with sorted nodes and without initialisers that nothing reads any more."""
        import onnx

        ordered: list[onnx.NodeProto] = []
        done: set[str] = set()
        for node in self.nodes:
            pending = [node]
            while pending:  # a node that needs others is visited again after them
                current = pending[-1]
                makers = (self.makers.get(name) for name in current.input if name and name not in done)
                before = [maker for maker in makers if maker is not None]
                if before:
                    pending.append(before[0])
                    continue
                pending.pop()
                if current.output[0] not in done:
                    ordered.append(current)
                    done.update(current.output)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del self.proto.node[:]
        self.proto.node.extend(copies)
        unread = self._read - {name for node in copies for name in node.input}
        for tensor in [each for each in self.proto.initializer if each.name in unread]:
            self.proto.initializer.remove(tensor)
        return self.model


def is_product(node: onnx.NodeProto) -> bool:
    """Whether a node only multiplies its first input by its second, and may add a bias."""
    scales = [attribute(node, name) for name in ("alpha", "beta")]
    return node.op_type in ("MatMul", "Gemm") and not attribute(node, "transA") and set(scales) <= {None, 1.0}


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """A node's attribute; None if it has none of this name."""
    import onnx

    for each in node.attribute:
        if each.name == name:
            return onnx.helper.get_attribute_value(each)
    return None
