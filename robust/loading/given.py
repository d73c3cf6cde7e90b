"""Models that are not built from weights: user code, exported graphs, ONNX files."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust import files
from robust.attacks.checks import no_batch_norm_in_train_mode
from robust.attacks.passes import ModelError, logits_hint
from robust.classifier import Architecture, Classifier
from robust.digest import module_digest
from robust.loading.describe import ASSUMED, Described, check_classes
from robust.loading.errors import CheckpointError, first_line, of_model
from robust.loading.exported import FORMAT, ExportedNetwork, read_exported
from robust.loading.options import ModelOptions
from robust.loading.script import checked_script
from robust.loading.weights import is_ours, recorded_classes
from robust.networks.library import PREFIXES

Function = Callable[[Tensor], Tensor]
PROBED = 2  # random images passed to the model to find its number of classes
HASHED = 10  # logits of each that identify a model whose weights can't be hashed
# A Python file or a dotted module, and the model in it or a function that returns the model.
_CODE = re.compile(r"(?P<module>.+\.py|[A-Za-z_]\w*(\.\w+)*):(?P<function>[A-Za-z_]\w*)")

_BROKEN_ZIP = (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError)
# An entry with the key `location` in an ONNX file, and the length of its value, a file's name.
_EXTERNAL = re.compile(rb"\n\x08location\x12([\x80-\xff]?[\x00-\x7f])")
SERVICE = re.compile(r"oip\+(https?):/+")  # Path drops the second slash


@dataclass(frozen=True, kw_only=True)
class Given:
    """A callable model and its known properties."""

    kind: str
    function: Function
    sha256: str
    weights_hashed: bool = True  # whether a change of the weights changes sha256
    differentiable: bool = True
    unit_pixels: bool = False  # whether it is known to take images in [0, 1]
    input_size: int | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


class GivenNetwork(nn.Module):
    """A callable as a network: images float32 (N, 3, S, S) to logits (N, K).

    With `log`, probabilities are converted to their logarithms, which are valid logits.
    """

    def __init__(self, given: Given, *, log: bool) -> None:
        super().__init__()
        self.kind, self.differentiable, self.log = given.kind, given.differentiable, log
        self.sha256 = given.sha256
        # A module follows the classifier's device and eval mode.
        self.module = given.function if isinstance(given.function, nn.Module) else None
        self.function = given.function if self.module is None else None

    def forward(self, x: Tensor) -> Tensor:
        call = self.function if self.module is None else self.module
        assert call is not None
        logits: Tensor = call(x)
        return logits.clamp_min(torch.finfo(torch.float32).tiny).log() if self.log else logits

    def extra_repr(self) -> str:
        """Identifies a function, which has no weights."""
        return f"{self.kind}, sha256={self.sha256}"

    def __deepcopy__(self, memo: dict[int, Any]) -> GivenNetwork:
        """An inference copy shares objects that can't be copied: a session, connection, closure."""
        if self.module is None:
            return self
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._modules = {"module": _copied(self.module, memo)}
        return copied


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # modules can contain anything
        return module


def is_service(spec: str) -> bool:
    """Whether this is the URL of a service's model."""
    return SERVICE.match(spec) is not None


def shown(path: Path) -> str:
    """The path as the user wrote it, with both slashes of a service's URL."""
    return SERVICE.sub(r"oip+\1://", str(path))


def is_code(spec: str) -> bool:
    """Whether this names a model in Python code, or a function that returns one."""
    return _CODE.fullmatch(spec) is not None and not Path(spec).exists()


def open_code(spec: str) -> Given:
    """The model named by `spec`, or returned by the function of that name.

    Raises CheckpointError.
    """
    match = _CODE.fullmatch(spec)
    assert match is not None
    if spec.startswith(PREFIXES):
        raise CheckpointError(
            spec,
            "a weights file, with this name as --arch",
            "the name of a network",
        )
    name, attribute = match["module"], match["function"]
    module = _import(spec, name)
    make = getattr(module, attribute, None)
    if not callable(make):
        raise CheckpointError(
            spec, f"a function or nn.Module {attribute}", _listed(_models_in(module))
        )
    model = make if isinstance(make, nn.Module) else _call(spec, make, attribute)
    if not callable(model):
        raise CheckpointError(spec, "a callable from images to logits", f"a {type(model).__name__}")
    return Given(
        kind="python",
        function=_with_eval_mode(model),
        sha256=_digest(model, module),
        weights_hashed=isinstance(model, nn.Module),
        unit_pixels=True,
    )


def _with_eval_mode(model: Function) -> Function:
    """The model; a module without modes, as torch.export.load gives, as a function."""
    try:
        return model.eval() if isinstance(model, nn.Module) else model
    except NotImplementedError:
        return lambda x: model(x)


def _call(spec: str, make: Callable[..., Any], name: str) -> Any:
    try:
        signature = inspect.signature(make)
    except ValueError:  # some built-in functions have none
        return make()
    try:
        signature.bind()
    except TypeError:
        raise CheckpointError(
            spec,
            "a function without arguments that returns the model, or an nn.Module",
            f"{name}{signature}"[:100],
        ) from None
    return make()


