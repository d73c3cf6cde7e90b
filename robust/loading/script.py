"""Checks a TorchScript file before it is loaded: it is a program, parts of which run on loading."""

from __future__ import annotations

import ast
import io
import re
import zipfile
from pathlib import Path

from robust.loading.errors import CheckpointError

FILE_OPERATIONS = frozenset({"from_file", "save"})  # of the namespace aten
_NAMESPACES = ("aten", "prim", "quantized", "torchvision")  # others have file operations too
# What torch reads. Others are line numbers of the original code, and older formats with more code.
_MEMBER = re.compile(
    r"[^/]+/(code/.+\.py|(data|constants)(\.pkl|/\w+)"
    r"|(\.data/)?(version|byteorder|serialization_id|\.format_version|\.storage_alignment))",
    re.IGNORECASE,
)
_TEXT = re.compile(rb"[\t\n -~]*")
_CLASS = re.compile(rb"torch\W+classes\W+(?!quantized\W)\w+")  # in a pickle: written in C++
IN_PYTHON = "if you trust the file, load it in your own code: file.py:NAME"


def checked_script(path: Path, data: bytes) -> bytes:
    """The TorchScript archive without operations on files. Raises CheckpointError.

    It is written anew, so that torch, which has another zip reader, sees what was checked.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(copy, "w") as written:
        names = archive.namelist()
        if len({name.lower() for name in names}) < len(names):  # torch ignores case
            raise CheckpointError(path, "a TorchScript file", "two members of the same name")
        for name in names:
            if _MEMBER.fullmatch(name) is None:
                continue
            content, lower = archive.read(name), name.lower()
            if lower.endswith(".py"):
                _check_code(path, name, content)
            elif lower.endswith(".pkl") and (found := _CLASS.search(content)):
                raise _refused(path, found[0].decode("latin-1").replace("\n", "."))
            written.writestr(name, content)
    return copy.getvalue()


def _refused(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        path, "TorchScript that only computes", f"{name}, which may do more; {IN_PYTHON}"
    )


def _check_code(path: Path, name: str, code: bytes) -> None:
    """Raise CheckpointError for code that could access files.

    The text is checked and not the graph, because defaults of arguments and ``__setstate__`` run
    while torch loads it. A file operation can be a function or, on text, a method.
    """
    try:
        if not _TEXT.fullmatch(code):
            raise ValueError("not plain text")
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CheckpointError(path, "TorchScript code", f"a member {name} that is none") from None
    allowed: set[ast.AST] = set()  # names and attributes that their parent node makes harmless
    for node in ast.walk(tree):  # parents first
        match node:
            case ast.Attribute(attr=word) | ast.Name(id=word) if word in FILE_OPERATIONS:
                raise _refused(path, f"the operation {word}")
            case ast.Attribute(value=ast.Name(id="ops") as base, attr=word) if word in _NAMESPACES:
                allowed.add(base)
            case ast.Attribute(value=ast.Attribute(attr="classes") as base, attr="quantized"):
                allowed.add(base)
            case ast.Call(
                func=ast.Name(id="getattr") as base, args=[_, ast.Constant(value=str() as word)]
            ) if not word.isidentifier():  # torch writes others as attributes
                allowed.add(base)
            case ast.Name(id="ops" | "getattr" as word) if node not in allowed:
                raise _refused(path, f"an unknown use of {word}")
            case ast.Attribute(
                attr="classes", value=ast.Attribute(attr="torch") | ast.Name(id="torch")
            ) if node not in allowed:
                raise _refused(path, "a class written in C++")
