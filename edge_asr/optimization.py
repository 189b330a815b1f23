"""Decides what an equivalent, faster graph of a SenseVoice model looks like for one utterance at a time.

onnxruntime's own optimizer has been over the graph before (``prepared``), so patterns here are its operators. Each pass
is one idea and says what it changes in the numbers. ``EXACT`` passes leave every bit of the result as it was; those of
``CLOSE`` do the same sums in another order, which rounds differently; the proof of both is in ``prepared``.

- :func:`drop_mask`: with one utterance in a batch no frame is padding, so nothing has to be masked.
- :func:`sign_weights`: x86 with VNNI multiplies unsigned by signed bytes; unsigned weights take a path half as fast.
  w - 128 with zero point z - 128 is the same integer, so the result is the same. Without VNNI the signed kernel may
  saturate, and ARM multiplies both as fast.
- :func:`fuse_normalization`: onnxruntime's LayerNormalization goes through each row one number at a time, its
  SkipLayerNormalization, which also adds the residual, several at once: a fifth of the time.
- :func:`widen_memory`: the depthwise convolution over time (FSMN) as a convolution of one line: for two dimensions
  there is a blocked kernel, which takes the transpositions in. The input that is added behind it becomes part of it.
- :func:`thin_attention`: products of heads straight from where the projections left them, without copies and shapes.
- :func:`end_in_log_posteriors`: the softmax that the decoder needs, where rows are still in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_asr.onnx_file import CONTRIB, Graph, Node

LOGITS: Final = "logits"
LOG_POSTERIORS: Final = "log_posteriors"
"""Name of a prepared graph's output."""

Pass = Callable[[Graph], int]
"""Rewrites a graph in place; how many places it found."""

_WEIGHT_AT: Final = {"DynamicQuantizeMatMul": (1, 3), "MatMulIntegerToFloat": (1, 5), "MatMulInteger": (1, 3)}
"""Operator -> which inputs are the weight and its zero point."""

