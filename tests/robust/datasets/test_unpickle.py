"""Malicious and damaged pickles: every one is rejected, and none of its code runs."""

import copyreg
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robust.datasets import Dataset, DatasetError, load_dataset, load_upload
from robust.datasets.pickle_names import allowed_name
from robust.datasets.unpickle import Record, unpickle


def torch_zip(data: bytes, **storages: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, storage in storages.items():
            archive.writestr(f"archive/data/{key[1:]}", storage)
    return buffer.getvalue()


def refusal(data: bytes, **options: int) -> str:
    with pytest.raises(DatasetError) as caught:
        load_upload(data, "x.pt", **{"size": 32, "max_images": 100, **options})
    return caught.value.found


class Call:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def touch(path: Path) -> Call:
    return Call(os.system, f"touch {path}")


def test_canary_runs_under_plain_pickle(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(touch(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


CALLS: dict[str, Callable[[str], object]] = {
    "posix.system": lambda p: Call(os.system, f"touch {p}"),
    "builtins.eval": lambda p: Call(eval, f"open({p!r}, 'w')"),
    "builtins.exec": lambda p: Call(exec, f"open({p!r}, 'w')"),
    "io.open": lambda p: Call(open, p, "w"),
    "builtins.getattr": lambda p: Call(getattr, Path, "touch"),
    "builtins.bytearray": lambda p: Call(bytearray, 10**12),
    "builtins.map": lambda p: Call(map, os.system, [f"touch {p}"]),
    "subprocess.Popen": lambda p: Call(subprocess.Popen, ["touch", p]),
    "subprocess.check_output": lambda p: Call(subprocess.check_output, ["touch", p]),
    "torch.serialization.load": lambda p: Call(torch.load, p),
    "torch.hub.load": lambda p: Call(torch.hub.load, p),
    "PIL.Image.open": lambda p: Call(Image.open, p),
    "_pickle.loads": lambda p: Call(pickle.loads, b"."),
    "copyreg.add_extension": lambda p: Call(copyreg.add_extension, "os", "system", 1),
    "numpy.save": lambda p: Call(np.save, p, 3),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_rejected_by_name(tmp_path: Path, name: str, protocol: int, zipped: bool) -> None:
    path, buffer = tmp_path / "ran", io.BytesIO()
    value = {"images": CALLS[name](str(path)), "labels": [0, 1]}
    torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    # Protocol 2 uses Python 2's names, such as __builtin__.
    expected = name if protocol > 2 else r"\S+"
    assert re.fullmatch(f"the name {expected}, which is not allowed", refusal(buffer.getvalue()))
    assert not path.exists()


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


FOO = glob("__main__", "Foo")

RAW: dict[str, tuple[bytes, str]] = {
    "python 2 name": (glob("__builtin__", "eval") + text("1") + b"\x85R.", "__builtin__.eval"),
    "getattr chain": (glob("builtins", "getattr") + FOO + text("x") + b"\x86R.", "getattr"),
    "dotted name": (text("os") + text("path.os.system") + b"\x93.", "os.path.os.system"),
    "dotted class": (text("__main__") + text("Foo.Bar") + b"\x93.", "__main__.Foo.Bar"),
    "dunder": (text("__main__") + text("Foo.__init__") + b"\x93.", "__init__"),
    "dotted allowed class": (text("PIL.Image") + text("Image.open") + b"\x93.", "Image.open"),
    "hidden module": (text("torch.utils.data.os") + text("system") + b"\x93.", "os.system"),
    "argument to a stand-in": (FOO + text("x") + b"\x85R.", "__main__.Foo with arguments"),
    "new object with arguments": (FOO + text("x") + b"\x85\x81.", "__main__.Foo with arguments"),
    "keywords": (FOO + b")}" + text("a") + b"Ns\x92.", "a call with keywords"),
    "user function": (glob("mine", "load") + b")R.", "mine.load"),
    "the project itself": (glob("robust.datasets", "Dataset") + b".", "robust.datasets.Dataset"),
    "reconstructor": (glob("copyreg", "_reconstructor") + b".", "copyreg._reconstructor"),
    "extension registry": (b"\x82\x01.", "operation 0x82"),
    "extension registry 2": (b"\x83\x01\0.", "operation 0x83"),
    "extension registry 4": (b"\x84\x01\0\0\0.", "operation 0x84"),
    "INST": (b"(" + text("id") + b"ios\nsystem\n.", "operation 0x69"),
    "OBJ": (b"(" + glob("__main__", "Foo") + b"o.", "operation 0x6f"),
    "PERSID": (b"Pstorage\n.", "operation 0x50"),
    "NEXT_BUFFER": (b"\x97.", "operation 0x97"),
    "calling a string": (
        text("os.system") + text("id") + b"\x85R.",
        "a call of something that is not a name",
    ),
    "calling an object": (FOO + b")\x81)R.", "a call of something that is not a name"),
    "attributes for a class": (FOO + b"}" + text("__setstate__") + b"Nsb.", "attributes for"),
    "attributes for a dict": (b"}}b.", "attributes for a dict"),
    "attributes twice": (FOO + b")\x81}b}b.", "attributes for a Record"),
    "arguments to a dict": (glob("collections", "OrderedDict") + b"]\x85R.", "with arguments"),
    "tuple key": (b"})Ns.", "tuple keys"),
    "colliding key": (b"}\x8a\x09" + bytes(8) + b"\x01Ns.", "int keys"),
    "items for a stand-in": (FOO + b")\x81Na.", "a damaged one"),
    "items for a text": (text("x") + b"(Ne.", "a damaged one"),
    "memo that is not there": (b"h\x05.", "a damaged one"),
    "vast memo index": (b"Nr\xff\xff\xff\xffj\xff\xff\xff\xfe.", "a damaged one"),
    "vast bytes": (b"\x8e" + b"\xff" * 7 + b"\x7f.", "a damaged one"),
    "vast bytearray": (b"\x96\0\0\0\0\0\x01\0\0.", "a damaged one"),
    "vast frame": (b"\x95" + b"\xff" * 8 + b"N", "a damaged one"),
    "vast number": (b"I" + b"9" * 10_000 + b"\n.", "a damaged one"),
    "empty stack": (b".", "a damaged one"),
    "no mark": (b"Nt.", "a damaged one"),
    "no end": (b"N", "a damaged one"),
    "too few": (b"N\x86.", "a damaged one"),
    "name that is no text": (b"NN\x93.", "a damaged one"),
    "text that is none": (b"X\x02\0\0\0\xff\xff.", "a damaged one"),
}


@pytest.mark.parametrize("case", RAW)
def test_handmade_pickles_are_refused(case: str) -> None:
    data, found = RAW[case]
    assert found in refusal(torch_zip(b"\x80\x02" + data))


def test_registered_extensions_do_not_run(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        data = b"\x80\x02\x82\xf0" + text(f"touch {tmp_path}/ran") + b"\x85R."
        pickle.loads(data)
        (tmp_path / "ran").unlink()
        assert "operation 0x82" in refusal(torch_zip(data))
    finally:
        copyreg.remove_extension("os", "system", 240)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "innocent_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    tree, _, _ = unpickle("x", b"\x80\x02" + glob("innocent_module", "Data") + b")\x81.")
    assert isinstance(tree, Record)
    assert tree.path == "innocent_module.Data"
    assert "innocent_module" not in sys.modules


def test_names_in_messages_are_cleaned() -> None:
    found = refusal(torch_zip(b"\x80\x02" + glob("os\x1b[31m<b>", "x" * 500) + b"."))
    assert len(found) < 160
    assert "\x1b" not in found


def test_allowed_names() -> None:
    assert allowed_name("__main__", "TaskDataset") == ("__main__.TaskDataset", False)
    assert allowed_name("torch", "ByteStorage") == ("torch.ByteStorage", True)
    assert allowed_name("torchvision.transforms.v2", "Compose") is not None
    for module, name in (
        ("torch", "Tensor"),
        ("torch.nn", "Module"),
        ("torchvision.transforms.functional", "resize"),
        ("torchvision.io", "VideoReader"),
        ("os", "PathLike"),
        ("pathlib", "os"),
        ("pathlib", "PosixPath.touch"),
        ("torch", "device.type"),
        ("numpy", "load"),
        ("multiprocessing.util", "Finalize"),
        ("PIL.ImageFile", "ImageFile"),
        ("", "Foo"),
    ):
        assert allowed_name(module, name) is None, (module, name)


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\0") -> bytes:
    storage = b"(" + text("storage") + glob("torch", "ByteStorage") + text("0") + text("cpu")
    arguments = b"((" + storage[1:] + b"K\x0ctQ" + offset + size + stride + b"\x89Nt"
    return glob("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def pair(images: bytes) -> bytes:
    return b"\x80\x02" + images + b"](K\0K\x01e\x86."


def test_a_handmade_tensor_inside_its_storage_loads() -> None:
    data = torch_zip(pair(tensor(SIZE, STRIDE)), _0=bytes(range(12)))
    dataset = load_upload(data, None, size=2, max_images=2)
    assert dataset.name == "upload"
    # Of each image 1 pixel wide and 2 high the center is taken, here the upper one.
    assert dataset.images[1, :, 0, 0].tolist() == [6, 8, 10]


SIZE, STRIDE = b"(K\x02K\x03K\x02K\x01t", b"(K\x06K\x02K\x01K\x01t"
BEYOND, INVALID = "one beyond its 12 elements", "an invalid shape"


@pytest.mark.parametrize(
    ("size", "stride", "offset", "found"),
    [
        (SIZE, STRIDE, b"K\x01", BEYOND),
        (SIZE, b"(K\x07K\x02K\x01K\x01t", b"K\0", BEYOND),
        (b"(J\0\0\0\x7fK\x03K\x02K\x02t", b"(K\0K\0K\0K\0t", b"K\0", BEYOND),
        (SIZE, STRIDE, b"J\xff\xff\xff\xff", "one without a storage"),
        (SIZE, b"(J\xff\xff\xff\xffK\x02K\x01K\x01t", b"K\x0b", INVALID),
        (b"(\x8a\x09" + b"\xff" * 8 + b"\0K\x03t", b"(K\0K\0t", b"K\0", INVALID),
        (b"(K\x02NK\x02K\x01t", STRIDE, b"K\0", INVALID),
        (b"(" + b"K\x01" * 60 + b"t", b"(" + b"K\x01" * 60 + b"t", b"K\0", INVALID),
        (b"(K\x02K\x03t", b"(K\x01t", b"K\0", "a damaged one"),
    ],
)
def test_tensors_beyond_their_storage_are_refused(
    size: bytes, stride: bytes, offset: bytes, found: str
) -> None:
    data = torch_zip(pair(tensor(size, stride, offset)), _0=bytes(12))
    assert refusal(data) == found


def test_missing_storages_are_refused() -> None:
    assert refusal(torch_zip(pair(tensor(b"(K\x01t", b"(K\x01t")))) == "none"


def test_arrays_with_a_wrong_shape_are_rejected() -> None:
    honest = pickle.dumps({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": [0, 1]}, 2)
    assert load_upload(torch_zip(honest), None, size=4, max_images=2).labels.tolist() == [0, 1]
    vast = honest.replace(b"(K\x02K\x03K\x04K\x04t", b"(K\x02K\x03K\xffK\xfft")
    assert vast != honest
    assert refusal(torch_zip(vast)) == "96 bytes of another"
    objects = pickle.dumps({"images": np.array([print] * 2), "labels": [0, 1]}, 2)
    assert "__builtin__.print" in refusal(torch_zip(objects))
    objects = pickle.dumps({"images": np.array([None] * 2), "labels": [0, 1]}, 2)
    assert refusal(torch_zip(objects)) == "an object array"


def image_pickle(state: list[object], copies: int = 2) -> bytes:
    class Image_(Image.Image):
        def __getstate__(self) -> list[object]:
            return state

    Image_.__module__, Image_.__qualname__, Image_.__name__ = "PIL.Image", "Image", "Image"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "Image", Image_)
        return pickle.dumps(([Image_() for _ in range(copies)], [0, 1] * (copies // 2)), 4)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ([{}, "L", (9, 9), None, bytes(80)], "80 bytes for 9x9, mode L"),
        ([{}, "L", (10**6, 10**6), None, b""], "another size"),
        ([{}, "L", (0, 9), None, b""], "another size"),
        ([{}, "L", (-9, -9), None, bytes(81)], "an invalid shape"),
        ([{}, "L", 9, None, b""], "an invalid shape"),
        ([{}, "1;I", (8, 1), None, b"1"], "mode '1;I'"),
        ([{}, 3, (8, 1), None, b"1"], "another size"),
        ([{}, "P", (1, 1), [300], b"1"], "another"),
        ([{}, "L", (1, 1), None, "1"], "something else"),
        ([{}, "L"], "one without its state"),
    ],
)
def test_pickled_images_with_inconsistent_size_or_data(state: list[object], found: str) -> None:
    assert refusal(torch_zip(image_pickle(state))) == found


def test_shared_image_does_not_multiply_memory() -> None:
    data = pickle.dumps(([Image.new("L", (8, 8))] * 3, [0, 1, 0]), 4)
    assert len(load_upload(torch_zip(data), None, size=8, max_images=3)) == 3
    pixels = bytes(1000 * 1000)  # one string in the file, shared by 50 images
    data = image_pickle([{}, "L", (1000, 1000), None, pixels], copies=50)
    assert len(data) < 1_010_000
    assert "more" in refusal(torch_zip(data))


def test_operations_are_limited_by_the_file_size(tmp_path: Path) -> None:
    assert "more than 20000 operations" in refusal(torch_zip(b"\x80\x02" + b"]" * 40_000 + b"."))
    # A file of 2,190 bytes that unfolds to two million operations.
    buffer, path = io.BytesIO(), tmp_path / "a.pt"
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]0" * 1_000_000 + b".")
    data = buffer.getvalue()
    assert len(data) < 2500
    assert re.search("more than 10[0-9]{3} operations", refusal(data, max_images=10_000))
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"more than 10[0-9]{3} operations"):
        load_dataset(path)


def test_uploads_have_a_limited_number_of_images() -> None:
    buffer = io.BytesIO()
    torch.save(([Image.new("L", (1, 1))] * 101, [0, 1]), buffer)
    assert refusal(buffer.getvalue()) == "101"


def test_declared_sizes_are_checked_before_decompression() -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.zeros((20, 3, 300, 300), np.uint8), labels=np.arange(20))
    assert len(buffer.getvalue()) < 10_000
    assert "5400" in refusal(buffer.getvalue(), max_bytes=1_000_000)
    assert len(load_upload(buffer.getvalue(), "x.npz", size=4, max_images=20)) == 20
    assert refusal(buffer.getvalue(), max_images=19) == "20"


def test_deep_nesting_does_not_overflow(tmp_path: Path) -> None:
    depth = 300_000
    lists = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    objects = b"\x80\x02" + (FOO + b")\x81") * 50_000 + b"b" * 49_999 + b"."
    for data in (lists, objects):
        path = tmp_path / "deep.pt"
        path.write_bytes(torch_zip(data))
        with pytest.raises(DatasetError):
            load_dataset(path)


def test_other_files_are_refused() -> None:
    assert refusal(b"") == "0 bytes of another kind"
    assert (
        refusal(pickle.dumps(touch(Path("/nowhere"))))
        == "the name posix.system, which is not allowed"
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/b.txt", "hello")
    assert refusal(buffer.getvalue()) == "a zip of another kind"


def honest() -> bytes:
    images = [Image.new("RGB", (4, 4), (i, 2, 3)) for i in range(3)]
    value = {"imgs": images, "labels": list(np.arange(3)), "x": torch.arange(3), "y": np.ones(2)}
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


HONEST = honest()


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6))
def test_damaged_pickles_load_or_are_rejected(changes: list[tuple[float, int]]) -> None:
    data = bytearray(HONEST)
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    try:
        dataset = load_upload(torch_zip(bytes(data)), "x", size=4, max_images=9)
    except DatasetError:
        return
    assert isinstance(dataset, Dataset)


@settings(max_examples=300, deadline=None)
@given(
    data=st.lists(
        st.sampled_from([bytes([b]) for b in b"\x80\x02()]}lte\x85\x86\x87\x81Rbsua.hqKN0"]),
        max_size=30,
    )
)
def test_random_operations_load_or_are_rejected(data: list[bytes]) -> None:
    refusal(torch_zip(b"".join([*data, b"."])))


def test_zip_members_are_counted_before_the_directory_is_parsed() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "")
    data = buffer.getvalue()
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[at:end]
    size = (len(entry) * 170_000).to_bytes(4, "little")
    bomb = data[:at] + entry * 170_000 + data[end : end + 12] + size + data[end + 16 :]
    tracemalloc.start()
    assert refusal(bomb) == "more"
    assert tracemalloc.get_traced_memory()[1] < 2**20  # parsed, it is 80 MB
    tracemalloc.stop()


SQUARES = b"]q\x00" + b"".join(
    b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(200)
)


@pytest.mark.parametrize(
    ("operations", "found"),
    [
        (b"]0" * 2_000_000 + b".", "more than 30000 operations"),  # stored, 4 MB
        (b")" + b"\x85" * 300_000 + b".", "more than 30000 operations"),  # tuples in tuples
        (SQUARES + b".", "a list of 2"),  # 2 to the power of 200 lists, if one walked them all
    ],
    ids=["many", "deep", "shared"],
)
def test_worst_pickles_cost_milliseconds(operations: bytes, found: str) -> None:
    start = time.thread_time()
    assert found in refusal(torch_zip(b"\x80\x02" + operations))
    assert time.thread_time() - start < 5  # some 0.02 s


def nested(depth: int) -> object:
    """A small file, but `2 ** depth` leaves if one follows every reference."""
    value: object = [0]
    for _ in range(depth):
        value = {"a": value, "b": value, "labels": value}
    return value


def holding_itself(kind: type) -> object:
    value = kind()
    if isinstance(value, dict):
        value.update(images=value, labels=value)
    else:
        value.extend([value, value])
    return value


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (nested(60), "a, b, labels"),
        ({"images": nested(60), "labels": nested(60)}, "a dict with a, b, labels"),
        ([nested(60), nested(60)], "a dict with a, b, labels"),
        ({"images": [nested(60)] * 2, "labels": [nested(60)] * 2}, "a dict with a, b, labels"),
        (holding_itself(dict), "a dict with images, labels"),
        (holding_itself(list), "a list of 2"),
    ],
    ids=["dict", "fields", "pair", "lists", "dict in itself", "list in itself"],
)
def test_nested_values_are_refused_at_once(value: object, found: str) -> None:
    start = time.thread_time()
    assert refusal(pickle.dumps(value, 4)) == found
    assert time.thread_time() - start < 5  # some 0.01 s


def test_subset_of_itself_is_refused() -> None:
    subset = glob("torch.utils.data.dataset", "Subset") + b")\x81q\0}"
    data = b"\x80\x02" + subset + text("dataset") + b"h\0s" + text("indices") + b"]K\0asb."
    assert refusal(data) == "subsets of subsets"


def repeated_dict() -> bytes:
    """A list that has the same large dict 20,000 times."""
    item = {str(key): 0 for key in range(2000)}
    return pickle.dumps([item | {"image": np.zeros((2, 2), np.uint8), "label": 0}] * 20_000, 4)


def repeated_name() -> bytes:
    """A class of a very long name, 2,000 times."""
    name = b"X" + struct.pack("<I", 500_000) + b"X" * 500_000
    return b"\x80\x02" + name + b"q\0" + b"h\0h\0\x930" * 2000 + b"."


@pytest.mark.parametrize(
    ("data", "found"),
    [(repeated_dict(), "20000"), (repeated_name(), "a name of more than 1000 characters")],
    ids=["dict", "name"],
)
def test_repeated_values_cost_milliseconds(data: bytes, found: str) -> None:
    start = time.thread_time()
    assert refusal(data + bytes(100_000), max_images=10_000) == found
    assert time.thread_time() - start < 5  # some 0.1 s; it was more than 30


def test_palette_of_a_number_is_refused() -> None:
    assert refusal(torch_zip(image_pickle([{}, "P", (1, 1), 10**12, b"1"]))) == "another"


def test_transparency_of_more_than_all_colors_is_cut() -> None:
    info = {"transparency": bytes(300)}
    data = torch_zip(image_pickle([info, "P", (1, 1), [1, 2, 3], b"\0"]))
    assert load_upload(data, None, size=1, max_images=2).images[0].flatten().tolist() == [255] * 3
