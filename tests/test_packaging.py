"""What a user gets before any code runs: pins, container and examples; and who imports whom."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

from robust.images import decode_image, fit_image

ROOT = Path(__file__).parent.parent
PACKAGES = ["app", "robust", "training"]
EXAMPLES = ROOT / "examples"
PHOTOGRAPHS = sorted(EXAMPLES.glob("*.jpg"))
CIFAR10_INPUT = 32


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pin_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def pins() -> dict[str, Version]:
    pairs = (line.split("==") for line in pin_lines())
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    extras = project()["optional-dependencies"].values()
    lines = [*project()["dependencies"], *(line for extra in extras for line in extra)]
    return [Requirement(line) for line in lines if not line.startswith("robust[")]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, argument), continued lines joined and comments dropped."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def arguments(instruction: str) -> list[str]:
    return [argument for name, argument in instructions() if name == instruction]


def imports(path: Path) -> Iterator[str]:
    """Top-level names of all modules that `path` imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


# The pinned set


def test_every_line_of_the_constraints_is_one_pin_and_names_no_host() -> None:
    odd = [
        line
        for line in pin_lines()
        if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9.]*(b[0-9]+)?", line)
    ]
    assert odd == []
    assert len(pins()) == len(pin_lines()), "a package is pinned twice"


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_to_an_allowed_version(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_torch_rejects_pickles_that_run_code() -> None:
    # Checkpoints rely on weights_only=True, which had a hole before.
    floors = [r.specifier for r in requirements() if r.name == "torch"]
    assert all(Version("2.10") not in floor for floor in floors)
    assert pins()["torch"] >= Version("2.11")


# The layers


def test_packages_import_only_lower_layers() -> None:
    forbidden = {
        "robust": {"app", "training", "robust_cli"},
        "app": {"training", "robust_cli"},
        "training": {"app", "robust_cli"},
    }
    modules = {package: sorted((ROOT / package).rglob("*.py")) for package in PACKAGES}
    assert all(modules.values())
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package, paths in modules.items()
        for path in paths
        for name in imports(path)
        if name in forbidden[package]
    ]
    assert wrong == []


def test_the_wheel_carries_every_file_of_the_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ["pyproject.toml", "LICENSE", "README.md", "robust_cli.py"]:
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    expected = {
        path.relative_to(source).as_posix()
        for name in PACKAGES
        for path in (source / name).rglob("*")
        if path.is_file()
    }

    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    found = set(zipfile.ZipFile(wheel).namelist())
    assert expected | {"robust_cli.py"} <= found
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in found)


# The container


def test_the_base_image_is_an_argument() -> None:
    assert instructions()[0][0] == "ARG"
    assert instructions()[0][1].startswith("BASE_IMAGE=python:3.")
    assert arguments("FROM") == ["${BASE_IMAGE}"]


def test_the_container_does_not_run_as_root() -> None:
    user = arguments("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, so that runAsNonRoot can check it"
    position = [name for name, _ in instructions()]
    assert position.index("USER") < position.index("ENTRYPOINT")
    assert "RUN" not in position[position.index("USER") :]


def test_the_container_serves_by_default_and_takes_any_other_command() -> None:
    assert arguments("ENTRYPOINT") == ['["robust"]']
    assert arguments("CMD") == ['["serve", "--host", "0.0.0.0"]']
    assert project()["scripts"] == {"robust": "robust_cli:main"}
    assert arguments("EXPOSE") == ["8000"]


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1)])
def test_the_health_check_passes_only_while_the_service_is_ready(
    status: int, exit_code: int
) -> None:
    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    (check,) = arguments("HEALTHCHECK")
    interpreter, *options = ast.literal_eval(check.split("CMD", maxsplit=1)[1].strip())
    assert interpreter == "python3"
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        Thread(target=server.handle_request).start()
        port = str(server.server_port)
        command = [sys.executable, *(option.replace("8000", port) for option in options)]
        assert subprocess.run(command, check=False, timeout=30).returncode == exit_code


def test_files_copied_by_the_dockerfile_exist_and_are_not_ignored() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = [
        source
        for argument in arguments("COPY")
        for source in shlex.split(argument)[:-1]
        if not source.startswith("--")
    ]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert set(copied) <= allowed


# The examples


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_examples_are_small_photographs_without_metadata(path: Path) -> None:
    assert path.stat().st_size < 100_000
    with Image.open(path) as image:
        image.load()
        assert image.mode == "RGB"
        assert min(image.size) >= 4 * CIFAR10_INPUT
        assert not image.getexif(), "camera, owner or place in a file that is given away"


def test_source_table_names_each_photograph_with_author_and_license() -> None:
    lines = (EXAMPLES / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line][2:]
    assert len(rows) >= 4
    assert sorted(row[0].strip("`") for row in rows) == [path.name for path in PHOTOGRAPHS]
    for _, _, author, license, source in rows:
        assert author
        assert source
        assert license in {"CC0 1.0", "public domain"}


def test_labeled_examples_equal_the_preprocessed_photographs() -> None:
    with np.load(EXAMPLES / "photos.npz", allow_pickle=False) as arrays:
        images, labels, classes = arrays["images"], arrays["labels"], arrays["classes"]
    names = [str(classes[label]) for label in labels]
    assert sorted([*names, "coffee"]) == [path.stem for path in PHOTOGRAPHS]
    for name, image in zip(names, images, strict=True):
        photograph = decode_image((EXAMPLES / f"{name}.jpg").read_bytes())
        assert np.array_equal(fit_image(photograph, CIFAR10_INPUT).numpy(), image)