_SHAPE_ONLY: Final = {"Cast", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Identity"}
"""Operators that leave a value that is the same everywhere as it is."""


def drop_mask(graph: Graph) -> int:
    """Take the comparison of frame numbers with ``x_length`` as true everywhere, and what follows from it as known."""
    counted = _depending_on("x_length", graph)
    same: dict[str, float] = {}
    dropped = 0
    for node in graph.nodes:
        if node.op == "Less" and node.inputs[0] not in counted and node.inputs[1] in counted:
            same[node.outputs[0]] = 1.0
            continue
        known = [same.get(name, _scalar(graph, name)) for name in node.inputs]
        if not any(name in same for name in node.inputs):
            continue
        value = _value_everywhere(node, known)
        if value is not None:
            same[node.outputs[0]] = value
        elif (kept := _what_remains(node, known)) is not None:
            graph.rename(node.outputs[0], kept)
            dropped += 1
    graph.drop_unused()
    return dropped


def _depending_on(name: str, graph: Graph) -> set[str]:
    found = {name}
    for node in graph.nodes:
        if found.intersection(node.inputs):
            found.update(node.outputs)
    return found


def _scalar(graph: Graph, name: str) -> float | None:
    array = graph.constants.get(name)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _value_everywhere(node: Node, known: list[float | None]) -> float | None:
    """What a node gives at every place, if that follows from inputs that are the same everywhere."""
    first = known[0]
    if first is None:
        return None
    if node.op in _SHAPE_ONLY:
        return first
    if node.op == "Not":
        return float(not first)
    second = known[1] if len(known) == 2 else None
    if second is None:
        return None
    operations: dict[str, Callable[[float, float], float]] = {
        "Equal": lambda a, b: float(a == b),
        "Mul": lambda a, b: a * b,
        "Sub": lambda a, b: a - b,
        "Add": lambda a, b: a + b,
    }
    operation = operations.get(node.op)
    return operation(first, second) if operation is not None else None


def _what_remains(node: Node, known: list[float | None]) -> str | None:
    """Which input a node hands on unchanged, since another is the same everywhere."""
    if node.op == "Where" and known[0] is not None:
        return node.inputs[1 if known[0] else 2]
    neutral = {"Mul": 1.0, "Add": 0.0, "Sub": 0.0}.get(node.op)
    if neutral is None or neutral not in known or (node.op == "Sub" and known[1] != neutral):
        return None
    return node.inputs[1 - known.index(neutral)]


def sign_weights(graph: Graph) -> int:
    """Make unsigned 8-bit weights signed; exact."""
    flipped: set[str] = set()
    for node in graph.nodes:
        places = _WEIGHT_AT.get(node.op, ())
        names = [node.inputs[place] for place in places if place < len(node.inputs) and node.inputs[place]]
        if len(names) < 2 or any(name not in graph.constants for name in names):
            continue  # without a zero point, or with a weight that is computed, there is nothing to move
        for name in names:
            array = graph.constants[name]
            if array.dtype == np.uint8 and name not in flipped:
                graph.constants[name] = (array ^ np.uint8(0x80)).view(np.int8)
                flipped.add(name)
    return len(flipped)


def fuse_normalization(graph: Graph) -> int:
    """Replace sum and LayerNormalization by SkipLayerNormalization; rounds differently."""
    producers = graph.producers
    fused = 0
    for node in [node for node in graph.nodes if node.op == "LayerNormalization"]:
        total = producers.get(node.inputs[0])
        if (
            total is None
            or total.op != "Add"
            or len(node.inputs) != 3
            or node.number("axis", -1) != -1
            or any(name in graph.constants for name in total.inputs)
        ):
            continue
        eps = float(node.number("epsilon", 1e-5))
        outputs = [node.outputs[0], "", "", total.outputs[0]]
        skip = Node.of(
            "SkipLayerNormalization", [*total.inputs, *node.inputs[1:]], outputs, domain=CONTRIB, epsilon=eps
        )
        graph.nodes[graph.nodes.index(total)] = skip
        graph.nodes.remove(node)
        fused += 1
    return fused


def widen_memory(graph: Graph) -> int:
    """Replace one-dimensional depthwise convolutions by two-dimensional ones; rounds differently."""
    producers, consumers = graph.producers, graph.consumers
    widened = 0
    for conv in [node for node in graph.nodes if node.op == "Conv"]:
        weight = graph.constants.get(conv.inputs[1])
        before, after = producers.get(conv.inputs[0]), _only(consumers.get(conv.outputs[0], []))
        if weight is None or weight.ndim != 3 or conv.number("group", 1) != len(weight) or weight.shape[1] != 1:
            continue
        if (
            before is None
            or after is None
            or any(node.op != "Transpose" or node.numbers("perm") != [0, 2, 1] for node in (before, after))
        ):
            continue
        channels, _, taps = weight.shape
        same_length = taps % 2 == 1 and conv.numbers("pads") == [taps // 2] * 2
        if not same_length or conv.numbers("strides") not in ([], [1]) or conv.numbers("dilations") not in ([], [1]):
            continue
        source, result = before.inputs[0], after.outputs[0]
        added = _only(consumers.get(result, []))
        if added is not None and added.op == "Add" and set(added.inputs) == {source, result}:
            weight = weight.copy()
            weight[:, 0, taps // 2] += 1
            result = added.outputs[0]
        else:
            added = None
        _put_wide(graph, conv, (before, after, added), source, result, weight.reshape(channels, 1, 1, taps))
        widened += 1
    graph.drop_unused()
    return widened


def _put_wide(
    graph: Graph, conv: Node, around: tuple[Node, Node, Node | None], source: str, result: str, weight: NDArray[Any]
) -> None:
    """Write the two-dimensional convolution of ``source`` in the place of the other."""
    channels, _, _, taps = weight.shape
    name = conv.outputs[0]
    graph.constants[f"{name}/weight"] = weight
    wide, narrow = (_shape(graph, 1, 1, -1, channels), _shape(graph, 1, -1, channels))
    convolve = Node.of(
        "Conv",
        [f"{name}/in", f"{name}/weight", *conv.inputs[2:]],
        [f"{name}/out"],
        group=channels,
        kernel_shape=(1, taps),
        pads=(0, taps // 2, 0, taps // 2),
        strides=(1, 1),
        dilations=(1, 1),
    )
    at = graph.nodes.index(around[1])
    graph.nodes[at : at + 1] = [
        Node.of("Reshape", [source, wide], [f"{name}/wide"]),
        Node.of("Transpose", [f"{name}/wide"], [f"{name}/in"], perm=(0, 3, 1, 2)),
        convolve,
        Node.of("Transpose", [f"{name}/out"], [f"{name}/back"], perm=(0, 2, 3, 1)),
        Node.of("Reshape", [f"{name}/back", narrow], [result]),
    ]
    for node in (conv, around[2]):
        if node is not None:
            graph.nodes.remove(node)


def thin_attention(graph: Graph) -> int:
    """Multiply heads where they lie, [frames, heads, width]; rounds differently."""
    producers, consumers = graph.producers, graph.consumers
    thinned = 0
    for softmax in [node for node in graph.nodes if node.op == "Softmax"]:
        scores, mixed = producers.get(softmax.inputs[0]), _only(consumers.get(softmax.outputs[0], []))
        if scores is None or mixed is None or not _multiplies(scores) or mixed.op != "MatMul":
            continue
        query, key = (_heads(graph, producers, name) for name in scores.inputs)
        value = _heads(graph, producers, mixed.inputs[1])
        joined = _joined(consumers, mixed)
        if query is None or key is None or value is None or joined is None or len({query[1:3], key[1:3]}) != 1:
            continue
        if query[3] != [0, 2, 1, 3] or value[3] != [0, 2, 1, 3] or key[3] != _key_perm(scores):
            continue
        scale = float(scores.number("alpha", 1.0) * query[4] * key[4])
        _put_thin(graph, (scores, softmax, mixed, *joined), (query[0], key[0], value[0]), query[1:3], value[2], scale)
        thinned += 1
    graph.drop_unused()
    return thinned


_Heads = tuple[str, int, int, list[int], float]
"""(value [1, frames, heads * width], heads, width, how it is turned, factor)."""


def _multiplies(node: Node) -> bool:
    """Whether a node multiplies matrices, its batch dimensions as they are."""
    plain = all(not node.number(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    return node.op == "MatMul" or (node.op == "FusedMatMul" and plain)


def _key_perm(scores: Node) -> list[int]:
    return [0, 2, 1, 3] if scores.number("transB", 0) else [0, 2, 3, 1]


def _heads(graph: Graph, producers: dict[str, Node], name: str) -> _Heads | None:
    """Where heads come from, through an optional factor, a transposition and a reshape."""
    factor = 1.0
    node = producers.get(name)
    if node is not None and node.op == "Mul":
        scalars = [_scalar(graph, each) for each in node.inputs]
        if scalars[0] is None and scalars[1] is not None:
            factor, node = scalars[1], producers.get(node.inputs[0])
    if node is None or node.op != "Transpose":
        return None
    reshape = producers.get(node.inputs[0])
    if reshape is None or reshape.op != "Reshape":
        return None
    shape = _last_two(graph, producers, reshape.inputs[1])
    return None if shape is None else (reshape.inputs[0], *shape, node.numbers("perm"), factor)


def _last_two(graph: Graph, producers: dict[str, Node], name: str) -> tuple[int, int] | None:
    """The last two of four dimensions of a shape that is a constant or put together of constants at its end."""
    known = graph.constants.get(name)
    made = producers.get(name)
    if known is None and made is not None and made.op == "Concat" and len(made.inputs) == 4:
        ends = [graph.constants.get(each) for each in made.inputs[2:]]
        known = np.concatenate([[0, 0], *ends]) if ends[0] is not None and ends[1] is not None else None
    return (int(known[2]), int(known[3])) if known is not None and known.shape == (4,) and known.min() >= 0 else None


def _joined(consumers: dict[str, list[Node]], mixed: Node) -> tuple[Node, Node] | None:
    """The transposition and the reshape that put heads side by side again."""
    turn = _only(consumers.get(mixed.outputs[0], []))
    if turn is None or turn.op != "Transpose" or turn.numbers("perm") != [0, 2, 1, 3]:
        return None
    join = _only(consumers.get(turn.outputs[0], []))
    return (turn, join) if join is not None and join.op == "Reshape" else None


def _put_thin(
    graph: Graph,
    old: tuple[Node, Node, Node, Node, Node],
    sources: tuple[str, str, str],
    heads_width: tuple[int, int],
    value_width: int,
    scale: float,
) -> None:
    """Write attention over [frames, heads, width] in the place of the old nodes."""
    scores, softmax, mixed, turn, join = old
    heads, width = heads_width
    query, key, value = (f"{scores.outputs[0]}/{part}" for part in ("query", "key", "value"))
    shapes = [_shape(graph, -1, heads, each) for each in (width, width, value_width)]
    product = Node.of(
        "FusedMatMul", [query, key], scores.outputs, CONTRIB, alpha=scale, transB=1, transBatchA=1, transBatchB=1
    )
    at = graph.nodes.index(join)
    graph.nodes[at : at + 1] = [
        *(
            Node.of("Reshape", [s, shape], [to])
            for s, shape, to in zip(sources, shapes, (query, key, value), strict=True)
        ),
        product,
        Node.of("Softmax", softmax.inputs, softmax.outputs, axis=-1),
        Node.of("FusedMatMul", [softmax.outputs[0], value], mixed.outputs, CONTRIB, transBatchB=1),
        Node.of("Transpose", mixed.outputs, turn.outputs, perm=(1, 0, 2)),
        Node.of("Reshape", [turn.outputs[0], _shape(graph, 1, -1, heads * value_width)], join.outputs),
    ]
    for node in (scores, softmax, mixed, turn):
        graph.nodes.remove(node)


def end_in_log_posteriors(graph: Graph) -> int:
    """Normalise the output; rounds differently."""
    graph.outputs = {LOG_POSTERIORS: graph.outputs[LOGITS]}
    graph.nodes.append(Node.of("LogSoftmax", [LOGITS], [LOG_POSTERIORS], axis=-1))
    return 1


def _only(nodes: list[Node]) -> Node | None:
    return nodes[0] if len(nodes) == 1 else None


def _shape(graph: Graph, *dimensions: int) -> str:
    name = "shape/" + "_".join(map(str, dimensions))
    graph.constants[name] = np.array(dimensions, np.int64)
    return name


EXACT: Final[tuple[Pass, ...]] = (drop_mask,)
"""Passes that leave every bit of the result as it was, on every CPU."""

WITH_VNNI: Final[tuple[Pass, ...]] = (sign_weights,)
"""Those that do so, and pay, where the CPU has VNNI."""

CLOSE: Final[tuple[Pass, ...]] = (fuse_normalization, widen_memory, thin_attention, end_in_log_posteriors)
"""Passes that round differently; to be made after the exact ones."""
