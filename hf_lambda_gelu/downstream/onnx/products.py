"""Products with a constant weight become Gemm over rows, bias and all: the form in which onnxruntime has 8-bit kernels.

torch exports a linear map on (batch, sequence, features) as MatMul and Add. onnxruntime quantises these two one by one, and
rounds to 8 bits between them. Gemm takes a matrix alone: the leading dimensions are put into one before it and parted again
after it, once for all that follows elementwise (ReLU, GELU, the next product).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

_FUNCTIONS = "Abs Clip Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Mish Neg Pow Relu Selu Sigmoid Softplus Sqrt Tanh"
ELEMENTWISE = frozenset(_FUNCTIONS.split()) | {"Add", "Cast", "Div", "Identity", "Max", "Min", "Mul", "Sub"}


def as_gemms(model: Any) -> list[str]:
    """Rewrite an `onnx.ModelProto` in place; the names of its Gemms with constant weights, in the order they run in."""
    made = _Rewriting(model.graph)
    for node in list(model.graph.node):
        made.take(node)
    made.finish()
    return made.products


class _Rewriting:
    """One graph, node by node in the order in which they run.

    Attributes:
        products: names of the Gemms with constant weights so far.
    """

    def __init__(self, graph: Any) -> None:
        self.products: list[str] = []
        self._graph = graph
        self._nodes: list[Any] = []
        self._constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._outputs = {output.name for output in graph.output}
        self._columns = {tensor.name: _columns(tensor) for tensor in (*graph.value_info, *graph.output)}
        self._users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in _taken(node):
                self._users.setdefault(name, []).append(node)
        self._rows: dict[str, str] = {}  # tensor → the same as a matrix
        self._features: dict[str, int] = {}  # tensor that is to be made of a matrix, if at all → the matrix' columns
        self._leading: dict[str, str] = {}  # such a tensor → the one whose leading sizes it has
        self._views: dict[str, Any] = {}  # tensor → the Reshape that makes it, if it is needed
        self._sizes: dict[str, str] = {}  # tensor → its leading sizes and −1
        self._added: set[str] = set()  # outputs of the sums that went into a Gemm
        self._made: set[str] = set()  # tensors made of their matrices

    def take(self, node: Any) -> None:
        """The next node."""
        if set(node.output) <= self._added:
            return
        if node.op_type == "MatMul" and len(self._constants.get(node.input[1], ())) == 2:
            self._product(node)
        elif node.op_type == "Gemm" and len(self._constants.get(node.input[1], ())) == 2:
            self._gemm(node)
        elif node.op_type == "Reshape" and node.input[0] in self._features:
            self._view(node)
        elif self._elementwise_on_rows(node):
            self._on_rows(node)
        else:
            self._keep(node)

    def finish(self) -> None:
        """Put the new nodes into the graph."""
        for name in self._outputs:
            self._whole(name)
        self._shield()
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in _taken(node)} | self._outputs
        for tensor in [tensor for tensor in self._graph.initializer if tensor.name not in used]:
            self._graph.initializer.remove(tensor)
        self._graph.ClearField("value_info")  # its shapes are of the old form; they are inferred anew

    def _shield(self) -> None:
        """Write Relu as Max(x, 0) where something else than products takes it up, such as a gated block's multiplication.

        There onnxruntime would join it with the product before it into an operator that knows floats alone.
        """
        products = set(self.products)
        for node in self._nodes:
            if node.op_type == "Relu":
                users = [user for user in self._nodes if node.output[0] in user.input]
                if any(user.name not in products for user in users) or node.output[0] in self._outputs:
                    node.op_type = "Max"
                    node.input.append(self._constant("zero", [0.0]))

    def _product(self, node: Any) -> None:
        given, weight = node.input
        inputs, output = [self._as_rows(given, self._constants[weight][0]), weight], node.output[0]
        users = self._users.get(output, [])
        if len(users) == 1 and users[0].op_type == "Add" and output not in self._outputs:
            (other,) = [name for name in users[0].input if name != output] or [output]
            if self._constants.get(other) == (self._constants[weight][1],):
                inputs.append(other)
                output = users[0].output[0]
                self._added.add(output)
        self._add("Gemm", inputs, f"{output}/rows", name=node.name)
        self.products.append(node.name)
        self._is(output, f"{output}/rows", self._constants[weight][1], self._source(given))

    def _gemm(self, node: Any) -> None:
        """One that is there: it takes the rows themselves, where a Reshape made them of the tensor that they were before."""
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        inside, outside = self._constants[node.input[1]][:: -1 if transposed else 1]
        view = self._views.get(node.input[0])
        if view is not None and self._features.get(view.input[0]) == inside:
            node.input[0] = self._rows.get(view.input[0], view.input[0])
        self.products.append(node.name)
        self._keep(node)
        self._features[node.output[0]] = outside

    def _view(self, node: Any) -> None:
        """A Reshape of a product's rows, or of what is made of them."""
        given, output = node.input[0], node.output[0]
        self._views[output] = node
        if given not in self._rows and self._columns.get(output) == self._features[given]:  # of a matrix, row by row
            self._is(output, given, self._features[given], output)

    def _is(self, name: str, rows: str, features: int, source: str) -> None:
        self._rows[name], self._features[name], self._leading[name] = rows, features, source

    def _elementwise_on_rows(self, node: Any) -> bool:
        """Whether all that it takes is at hand as matrices of the same rows, or a constant along a row."""
        data = [name for name in node.input if name and name not in self._constants]
        return (
            node.op_type in ELEMENTWISE
            and bool(data)
            and all(name in self._leading for name in data)
            and len({self._source(name) for name in data}) == 1
            and all(len(self._constants.get(name, ())) <= 1 for name in node.input)
        )

    def _on_rows(self, node: Any) -> None:
        data, (output,) = [name for name in node.input if name in self._leading], node.output
        made = copy.deepcopy(node)
        del made.input[:], made.output[:]
        made.input.extend(self._rows[name] if name in self._leading else name for name in node.input)
        made.output.append(f"{output}/rows")
        self._nodes.append(made)
        self._is(output, f"{output}/rows", max(self._features[name] for name in data), self._source(data[0]))

    def _keep(self, node: Any) -> None:
        for name in _taken(node):
            self._whole(name)
        self._nodes.append(node)

    def _source(self, name: str) -> str:
        return self._leading.get(name, name)

    def _as_rows(self, name: str, features: int) -> str:
        if name not in self._rows:
            self._whole(name)
            shape = self._constant(f"rows_of_{features}", [-1, features])
            self._rows[name] = self._add("Reshape", [name, shape], f"{name}/rows")
        return self._rows[name]

    def _whole(self, name: str) -> None:
        """See to it that the tensor itself is there, where only its rows are."""
        if name in self._made or not (name in self._leading or name in self._views):
            return
        self._made.add(name)
        if name in self._views:
            self._keep(self._views[name])
            return
        source = self._leading[name]
        self._whole(source)
        if source not in self._sizes:
            sizes = self._add("Shape", [source], f"{source}/leading", start=0, end=-1)
            both = [sizes, self._constant("the_rest", [-1])]
            self._sizes[source] = self._add("Concat", both, f"{source}/sizes", axis=0)
        self._add("Reshape", [self._rows[name], self._sizes[source]], name)

    def _constant(self, name: str, values: list[int] | list[float]) -> str:
        import numpy as np
        from onnx import numpy_helper

        if name not in self._constants:
            made = np.array(values, dtype=np.float32 if isinstance(values[0], float) else np.int64)
            self._graph.initializer.append(numpy_helper.from_array(made, name))
            self._constants[name] = (len(values),)
        return name

    def _add(self, kind: str, inputs: list[str], output: str, name: str = "", **attributes: int) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(kind, inputs, [output], name or output, **attributes))  # type: ignore[arg-type]
        return output


def _columns(tensor: Any) -> int:
    """The last size of a tensor that is described; 0 if it is not known."""
    sizes = tensor.type.tensor_type.shape.dim
    return sizes[-1].dim_value if sizes else 0


def _taken(node: Any) -> Iterator[str]:
    """What a node takes, its branches included, which may take tensors from around it."""
    yield from node.input
    for branch in (item.g for item in node.attribute if item.HasField("g")):
        for inner in branch.node:
            yield from _taken(inner)
