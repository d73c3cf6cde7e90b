"""The names that a pickle may contain; they are never imported because of a pickle."""

import re
import sys

# Tensors, arrays and images, which pickled.py builds.
_DATA = frozenset(
    {
        "_codecs.encode",
        "builtins.bytes",
        "collections.OrderedDict",
        "numpy.dtype",
        "numpy.ndarray",
        "PIL.Image.Image",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.storage._load_from_bytes",
    }
    | {
        f"numpy.{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
    }
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_CLASS = r"_?[A-Z][A-Za-z0-9_]*"
_DATA_CLASS = re.compile(
    r"torch\.[A-Z][A-Za-z0-9]*Storage|torch\.storage\.(Untyped|Typed)Storage"
    r"|PIL\.[A-Z][A-Za-z0-9]*Plugin\.[A-Z][A-Za-z0-9]*ImageFile"
)
# Parts of a transform, of a dataset or of an image's metadata, which are never built.
_INERT = re.compile(
    rf"torchvision\.transforms(\.[a-z0-9_]+)*\.{_CLASS}"
    r"|torch\.(u?int(8|16|32|64)|float(16|32|64)|bfloat16|bool)"
    r"|builtins\.(set|frozenset)"
    r"|PIL\.PngImagePlugin\.iTXt|PIL\.TiffImagePlugin\.IFDRational"
    r"|torch\.device|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
)
# Dataset classes, kept as records of their attributes.
_LIBRARY_STAND_IN = re.compile(
    rf"(torch\.utils\.data|torchvision\.datasets)(\.[a-z0-9_]+)*\.{_CLASS}"
)
_USER_STAND_IN = re.compile(rf"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\.{_CLASS}")
# Classes of these modules do more than hold data, and are never a user's dataset.
_LIBRARIES = sys.stdlib_module_names | {
    *("numpy", "PIL", "torch", "torchvision"),
    *("pip", "pkg_resources", "robust", "setuptools", "scipy", "sklearn", "app", "training"),
    *("commands", "cPickle", "exceptions", "os2", "popen2", "urllib2", "StringIO"),  # Python 2
}


def allowed_name(module: str, name: str) -> tuple[str, bool] | None:
    """The full name, in Python 3's spelling, and whether it may be called with arguments.

    A dataset class may not. None for a name that is refused.
    """
    path = f"{_PYTHON_2.get(module, module)}.{name}"
    if path in _DATA or _DATA_CLASS.fullmatch(path) or _INERT.fullmatch(path):
        return path, True
    if _LIBRARY_STAND_IN.fullmatch(path):
        return path, False
    library = module.split(".")[0] in _LIBRARIES or module in _PYTHON_2
    if not library and "." not in name and _USER_STAND_IN.fullmatch(path):
        return path, False
    return None
