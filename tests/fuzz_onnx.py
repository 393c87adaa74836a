"""Mutations of ONNX graphs, and the judge of what becomes of each: an equal answer or a TilewrightError."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from benchmarks import exports
from tests import oracle, tiny
from tilewright.codegen.model import EncoderModel
from tilewright.errors import TilewrightError
from tilewright.frontend import load

Mutation = Callable[[onnx.ModelProto, Random], None]

LENGTHS = (31, 12, 2)  # none of those that the self-check uses
NUMBERS = (-1, 0, 1, 2, 3, 7, 16, 2**31 - 1, -(2**63))


def bases(directory: Path) -> list[Path]:
    """The graphs that are mutated: float with several heads, static QDQ, dynamic INT8."""
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, outputs in (
            ("BertModel", ["last_hidden_state"]),
            ("DistilBertForSequenceClassification", ["logits"]),
            ("DistilBertForQuestionAnswering", ["start_logits", "end_logits"]),
        ):
            made.append(tiny.export(tiny.build(name), directory / f"{name}.onnx", outputs, types=name == "BertModel"))
        made.append(tiny.quantize(made[1], directory / "qdq.onnx"))
        made.append(exports.quantize_dynamic(made[0], directory / "dynamic.onnx"))
    return made


def mutated(base: Path, random: Random) -> bytes:
    """The file `base` with one to three mutations of its graph or, one time in eight, of its bytes."""
    if random.randrange(8) == 0:
        return _bytes(base.read_bytes(), random)
    model = onnx.load(base)
    for _ in range(random.randint(1, 3)):
        random.choice(MUTATIONS)(model, random)
    return model.SerializeToString()


def judge(path: Path) -> str:
    """Load `path`: "refused", or "answered" where the model agrees with ONNX Runtime; else raises AssertionError.

    A graph that ONNX Runtime does not take, as for what is wrong in parts that lead to no output, is "unjudged".
    """
    try:
        model = load(path)
    except TilewrightError as error:
        assert str(error) and "\n" not in str(error), f"not one line: {error!r}"
        return "refused"
    try:
        session = _session(path)
    except Exception:  # onnxruntime has no base class of its own errors
        return "unjudged"
    ids, mask = _batch(model, session)
    ours = oracle.forward_float(model, [row[:length] for row, length in zip(ids, mask.sum(1), strict=True)])
    tolerance = 0.5 if any(node.op_type == "MatMulInteger" for node in onnx.load(path).graph.node) else 2e-3
    try:
        theirs_by_name = _run(model, session, ids, mask)
    except Exception:  # as above
        return "unjudged"
    for name, expected in theirs_by_name.items():
        for row, length, found in zip(expected, mask.sum(1), ours, strict=True):
            per_token = found[name].shape[:1] == (length,) and len(row) == ids.shape[1]
            theirs = row[:length] if per_token else row
            assert found[name].shape == theirs.shape, f"{name} is {found[name].shape}, in the graph {theirs.shape}"
            error = np.linalg.norm(found[name] - theirs) / max(float(np.linalg.norm(theirs)), 1e-9)
            assert error <= tolerance, f"{name}: relative error {error:.3g}"
    return "answered"


def _session(path: Path) -> onnxruntime.InferenceSession:
    """The graph in ONNX Runtime, unfused, without the Q/DQ pairs on its activations: their ranges are part of no answer."""
    model = onnx.load(path)
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        quantize = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            node.CopyFrom(onnx.helper.make_node("Identity", [quantize.input[0]], node.output))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def _run(
    model: EncoderModel, session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """Outputs of the graph by the names that the model's have; a pooler beside the hidden states is none of these."""
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    dtypes = {"float": np.float32, "double": np.float64, "int32": np.int32, "int8": np.int8, "uint8": np.uint8, "bool": bool}
    feed = {i.name: values[i.name].astype(dtypes.get(i.type[7:-1], np.int64)) for i in session.get_inputs()}
    outputs = session.run(None, feed)
    if model.head.kind == "question_answering":
        return dict(zip(("start_logits", "end_logits"), outputs, strict=True))
    if model.head.kind != "none":
        return {"logits": outputs[0]}
    tokens = [output for output in outputs if output.ndim == 3]
    return {"last_hidden_state": tokens[0]} if tokens else {"sentence_embedding": outputs[0]}


def _batch(model: EncoderModel, session: onnxruntime.InferenceSession) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [batch, tokens], of the shape that the graph takes."""
    shapes = [value.shape for value in session.get_inputs() if value.name == "input_ids"]
    batch, columns = (extent if isinstance(extent, int) else 0 for extent in shapes[0])
    lengths = [min(length, columns or model.config.max_positions) for length in (LENGTHS * 100)[: batch or len(LENGTHS)]]
    mask = (np.arange(columns or max(lengths)) < np.reshape(lengths, (-1, 1))).astype(np.int64)
    return np.random.default_rng(1).integers(1, model.config.vocab_size, mask.shape) * mask, mask


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    constants = [a.t for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    return [*model.graph.initializer, *constants]


def _replace(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def change_number(model: onnx.ModelProto, random: Random) -> None:
    """One element of an integer or scalar tensor."""
    small = [t for t in _tensors(model) if t.data_type in (6, 7) or not t.dims]
    if small:
        tensor = random.choice(small)
        array = numpy_helper.to_array(tensor).copy().reshape(-1)
        if array.size:
            limits = np.iinfo(array.dtype) if array.dtype.kind in "iu" else None
            value = random.choice(NUMBERS)
            array[random.randrange(array.size)] = value if limits is None else np.clip(value, limits.min, limits.max)
            _replace(tensor, array.reshape(tuple(tensor.dims)))


def change_values(model: onnx.ModelProto, random: Random) -> None:
    """All of a tensor: other values, another order, another shape."""
    tensor = random.choice(_tensors(model))
    array = numpy_helper.to_array(tensor)
    choices: list[Callable[[], np.ndarray]] = [
        lambda: array.T,
        lambda: array[1:] if array.ndim else array,
        lambda: array[None],
        lambda: array.reshape(-1),
        lambda: np.zeros_like(array),
        lambda: array[::-1] if array.ndim else array,
        lambda: array.astype(random.choice([np.float32, np.float64, np.float16, np.int8, np.int64])),
        lambda: np.concatenate([array, array]) if array.ndim else array,
        lambda: np.full_like(array, np.nan) if array.dtype.kind == "f" else array,
    ]
    with np.errstate(all="ignore"):
        _replace(tensor, random.choice(choices)())


def change_attribute(model: onnx.ModelProto, random: Random) -> None:
    """A number, or the numbers, of an operator's attribute; or the attribute goes."""
    node = random.choice([node for node in model.graph.node if node.attribute])
    attribute = random.choice(list(node.attribute))
    if random.randrange(4) == 0:
        node.attribute.remove(attribute)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = random.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = random.choice([0.0, -1.0, 0.5, 1e-3, float("nan"), float("inf")])
    elif attribute.type == onnx.AttributeProto.INTS:
        values = list(attribute.ints)
        random.shuffle(values)
        del attribute.ints[:]
        attribute.ints.extend(values[random.randrange(2) :])