def _models_in(module: Any) -> list[str]:
    """The public names of functions and classes that the module defines, and of its models."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and (value.__module__ == module.__name__ or isinstance(value, nn.Module))
    ]


def _models_in_source(source: bytes) -> list[str]:
    """The same by the text alone, which does not run: also names of other objects."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    for item in body:
        if isinstance(item, ast.FunctionDef | ast.ClassDef):
            found.append(item.name)
        elif isinstance(item, ast.Assign) and isinstance(item.value, ast.Call | ast.Lambda):
            found += [target.id for target in item.targets if isinstance(target, ast.Name)]
    return [name for name in found if not name.startswith("_")]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"


def open_file(path: Path, data: bytes) -> Given | None:
    """The model in an exported file; None if the file has only weights."""
    if path.suffix == ".py":
        raise CheckpointError(
            path,
            f"{path}:NAME with the name of an nn.Module or of a function that returns one",
            f"no name; the file defines {_listed(_models_in_source(data))}",
        )
    if path.suffix == ".onnx":
        return _open_onnx(path, data)
    if data[:2] != b"PK":
        return None
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except _BROKEN_ZIP:
        return None  # reading the weights will raise
    # Recognized by what torch looks for.
    if any(name.endswith(f"/{FORMAT}") for name in names):
        return _opened(path, "torch.export", read_exported, data)
    if any("/code/" in name for name in names):
        return _opened(path, "torchscript", _read_script, data)
    return None


def classifier_of(
    spec: str | Path, given: Given, options: ModelOptions
) -> tuple[Classifier, str, Described]:
    """The model as a classifier, its hash, and what is known of it.

    Calls the model to find its inputs and outputs. Raises CheckpointError.
    """
    for name in ("arch", "stem", "activation", "key"):
        if getattr(options, name) is not None:
            found = f"a whole {given.kind} model"
            raise CheckpointError(spec, f"weights for the option {name}", found)
    guessed: dict[str, str] = {}
    size = options.input_size or given.input_size
    if size is None:
        size, guessed["input_size"] = 32, ASSUMED
    output, sha256 = probe(spec, given.function, size), given.sha256
    if not given.weights_hashed:
        sha256 = _with_logits(sha256, output, probe(spec, given.function, size))
    notes = list(given.notes)
    probabilities = are_probabilities(output)
    if probabilities and given.differentiable:
        notes.append("it seems to return probabilities, but logits are expected")
    elif probabilities:
        notes.append("it returns probabilities: their logarithms are used as logits")
    if not given.differentiable:
        notes.append(f"{given.kind} models give no gradients: attacks that need them are refused")
    try:
        architecture = Architecture(
            arch=given.kind,
            stem="own",
            activation="own",
            num_classes=output.shape[1],
            input_size=size,
            mean=options.mean or (0.0, 0.0, 0.0),
            std=options.std or (1.0, 1.0, 1.0),
        )
    except ValueError as error:
        raise of_model(spec, error) from None
    if not given.unit_pixels:
        guessed |= {name: ASSUMED for name in ("mean", "std") if getattr(options, name) is None}
    classes = given.classes if options.classes is None else options.classes
    if classes is None:
        classes = tuple(map(str, range(architecture.num_classes)))
        guessed["classes"] = ASSUMED
    log = probabilities and not given.differentiable
    net = GivenNetwork(replace(given, sha256=sha256), log=log)
    described = Described(
        architecture=architecture,
        classes=check_classes(spec, classes, architecture),
        state={},
        guessed=guessed,
        notes=tuple(notes),
    )
    return Classifier(architecture, net=net), sha256, described


def are_probabilities(output: Tensor) -> bool:
    """Whether all rows of (N, K) are in [0, 1] and sum to 1."""
    total = output.double().sum(dim=1)
    return bool((output >= 0).all() and ((total - 1).abs() < 1e-3).all())


