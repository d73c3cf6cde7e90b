"""Reads a torch.export file without running anything in it.

`torch.export.load` unpickles objects and evaluates text from the file. This reader takes only the
graph, which is JSON, and the weights, which are raw bytes, and builds the graph anew from torch's
own operations.
"""

from __future__ import annotations

import io
import json
import math
import operator
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from robust.loading.errors import CheckpointError
from robust.loading.script import FILE_OPERATIONS, IN_PYTHON

FORMAT = "archive_format"  # name of the member that marks such a file
VERSION = 8  # of the graph's schema
_OPERATION = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
# Of sizes, when the graph is for any number of images.
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            *("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "and_", "or_"),
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"),
        )
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_not", "sym_int", "sym_float", "sym_max", "sym_min", "sym_ite")
    },
    "math.trunc": math.trunc,
}
# The numbers are those of torch/_export/serde/schema.py.
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda value: None,
    "as_int": int,
    "as_float": float,
    "as_bool": bool,
    "as_string": str,
    "as_ints": lambda value: [int(item) for item in value],
    "as_floats": lambda value: [float(item) for item in value],
    "as_bools": lambda value: [bool(item) for item in value],
    "as_scalar_type": lambda value: _DTYPES[value],
    "as_memory_format": lambda value: _MEMORY[value],
    "as_layout": lambda value: {7: torch.strided}[value],
}


class ExportedNetwork(nn.Module):
    """A graph from a file, which checks that images have the sizes it was made for."""

    def __init__(self, graph: fx.GraphModule, sizes: tuple[int | None, ...]) -> None:
        super().__init__()
        self.graph, self.sizes = graph, sizes
        self.input_size = sizes[2] if sizes[2] == sizes[3] else None

    def forward(self, x: Tensor) -> Tensor:
        if any(size not in (None, side) for size, side in zip(self.sizes, x.shape, strict=True)):
            made_for = ", ".join("N" if size is None else str(size) for size in self.sizes)
            raise ValueError(f"expected images ({made_for}), got {tuple(x.shape)}")
        logits: Tensor = self.graph(x)
        return logits


