"""How `robust` starts and how it ends."""

import errno
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch

import robust_cli
from robust.images import encode_png
from robust_cli import run

ROOT = Path(__file__).parent.parent


def started(*arguments: str, code: str = "import robust_cli; robust_cli.main()") -> list[str]:
    return [sys.executable, "-c", code, *arguments]


# How it starts.


def test_help_is_quick_and_fits_a_screen() -> None:
    code = (
        "import sys, robust_cli\n"
        "status = robust_cli.run(['--help'])\n"
        "slow = {'torch', 'torchvision', 'numpy', 'PIL', 'fastapi', 'pydantic', 'uvicorn'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(started(code=code), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    for command in ("train", "predict", "attack", "evaluate", "export", "serve"):
        assert any(line.startswith(f"  {command} ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["recipes"], 0, "Train a ResNet-18 on a small dataset"),
        (["train", "--data", "digits", "--recipe", "slow"], 2, "expected recipe to be one of"),
        (["attack", "--eps", "banana", "a.png"], 2, "such as 8/255"),
    ],
)
def test_commands_without_torch_do_not_import_it(
    arguments: list[str], status: int, words: str
) -> None:
    code = (
        "import sys, robust_cli\n"
        "status = robust_cli.run(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)"
    )
    done = subprocess.run(started(*arguments, code=code), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr


@pytest.mark.parametrize("name", list(robust_cli.cli.commands))
def test_every_command_has_help_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"Usage: robust {name}")
    assert f"    robust {name} " in help_text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("robust ")


# How it ends.


@pytest.fixture
def folder(stock: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: one of everything, good and bad. Left as it was found."""
    monkeypatch.chdir(stock)
    return stock


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, checkpoint_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    png = encode_png(torch.full((3, 32, 32), 99, dtype=torch.uint8))
    good = checkpoint_path.read_bytes()
    sidecar = json.loads(checkpoint_path.with_suffix(".json").read_text())
    contents = {
        "good.png": png,
        "empty.png": b"",
        "cut.png": png[: len(png) // 2],
        "text.png": b"I am not an image at all",
        "huge.png": huge_png(),
        "good.json": json.dumps(sidecar).encode(),
        "cut.pt": good[: len(good) // 2],
        "empty.pt": b"",
        "other_hash.json": json.dumps(sidecar | {"weights_sha256": "0" * 64}).encode(),
        "fewer.json": json.dumps(
            sidecar
            | {"classes": ["a", "b"], "architecture": sidecar["architecture"] | {"num_classes": 2}}
        ).encode(),
        "deeper.json": json.dumps(
            sidecar | {"architecture": sidecar["architecture"] | {"arch": "resnet34"}}
        ).encode(),
        "command.pt": pickle.dumps(Command(), protocol=2),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name in ("good", "other_hash", "fewer", "deeper"):
        (folder / f"{name}.pt").symlink_to(checkpoint_path)
    images = np.zeros((4, 32, 32, 3), np.uint8)
    labels = np.array([0, 1, 2, 3])
    sets = {
        "good": (images, labels),
        "none": (images[:0], labels[:0]),
        "unequal": (images, labels[:3]),
        "nan": (np.full((4, 32, 32, 3), np.nan, np.float32), labels),
        "more": (images, labels + 5),
        "negative": (images, labels - 1),
    }
    for name, (x, y) in sets.items():
        np.savez(folder / f"{name}.npz", images=x, labels=y)
    return folder


def listing(folder: Path) -> set[tuple[str, int, int]]:
    """Names, sizes and times of what is in a folder."""
    return {(item.name, item.stat().st_size, item.stat().st_mtime_ns) for item in folder.iterdir()}


class Command:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch ran",)


def huge_png() -> bytes:
    """30,000 x 30,000 pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Status 2 and one line on standard error, nothing else; gives back the line."""
    assert run(arguments.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("robust: ")
    return line


ATTACK = "attack --checkpoint good.pt good.png"
EVALUATE = "evaluate --checkpoint good.pt"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("dance", ["No such command", "dance"]),
        ("predict", ["Missing argument", "IMAGE"]),
        ("predict --what good.png", ["No such option", "--what"]),
        ("predict --checkpoint good.pt --top-k 0 good.png", ["--top-k", "0 is not in the range"]),
        ("predict --checkpoint good.pt --device banana good.png", ["expected a device", "banana"]),
        # images
        ("predict --checkpoint good.pt missing.png", ["missing.png: no such file"]),
        ("predict --checkpoint good.pt empty.png", ["empty.png", "found no bytes"]),
        (
            "predict --checkpoint good.pt cut.png",
            ["cut.png", "expected a complete", "do not decode"],
        ),
        ("predict --checkpoint good.pt text.png", ["text.png", "an unknown format"]),
        ("predict --checkpoint good.pt huge.png", ["huge.png", "pixels", "30000x30000"]),
        # checkpoints
        ("predict good.png", ["expected --model", "no models/robust_model.pt"]),
        ("predict --checkpoint cut.pt good.png", ["cut.pt", "expected a state dict"]),
        ("predict --checkpoint empty.pt good.png", ["empty.pt", "an empty file"]),
        ("predict --checkpoint command.pt good.png", ["command.pt", "system"]),
        ("predict --checkpoint good.json good.png", ["good.json", "that of its sidecar"]),
        ("predict --checkpoint other_hash.pt good.png", ["other_hash.pt", "SHA-256 0000"]),
        ("predict --checkpoint fewer.pt good.png", ["fewer.pt", "(2, 512)", "(4, 512)"]),
        ("predict --checkpoint deeper.pt good.png", ["deeper.pt", "resnet34"]),
        # attacks
        (f"{ATTACK} --eps -1", ["--eps", "at least 0", "-1"]),
        (f"{ATTACK} --eps banana", ["--eps", "such as 8/255", "banana"]),
        (f"{ATTACK} --eps 8", ["linf eps in [0, 1]", "8"]),
        (f"{ATTACK} --eps nan", ["--eps", "nan"]),
        (f"{ATTACK} --alpha 1/0", ["--alpha", "1/0"]),
        (f"{ATTACK} --steps 1000000000", ["--steps", "1000000000 is not in the range"]),
        (f"{ATTACK} --steps 0", ["--steps", "0 is not in the range"]),
        (f"{ATTACK} --attack pgd-999999", ["at most 10000 steps", "999999"]),
        (f"{ATTACK} --attack cw", ["attack to be one of fgsm, pgd", "cw"]),
        (f"{ATTACK} --attack fgsm --steps 5", ["expected steps", "fgsm only"]),
        (f"{ATTACK} --attack fgsm --attack audit --steps 5", ["steps", "got fgsm, audit only"]),
        (f"{ATTACK} --norm l7", ["norm to be one of linf, l2", "l7"]),
        (f"{ATTACK} --seed -1", ["--seed", "-1 is not in the range"]),
        (f"{ATTACK} --label wolf", ["class to be one of cat, dog, frog, ship", "wolf"]),
        (f"{ATTACK} --label 4", ["an index from 0 to 3", "4"]),
        (f"{ATTACK} --label cat --target 0", ["a target other than the label"]),
        (f"{ATTACK} --out good.png", ["good.png", "is a file"]),
        (f"{ATTACK} --out good.png/inside", ["good.png/inside", "not a directory"]),
        # data
        (EVALUATE, ["Missing option '--data'"]),
        (f"{EVALUATE} --data missing.npz", ["missing.npz"]),
        (f"{EVALUATE} --data none.npz", ["none.npz"]),
        (f"{EVALUATE} --data unequal.npz", ["unequal.npz"]),
        (f"{EVALUATE} --data nan.npz", ["nan.npz"]),
        (f"{EVALUATE} --data more.npz", ["more.npz", "labels from 0 to 3", "5 to 8"]),
        (f"{EVALUATE} --data negative.npz", ["negative.npz"]),
        (f"{EVALUATE} --data command.pt", ["command.pt"]),
        (f"{EVALUATE} --data good.npz --limit 0", ["--limit"]),
        (f"{EVALUATE} --data good.npz --batch-size 0", ["--batch-size"]),
        (f"{EVALUATE} --data good.npz --json .", ["--json", "is a directory"]),
        # export
        ("export --checkpoint good.pt --format keras --out x", ["'keras' is not one of"]),
        ("export --checkpoint good.pt --format safetensors --out good.pt", ["checkpoint itself"]),
        (
            "export --checkpoint good.pt --format safetensors --out good.png/x.safetensors",
            ["file exists"],
        ),
        # a name may hold anything
        ("predict --checkpoint \x1b[2J.pt good.png", ["[2J.pt"]),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: list[str]
) -> None:
    before = listing(folder)
    line = refused(arguments, capsys)
    for word in words:
        assert word in line
    assert "\x1b" not in line
    assert listing(folder) == before


def test_full_disk_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = listing(folder)
    monkeypatch.setattr(os, "fsync", full)
    line = refused("export --checkpoint good.pt --format safetensors --out new.safetensors", capsys)
    assert line.endswith("new.safetensors: no space left on device")
    assert listing(folder) == before


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Adds a command `broken` that ends in the error given."""

    def add(error: BaseException) -> None:
        command = click.Command("broken", callback=failing(error))
        monkeypatch.setitem(robust_cli.cli.commands, "broken", command)

    return add


@pytest.mark.parametrize("error", [KeyError("k"), TypeError("t"), AssertionError(), RuntimeError()])
def test_internal_error_keeps_its_traceback(
    broken: Callable[[BaseException], None], error: BaseException
) -> None:
    broken(error)
    with pytest.raises(type(error)):
        run(["broken"])


def test_traceback_on_demand(broken: Callable[[BaseException], None]) -> None:
    broken(ValueError("expected this, got that"))
    assert run(["broken"]) == 2
    with pytest.raises(ValueError, match="expected this"):
        run(["--traceback", "broken"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo\x1b[2J"), "robust: one two [2J"),
        (ValueError(), "robust: ValueError"),
        (FileNotFoundError(2, "No such file", "a.txt"), "robust: a.txt: no such file"),
        (OSError("odd"), "robust: odd"),
        (MemoryError(), "robust: expected enough memory, found too little; try a smaller batch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "robust: expected enough memory"),
    ],
)
def test_user_errors_have_no_traceback(
    broken: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    line: str,
) -> None:
    broken(error)
    assert refused("broken", capsys).startswith(line)


def test_interrupt_ends_quietly(
    broken: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    broken(KeyboardInterrupt())
    assert run(["broken"]) == 130
    output = capsys.readouterr()
    assert (output.out + output.err).strip() == ""


def test_ctrl_c_in_a_real_process(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.npz"
    np.savez(path, images=np.zeros((400, 32, 32, 3), np.uint8), labels=np.arange(400) % 4)
    arguments = f"evaluate --checkpoint good.pt --data {path} --batch-size 20 --steps 60"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        started(*arguments.split(), "--attack", "pgd", "--eps", "0"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where these tests run in a shell's background, SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    while not process.stderr.readline().startswith("evaluate: "):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out.strip() == ""
    assert "Traceback" not in err
    assert err.endswith("stopped: nothing was kept, as there is no --journal\n")


def test_closed_output_pipe(folder: Path) -> None:
    """As in `robust predict ... | head -0`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ["predict", "--checkpoint", "good.pt", "good.png"]
    done = subprocess.run(
        started(*arguments), env=environment, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def test_default_checkpoint_is_in_models(
    stock: Path,
    checkpoint_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for ending in (".pt", ".json"):
        shutil.copy(checkpoint_path.with_suffix(ending), f"models/robust_model{ending}")
    assert run(["predict", str(stock / "good.png")]) == 0
    assert "good.png" in capsys.readouterr().out