def probe(spec: str | Path, model: Function, size: int) -> Tensor:
    """The model's output for a few random images, always the same: finite (PROBED, K).

    Raises CheckpointError.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(PROBED, 3, size, size, generator=generator)
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad(), no_batch_norm_in_train_mode():
            output = model(x)
    except CheckpointError:
        raise
    except ModelError as error:
        raise of_model(spec, error) from None
    except Exception as error:  # the user's own code, or an image too small for a network
        raise CheckpointError(
            spec,
            f"a model that takes images {tuple(x.shape)}; for another size set --input-size",
            first_line(error),
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(x):
        found = f"{type(output).__name__}{logits_hint(output)}"
        if isinstance(output, Tensor):
            found = str(tuple(output.shape))
        raise CheckpointError(spec, f"logits ({len(x)}, K) of {len(x)} images", found)
    if not bool(output.isfinite().all()):
        raise CheckpointError(spec, "finite logits", "NaN or infinite ones")
    return output


def _import(spec: str, name: str) -> Any:
    if name.endswith(".py"):
        path = Path(name)
        unique = re.sub(r"\W", "_", str(path.resolve()))  # clashes with no other module
        loader = importlib.util.spec_from_file_location(unique, path)
        if not path.is_file() or loader is None or loader.loader is None:
            raise CheckpointError(spec, "a Python file", "none of that name")
        module = importlib.util.module_from_spec(loader)
        sys.modules[unique] = module  # where dataclasses look for the names in annotations
        try:
            with _importable(path.parent.resolve()):  # as `python file.py` does
                loader.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(unique, None)
            raise
        return module
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise CheckpointError(spec, f"a module {name}", str(error)) from None


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Import from `folder` first while the block runs; keeps what the user's code adds."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _digest(model: Any, module: Any) -> str:
    """SHA-256 of the model, if it is a module, and of the file of its code."""
    digest = hashlib.sha256()
    if isinstance(model, nn.Module):
        digest.update(module_digest(model).encode())
    source = getattr(module, "__file__", None)
    if source is not None:
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()


def _with_logits(sha256: str, first: Tensor, second: Tensor) -> str:
    """A hash that also changes with the logits, given for the same images in two passes.

    Rounded, as they differ a little between numbers of threads. Logits that differ in two passes
    are random and identify nothing.
    """
    scale = float(first.abs().max()) or 1.0
    if float((first - second).abs().max()) > 1e-4 * scale:
        return sha256
    rounded = (first[:, :HASHED] / scale * 1000).round().int().tolist()
    return hashlib.sha256(f"{sha256} {scale:.3g} {rounded}".encode()).hexdigest()


def _opened(path: Path, kind: str, read: Callable[[Path, bytes], Function], data: bytes) -> Given:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated
            function = read(path, data)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises all kinds of exceptions on a broken file
        found = f"a broken one ({first_line(error)})"
        raise CheckpointError(path, f"a {kind} file", found) from None
    return Given(
        kind=kind,
        function=function,
        sha256=hashlib.sha256(data).hexdigest(),
        input_size=function.input_size if isinstance(function, ExportedNetwork) else None,
    )


def _read_script(path: Path, data: bytes) -> Function:
    checked = io.BytesIO(checked_script(path, data))
    module: nn.Module = torch.jit.load(checked, map_location="cpu")  # type: ignore[no-untyped-call]
    return module.eval()


def _open_onnx(path: Path, data: bytes) -> Given:
    try:
        import onnxruntime
    except ImportError:
        raise CheckpointError(
            path, "the package onnxruntime for an ONNX file", "none: pip install 'robust[runtime]'"
        ) from None
    digest, settings = hashlib.sha256(data), onnxruntime.SessionOptions()
    for file in _external_files(path, data):
        digest.update(bytes.fromhex(files.sha256_file(file)))
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
    try:
        session = onnxruntime.InferenceSession(data, settings, ["CPUExecutionProvider"])
    except Exception as error:
        found = f"a broken one ({first_line(error)})"
        raise CheckpointError(path, "an ONNX file", found) from None
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
        raise CheckpointError(
            path, "one input float (N, 3, H, W) or (N, H, W, 3)", found or "no input"
        )
    entry, shape = inputs[0], inputs[0].shape
    names = [item.name for item in session.get_outputs()]
    output = "logits" if "logits" in names else names[0]
    channels_last = shape[1] != 3 and shape[3] == 3  # as in Keras and TensorFlow
    fixed = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None

    def run(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        (values,) = session.run([output], {entry.name: x})
        return np.asarray(values, dtype=np.float32)

    def function(x: Tensor) -> Tensor:
        pixels = (x.permute(0, 2, 3, 1) if channels_last else x).detach().cpu().contiguous().numpy()
        if fixed is None:
            return torch.from_numpy(run(pixels)).to(x.device)
        missing = -len(pixels) % fixed
        padded = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
        parts = [run(padded[start : start + fixed]) for start in range(0, len(padded), fixed)]
        return torch.from_numpy(np.concatenate(parts)[: len(pixels)]).to(x.device)

    side, about = shape[2], session.get_modelmeta().custom_metadata_map
    return Given(
        kind="onnx",
        function=function,
        sha256=digest.hexdigest(),
        differentiable=False,
        unit_pixels=is_ours(about),
        input_size=side if isinstance(side, int) and side > 0 else None,
        classes=recorded_classes(path, about) if is_ours(about) else None,
        notes=("its input has channels last",) if channels_last else (),
    )


def _external_files(path: Path, data: bytes) -> list[Path]:
    """The files beside an ONNX file that hold its weights, as torch.onnx.export writes them.

    Raises CheckpointError if one is missing.
    """
    names = set()
    for found in _EXTERNAL.finditer(data):
        length = sum((byte & 127) << 7 * index for index, byte in enumerate(found[1]))
        names.add(os.fsdecode(data[found.end() : found.end() + length]))
    for name in names:
        if not (path.parent / name).is_file():
            raise CheckpointError(path, f"the file {name[:200]} of its weights beside it", "none")
    return [path.parent / name for name in sorted(names)]
