"""What stays in float between 8-bit products: the islands that an activation leaves, or ReLU does not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .products import ELEMENTWISE

# what changes no number, or no more than by rounding
_VIEWS = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "QuantizeLinear", "DequantizeLinear"))
_OWN = frozenset(("BiasGelu", "FastGelu", "QuickGelu"))  # onnxruntime's elementwise operators


def integer_products(graph: Any) -> int:
    """Products of 8-bit integers in a graph as onnxruntime runs it."""
    return sum(node.op_type == "QGemm" for node in graph.node)


def float_islands(graph: Any) -> dict[str, int]:
    """Of a graph as onnxruntime runs it: what is computed in float between products of 8-bit integers → how often.

    An island takes up what such products put out, is elementwise, and is quantised again for the next ones: an activation,
    with the gate's product where there is one. Its operators are joined by +. Attention, norms and the residual sums are
    none: they are no step from product to product.
    """
    made = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    found: set[frozenset[str]] = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            island = _island(node.input[0], made, constants)
            if island:
                found.add(island)
    names = ("+".join(sorted({made[output].op_type for output in island})) for island in found)
    return dict(Counter(names).most_common())


def _island(tensor: str, made: dict[str, Any], constants: set[str]) -> frozenset[str] | None:
    """The first outputs of the elementwise operators above a tensor, up to products; None if others are on the way."""
    waiting, seen, island = [tensor], set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        node = made.get(name)
        if name in seen or not name or name in constants:
            continue
        seen.add(name)
        if node is None:
            return None  # an input of the network
        if node.op_type == "QGemm":
            continue
        if node.op_type in _VIEWS:
            waiting.append(node.input[0])  # and not its sizes
        elif node.op_type in ELEMENTWISE or node.op_type in _OWN:
            island.add(node.output[0])
            waiting += node.input
        else:
            return None
    return frozenset(island)
