"""Files of whole models that would run code or touch files: nothing of them happens."""

import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust.checkpoint import CheckpointError, load_checkpoint
from robust.loading import ModelOptions
from robust.loading.script import FILE_OPERATIONS
from tests.robust.test_inference import images

SIDE = 16
Edit = Callable[[bytes, Path], bytes]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3)) * self.scale


class MakesFolder:
    """A pickle that creates a folder when it is loaded unsafely."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def edited(path: Path, edits: dict[str, Edit], target: Path) -> None:
    """Replace members, by the end of their names, with what each edit makes of them."""
    left = set(edits)
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as written:
        for name in archive.namelist():
            content = archive.read(name)
            for ending, edit in edits.items():
                if name.endswith(ending):
                    content = edit(content, target)
                    left.discard(ending)
            written.writestr(name, content)
    assert not left
    path.write_bytes(copy.getvalue())


# torch.export


def save_exported(network: nn.Module, path: Path, *, decomposed: bool = False) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network.eval(), (images(2, SIDE),), dynamic_shapes=shapes)
    torch.export.save(program.run_decompositions() if decomposed else program, path)


class Block(nn.Module):
    """The operations of common networks that are special in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        tokens = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        first, second = tokens.reshape(n * 2, 8, 8).view(n, 16, 8).chunk(2, dim=1)
        tokens = torch.cat([first, nn.functional.gelu(second, approximate="tanh")], dim=1)
        heads = tokens.view(n, 16, 2, 4).transpose(1, 2)
        heads = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        tokens = tokens + heads.transpose(1, 2).reshape(n, 16, 8)
        _, largest = tokens.max(dim=1)
        ramp = torch.arange(8, dtype=torch.float32) / 8
        logits: Tensor = self.head(tokens.mean(dim=1) + ramp + 0.1 * largest.float())
        return logits


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("make", [Network, Block])
def test_exported_graphs_compute_the_same(
    make: type[nn.Module], decomposed: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = make()
    save_exported(network, tmp_path / "model.pt2", decomposed=decomposed)
    loaded = load_checkpoint(tmp_path / "model.pt2")
    assert loaded.sidecar.architecture.input_size == SIDE
    assert loaded.guessed == {"mean": "assumed", "std": "assumed", "classes": "assumed"}
    x = images(5, SIDE).requires_grad_()
    expected, found = network(x), loaded.classifier(x)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(logits.square().sum(), x)[0] for logits in (found, expected)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(CheckpointError, match=r"expected images \(N, 3, 16, 16\), got"):
        load_checkpoint(tmp_path / "model.pt2", options=ModelOptions(input_size=24))
    # Everything follows the images to another device: no tensor is left on the CPU.
    assert loaded.classifier.to("meta")(images(2, SIDE).to("meta")).shape == (2, 4)


def test_exported_graph_for_a_fixed_number_of_images(tmp_path: Path) -> None:
    program = torch.export.export(Network().eval(), (images(2, SIDE),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match=r"dynamic_shapes.*inputs of shape \(2, 3, 16, 16\)"):
        load_checkpoint(tmp_path / "model.pt2")


def test_exported_model_in_training_mode(tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Network().train(), (images(2, SIDE),), dynamic_shapes=shapes)
    torch.export.save(program.run_decompositions(), tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match=r"outputs buffer mutation, .*in eval mode"):
        load_checkpoint(tmp_path / "model.pt2")


def changed(change: Callable[[dict[str, Any], Path], None]) -> Edit:
    """An edit of JSON."""

    def edit(content: bytes, target: Path) -> bytes:
        values = json.loads(content)
        change(values, target)
        return json.dumps(values).encode()

    return edit


def call_function(values: dict[str, Any], target: Path) -> None:
    graph = values["graph_module"]["graph"]
    argument = {"name": "", "arg": {"as_string": str(target)}, "kind": 1}
    call = {"target": "torch.serialization.os.mkdir", "inputs": [argument]}
    call |= {"outputs": [], "metadata": {}, "is_hop_single_tensor_return": None}
    graph["nodes"].insert(0, call)


def call_file_operation(values: dict[str, Any], target: Path) -> None:
    arguments = {"filename": {"as_string": str(target)}, "shared": {"as_bool": True}}
    arguments["size"] = {"as_int": 8}
    inputs = [{"name": key, "arg": arg, "kind": 1} for key, arg in arguments.items()]
    call = {"target": "torch.ops.aten.from_file.default", "inputs": inputs, "metadata": {}}
    call |= {"outputs": [{"as_tensor": {"name": "opened"}}], "is_hop_single_tensor_return": None}
    graph = values["graph_module"]["graph"]
    graph["nodes"].insert(0, call)
    graph["tensor_values"]["opened"] = next(iter(graph["tensor_values"].values()))


def code_in_a_size(values: dict[str, Any], target: Path) -> None:
    code = f"__import__('os').mkdir({str(target)!r})"
    for meta in values["graph_module"]["graph"]["tensor_values"].values():
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = code


def code_in_a_guard(values: dict[str, Any], target: Path) -> None:
    values["guards_code"] = [f"__import__('os').mkdir({str(target)!r})"]


def code_in_an_argument(values: dict[str, Any], target: Path) -> None:
    node = values["graph_module"]["graph"]["nodes"][0]
    name = f"a=__import__('os').mkdir({str(target)!r}), b"
    node["inputs"].append({"name": name, "arg": {"as_int": 1}, "kind": 2})


def unpickled(values: dict[str, Any], target: Path) -> None:
    entry = next(iter(values["config"].values()))
    entry["use_pickle"] = True


def opaque(values: dict[str, Any], target: Path) -> None:
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
    values["config"]["thing"] = meta | {"tensor_meta": None}


def pickled(content: bytes, target: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(MakesFolder(target), buffer)
    return buffer.getvalue()


GRAPH, WEIGHTS = "models/model.json", "model_weights_config.json"
EXPORTED: dict[str, tuple[dict[str, Edit], str | None]] = {
    "a function": ({GRAPH: changed(call_function)}, r"operation torch\.serialization\.os\.mkdir"),
    "a file operation": ({GRAPH: changed(call_file_operation)}, "aten.from_file"),
    "a size": ({GRAPH: changed(code_in_a_size)}, None),  # not needed, and never read
    "a guard": ({GRAPH: changed(code_in_a_guard)}, None),
    "an argument": ({GRAPH: changed(code_in_an_argument)}, "unknown arguments"),
    "sample inputs": ({"sample_inputs/model.pt": pickled}, None),
    "weights": ({WEIGHTS: changed(unpickled), "weight_0": pickled}, "which is pickled; .*file.py"),
    "a constant": ({"model_constants_config.json": changed(opaque)}, "thing, which is pickled"),
}


def test_exported_file_that_is_trusted_loads_in_code(tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    network = Network().eval()
    program = torch.export.export(network, (images(2, SIDE),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    code = (
        f"import torch\ndef make():\n    return torch.export.load({str(tmp_path / 'model.pt2')!r})"
    )
    (tmp_path / "mine.py").write_text(f"{code}.module()\n")
    options = ModelOptions(input_size=SIDE)
    loaded = load_checkpoint(f"{tmp_path / 'mine.py'}:make", options=options)
    x = images(3, SIDE)
    torch.testing.assert_close(loaded.classifier(x), network(x))


@pytest.mark.parametrize("part", EXPORTED)
def test_no_part_of_an_exported_file_runs(part: str, tmp_path: Path) -> None:
    path, target = tmp_path / "stranger.pt", tmp_path / "made"
    save_exported(Network(), tmp_path / "model.pt2")
    (tmp_path / "model.pt2").rename(path)
    edits, words = EXPORTED[part]
    edited(path, edits, target)
    if words is None:
        load_checkpoint(path)
    else:
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(path)
    assert not target.exists()


# TorchScript


def save_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.script(Network().eval()).save(str(path))  # type: ignore[no-untyped-call]


def test_torchscript_with_newer_operations(tmp_path: Path) -> None:
    layers = nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(*layers).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(tmp_path / "model.pt"))  # type: ignore[no-untyped-call]
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert any(name.endswith("/.data/version") for name in archive.namelist())
    loaded = load_checkpoint(tmp_path / "model.pt")
    x = images(3, 32)
    torch.testing.assert_close(loaded.classifier(x), network(x))


def in_forward(statement: str) -> Edit:
    def edit(code: bytes, target: Path) -> bytes:
        head, found, body = code.decode().partition("    x: Tensor) -> Tensor:\n")
        if not found:
            return code
        return f"{head}{found}    {statement.format(target)}\n{body}".encode()

    return edit


def as_default(code: bytes, target: Path) -> bytes:
    default = f'Tensor=torch.from_file("{target}", True, 8)'
    return code.replace(b"    x: Tensor) ->", f"    x: Tensor,\n    y: {default}) ->".encode(), 1)


ADDED = "x = torch.add(x, torch.sum({}))"
SCRIPTS: dict[str, tuple[Edit, str]] = {
    "a function": (
        in_forward(ADDED.format('torch.from_file("{0}", True, 8)')),
        "operation from_file",
    ),
    "a function that saves": (in_forward('torch.save(x, "{0}")'), "operation save"),
    "a function by another name": (
        in_forward("t = torch; " + ADDED.format('t.from_file("{0}", True, 8)')),
        "operation from_file",
    ),
    "a name in parts": (
        in_forward(ADDED.format('getattr(torch, "from_" "file")("{0}", True, 8)')),
        "an unknown use of getattr",
    ),
    "getattr by another name": (
        in_forward("g = getattr; " + ADDED.format('g(torch, "from_" "file")("{0}", True, 8)')),
        "an unknown use of getattr",
    ),
    "another namespace": (
        in_forward('ops.image.write_file("{0}", torch.zeros([3], dtype=0))'),
        "an unknown use of ops",
    ),
    "a class": (in_forward("y = __torch__.torch.classes.any.Thing()"), "a class written in C"),
    "a default": (as_default, "operation from_file"),
    "text that Python can't read": (in_forward("y = ("), "that is none"),
}


@pytest.mark.parametrize("form", SCRIPTS)
def test_torchscript_that_touches_files_is_refused(form: str, tmp_path: Path) -> None:
    path, target = tmp_path / "model.pt", tmp_path / "made"
    save_script(path)
    load_checkpoint(path, options=ModelOptions(input_size=SIDE))
    edit, words = SCRIPTS[form]
    edited(path, {".py": edit}, target)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path, options=ModelOptions(input_size=SIDE))
    assert not target.exists()


def test_torchscript_with_two_members_of_a_name_is_refused(tmp_path: Path) -> None:
    save_script(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt", "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith(".py"))
        archive.writestr(name.upper(), archive.read(name))
    with pytest.raises(CheckpointError, match="two members of the same name"):
        load_checkpoint(tmp_path / "model.pt")


def test_code_outside_of_torchscripts_folder_is_ignored(tmp_path: Path) -> None:
    save_script(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt", "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        older = {"mainModule": {"torchscriptArena": {"key": "other.txt"}}, "protoVersion": "6"}
        archive.writestr(f"{root}/model.json", json.dumps(older))  # of torch 1.0
        archive.writestr(f"{root}/other.txt", "torch.save(0, 'made')")
    load_checkpoint(tmp_path / "model.pt", options=ModelOptions(input_size=SIDE))


def test_every_file_operation_of_torch_is_known() -> None:
    """In the namespaces that a model may use, by the names of arguments."""
    found = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(("aten::", "prim::", "quantized::", "torchvision::"))
        and any(
            word in argument.name and str(argument.type) == "str"
            for argument in schema.arguments
            for word in ("file", "path", "dir")
        )
    }
    assert found == FILE_OPERATIONS