def rewire(model: onnx.ModelProto, random: Random) -> None:
    """An operator reads another value."""
    values = [name for node in model.graph.node for name in node.output] + [t.name for t in model.graph.initializer]
    values += [value.name for value in model.graph.input] + [""]
    node = random.choice([node for node in model.graph.node if node.input])
    node.input[random.randrange(len(node.input))] = random.choice(values)


def swap_inputs(model: onnx.ModelProto, random: Random) -> None:
    """Two inputs of an operator change places."""
    nodes = [node for node in model.graph.node if len(node.input) > 1]
    if nodes:
        node = random.choice(nodes)
        first, second = random.sample(range(len(node.input)), 2)
        node.input[first], node.input[second] = node.input[second], node.input[first]


def swap_values(model: onnx.ModelProto, random: Random) -> None:
    """What read one value reads another of the same operator's kind, and the other way round."""
    op = random.choice([node.op_type for node in model.graph.node])
    outputs = [node.output[0] for node in model.graph.node if node.op_type == op and node.output]
    first, second = random.choice(outputs), random.choice(outputs)
    exchange = {first: second, second: first}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = exchange.get(name, name)


def change_operator(model: onnx.ModelProto, random: Random) -> None:
    """An operator becomes another."""
    others = (
        "Add",
        "Mul",
        "Sub",
        "Div",
        "Identity",
        "Relu",
        "Tanh",
        "Erf",
        "Softmax",
        "MatMul",
        "Sqrt",
        "Sigmoid",
        "Abs",
        "Neg",
    )
    random.choice(list(model.graph.node)).op_type = random.choice(others)


def drop_node(model: onnx.ModelProto, random: Random) -> None:
    """An operator is left out, its first input read in its place."""
    node = random.choice([node for node in model.graph.node if node.input and node.output])
    for other in model.graph.node:
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = node.input[0]
    model.graph.node.remove(node)


def insert_operator(model: onnx.ModelProto, random: Random) -> None:
    """A value goes through one more operator."""
    ops = ("Relu", "Neg", "Abs", "Tanh", "Identity", "Sigmoid", "Softmax", "Erf", "Cast", "Round", "Dropout")
    index = random.randrange(len(model.graph.node))
    value = model.graph.node[index].output[0]
    op = random.choice(ops)
    attributes = {"to": random.choice([1, 6, 7, 9, 10, 11])} if op == "Cast" else {}
    added = onnx.helper.make_node(op, [value], [f"{value}/{op}{random.randrange(10**6)}"], **attributes)
    for other in list(model.graph.node)[index + 1 :]:
        for place, name in enumerate(other.input):
            if name == value:
                other.input[place] = added.output[0]
    model.graph.node.insert(index + 1, added)


def change_outputs(model: onnx.ModelProto, random: Random) -> None:
    """The graph's outputs are others, or in another order."""
    outputs = model.graph.output
    if len(outputs) > 1 and random.randrange(2):
        names = [output.name for output in outputs]
        for output, name in zip(outputs, names[::-1], strict=True):
            output.name = name
    else:
        random.choice(list(outputs)).name = random.choice([name for node in model.graph.node for name in node.output])


def change_inputs(model: onnx.ModelProto, random: Random) -> None:
    """The type, shape or name of an input of the graph."""
    value = random.choice(list(model.graph.input))
    kind = random.randrange(3)
    if kind == 0:
        value.type.tensor_type.elem_type = random.choice([1, 2, 6, 7, 9])
    elif kind == 1 and value.type.tensor_type.shape.dim:
        random.choice(list(value.type.tensor_type.shape.dim)).dim_value = random.choice([0, 1, 5, 32, 1 << 20])
    else:
        value.name = random.choice(["input_ids", "attention_mask", "token_type_ids", "other"])


def change_opset(model: onnx.ModelProto, random: Random) -> None:
    """The version of the operator set."""
    model.opset_import[0].version = random.randrange(9, 25)


MUTATIONS: tuple[Mutation, ...] = (
    change_number,
    change_values,
    change_attribute,
    rewire,
    swap_inputs,
    swap_values,
    change_operator,
    drop_node,
    insert_operator,
    change_outputs,
    change_inputs,
    change_opset,
)


def _bytes(content: bytes, random: Random) -> bytes:
    if random.randrange(2):
        return content[: random.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(random.randint(1, 20)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)