def read_exported(path: Path, data: bytes) -> ExportedNetwork:
    """The network in a torch.export file. Raises CheckpointError if it needs more than a graph.

    A broken file raises exceptions of all kinds.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return _Reader(path, archive).network()


class _Reader:
    """Builds the graph; `values` has the nodes by their names in the file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.names = set(archive.namelist())
        self.root = next(name for name in self.names if name.endswith(f"/{FORMAT}"))[: -len(FORMAT)]
        self.graph, self.values = fx.Graph(), dict[str, fx.Node]()

    def refused(self, found: str) -> CheckpointError:
        return CheckpointError(
            self.path, "a graph from images to logits", f"{found[:200]}; {IN_PYTHON}"
        )

    def network(self) -> ExportedNetwork:
        program = json.loads(self.archive.read(f"{self.root}models/model.json"))
        version = program["schema_version"]["major"]
        if version != VERSION:
            raise self.refused(f"version {version} of torch.export's schema instead of {VERSION}")
        graph = program["graph_module"]["graph"]
        signature = program["graph_module"]["signature"]
        tensors, images = self.inputs(signature["input_specs"], graph["inputs"])
        for node in graph["nodes"]:
            self.add(node)
        kinds = [kind for spec in signature["output_specs"] for kind in spec]
        if kinds != ["user_output"]:
            found = ", ".join(kind.replace("_", " ") for kind in kinds)
            raise self.refused(f"the outputs {found} (export one tensor, in eval mode)")
        self.graph.output(self.argument(graph["outputs"][0]))
        sizes = tuple(size.get("as_int") for size in graph["tensor_values"][images]["sizes"])
        if len(sizes) != 4 or sizes[0] is not None:
            expected = "a graph for any number of images: export it with dynamic_shapes="
            expected += "({0: torch.export.Dim('batch')},)"
            raise CheckpointError(self.path, expected, f"one for inputs of shape {sizes}")
        return ExportedNetwork(fx.GraphModule(tensors, self.graph), sizes)

    def inputs(self, specs: Any, entries: Any) -> tuple[dict[str, Tensor], str]:
        """The tensors by their new names, and the name of the images in the file."""
        weights, constants = self.tensors("weights"), self.tensors("constants")
        found: dict[str, Tensor] = {}
        images = []
        for spec, entry in zip(specs, entries, strict=True):
            ((kind, value),) = spec.items()
            if "as_tensor" not in entry:
                raise self.refused(f"an input {', '.join(entry)}")
            name = entry["as_tensor"]["name"]
            if kind == "user_input":
                images.append(name)
                self.values[name] = self.graph.placeholder("images")
                continue
            if kind not in ("parameter", "buffer", "tensor_constant"):
                raise self.refused(f"an input {kind}")
            key, target = value[f"{kind}_name"], f"tensor{len(found)}"
            found[target] = weights[key] if key in weights else constants[key]
            self.values[name] = self.graph.get_attr(target)
        if len(images) != 1:
            raise self.refused(f"{len(images)} inputs")
        return found, images[0]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """The weights or constants, by their names."""
        folder = f"{self.root}data/{kind}/"
        older = f"{folder}model.pt"
        if older in self.names:
            file = io.BytesIO(self.archive.read(older))
            loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
            return loaded
        config = json.loads(self.archive.read(f"{folder}model_{kind}_config.json"))["config"]
        flat: dict[str, Tensor] = {}  # several tensors may share a member
        found = {}
        for name, entry in config.items():
            member, meta = entry["path_name"], entry["tensor_meta"]
            if entry["use_pickle"] or meta is None:
                raise self.refused(f"{name}, which is pickled")
            dtype, sizes = _DTYPES[meta["dtype"]], [size["as_int"] for size in meta["sizes"]]
            if member not in flat:
                raw = bytearray(self.archive.read(folder + member))
                flat[member] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0)
            if 0 in sizes:
                found[name] = torch.zeros(sizes, dtype=dtype)
                continue
            strides = [stride["as_int"] for stride in meta["strides"]]
            offset = meta["storage_offset"]["as_int"]
            found[name] = flat[member].view(dtype).as_strided(sizes, strides, offset)
        return found

    def add(self, node: Any) -> None:
        """Add the call of an operation to the graph."""
        target = node["target"]
        given = [(item["name"], self.argument(item["arg"])) for item in node["inputs"]]
        if target in _ARITHMETIC:
            made = self.graph.call_function(_ARITHMETIC[target], tuple(v for _, v in given))
        else:
            operation, left = self.operation(target), dict(given)
            args: list[Any] = []
            for argument in operation._schema.arguments:
                if argument.kwarg_only or argument.name not in left:
                    break
                args.append(left.pop(argument.name))
            if left.keys() - {argument.name for argument in operation._schema.arguments}:
                raise self.refused(f"unknown arguments of {target}")  # names become code
            made = self.graph.call_function(operation, tuple(args), left)
        outputs = node["outputs"]
        if len(outputs) != 1:
            for index, output in enumerate(outputs):
                self.name(output, self.graph.call_function(operator.getitem, (made, index)))
        elif outputs:
            self.name(outputs[0], made)

    def operation(self, target: str) -> Any:
        """An operation of torch by its name, never another function."""
        match = _OPERATION.fullmatch(target)
        if match is None or match[1] in FILE_OPERATIONS:
            raise self.refused(f"the operation {target}")
        found = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
        if not isinstance(found, torch._ops.OpOverload):
            raise self.refused(f"the unknown operation {target}")
        return found

    def name(self, output: Any, node: fx.Node) -> None:
        """Remember the node, or its parts, under the names of an output."""
        ((kind, value),) = output.items()
        if kind == "as_tensors":
            for index, item in enumerate(value):
                part = self.graph.call_function(operator.getitem, (node, index))
                self.values[item["name"]] = part
        elif kind == "as_tensor":
            self.values[value["name"]] = node
        elif kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            self.values[value["as_name"]] = node
        elif kind != "as_none":
            raise self.refused(f"an output {kind}")

    def argument(self, entry: Any) -> Any:
        """The argument of an operation: plain values, and nodes of the graph."""
        ((kind, value),) = entry.items()
        if kind == "as_tensor":
            return self.values[value["name"]]
        if kind == "as_device":  # that of the images, wherever it was exported
            (images,) = (node for node in self.graph.nodes if node.op == "placeholder")
            return self.graph.call_function(getattr, (images, "device"))
        if kind == "as_name":
            return self.values[value]
        if kind == "as_tensors":
            return [self.values[item["name"]] for item in value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"):
            return self.argument(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools", "as_optional_tensors"):
            return [self.argument(item) for item in value]
        if kind not in _PLAIN:
            raise self.refused(f"an argument {kind}")
        return _PLAIN[kind](value)
