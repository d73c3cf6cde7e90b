"""Reads a pickle as a tree of plain values; nothing is called, imported or looked up.

A pickle is a program. This interpreter runs only its stack operations; instead of calling
anything, it records the call as a Record. `pickle_names.py` lists the allowed names, and
`pickled.py` builds tensors, arrays and images from the records that it knows.
Protocols 2 to 5, as written by `torch.save`; the opcodes are those of `pickletools`.
"""

import pickle
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

from robust.datasets.errors import DatasetError
from robust.datasets.pickle_names import allowed_name

EXPECTED = "a pickle of tensors, arrays, images and plain containers"
_LONGEST_NAME = 1000


@dataclass(frozen=True, slots=True)
class Global:
    """An allowed name in the pickle, which is not imported."""

    path: str
    takes_arguments: bool


class ByteText(str):
    """A string from Python 2: text, or bytes decoded as latin-1."""


@dataclass(slots=True, eq=False)
class Record:
    """A call that was recorded instead of made."""

    path: str
    args: tuple[object, ...]
    state: object = None


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A reference to a storage outside the pickle."""

    key: object


def unpickle(
    source: str, data: bytes, start: int = 0, *, max_steps: int = sys.maxsize
) -> tuple[object, int, list[Persistent]]:
    """Read the pickle in `data` at `start`: the tree, where it ends, and its storage references.

    The tree contains None, bool, int, float, str, bytes, list, tuple, dict with plain keys, Global,
    Record and Persistent; a set becomes a list or a Record. Raises DatasetError for a damaged
    pickle, one with more than `max_steps` operations, and a name outside the allow-list.
    """
    machine = _Machine(source, data, start)
    try:
        tree = machine.run(max_steps)
    except DatasetError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, MemoryError):
        raise DatasetError(source, expected=EXPECTED, found="a damaged one") from None
    return tree, machine.position, machine.references


class _Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self, source: str, data: bytes, start: int) -> None:
        self.source = source
        self.data = data
        self.position = start
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.references: list[Persistent] = []

    def run(self, max_steps: int) -> object:
        data, steps = self.data, 0
        while steps < max_steps:
            steps += 1
            code = data[self.position]
            self.position += 1
            if code == pickle.STOP[0]:
                return self.stack.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self.refused(f"the operation 0x{code:02x}, which no dataset needs")
            operation(self)
        raise self.refused(f"more than {max_steps} operations")

    def refused(self, found: str) -> DatasetError:
        return DatasetError(self.source, expected=EXPECTED, found=found)

    def take(self, length: int) -> bytes:
        start = self.position
        self.position = start + length
        if length < 0 or self.position > len(self.data):
            raise ValueError("cut short")
        return self.data[start : self.position]

    def number(self, length: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(length), "little", signed=signed)

    def counted(self, width: int) -> bytes:
        return self.take(self.number(width))

    def text(self, width: int) -> str:
        return self.counted(width).decode("utf-8", "surrogatepass")

    def byte_text(self, width: int) -> ByteText:
        return ByteText(self.counted(width).decode("latin-1"))

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        value = self.take(end - self.position)
        self.position += 1
        return value.decode("utf-8")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[object]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def last(self, count: int) -> tuple[object, ...]:
        if len(self.stack) < count:
            raise ValueError("too few values")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("items for something that is not a list")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError("items for something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, Record) and key.path == "_codecs.encode" and key.args:
                key = key.args[0]  # bytes, as protocol 2 writes them
            # Hashing nested tuples can take forever, and large numbers can be chosen to collide.
            small = isinstance(key, int) and -(2**31) <= key < 2**31
            if not small and not isinstance(key, str | bytes | None):
                raise self.refused(f"a dict with {type(key).__name__} keys, or too large ones")
            target[key] = value

    def find(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is not text")
        if len(module) + len(name) > _LONGEST_NAME:  # matching it again and again takes seconds
            raise self.refused(f"a name of more than {_LONGEST_NAME} characters")
        found = allowed_name(module, name)
        if found is None:
            shown = re.sub(r"[^A-Za-z0-9_.<>]", "?", f"{module}.{name}"[:100])
            raise self.refused(f"the name {shown}, which is not allowed")
        self.push(Global(*found))

    def call(self, function: object, args: object) -> None:
        """Record a call or the creation of an object."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise self.refused("a call of something that is not a name")
        if args and not function.takes_arguments:
            raise self.refused(f"a call of {function.path[:100]} with arguments")
        is_dict = function.path == "collections.OrderedDict"
        if is_dict and args:
            raise self.refused("an OrderedDict with arguments")
        self.push({} if is_dict else Record(function.path, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Record) or target.state is not None:
            raise self.refused(f"attributes for a {type(target).__name__}")
        target.state = state

    def refer(self) -> None:
        reference = Persistent(self.stack.pop())
        self.references.append(reference)
        self.push(reference)


def _new_object_with_keywords(machine: _Machine) -> None:
    function, args, keywords = machine.last(3)
    if keywords != {}:
        raise machine.refused("a call with keywords")
    machine.call(function, args)


def _frozen_set(machine: _Machine) -> None:
    machine.push(Record("builtins.frozenset", (machine.since_mark(),)))


def _integer_line(machine: _Machine) -> None:
    value = machine.line()
    machine.push({"00": False, "01": True}[value] if value in ("00", "01") else int(value))


_OPERATIONS: dict[int, Callable[[_Machine], object]] = {
    code[0]: operation
    for code, operation in {
        # Framing: a frame is only a hint about how much to read ahead.
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        # Values.
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.INT: _integer_line,
        pickle.BININT: lambda m: m.push(m.number(4, signed=True)),
        pickle.BININT1: lambda m: m.push(m.number(1)),
        pickle.BININT2: lambda m: m.push(m.number(2)),
        pickle.LONG1: lambda m: m.push(int.from_bytes(m.counted(1), "little", signed=True)),
        pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        pickle.SHORT_BINSTRING: lambda m: m.push(m.byte_text(1)),
        pickle.BINSTRING: lambda m: m.push(m.byte_text(4)),
        pickle.SHORT_BINUNICODE: lambda m: m.push(m.text(1)),
        pickle.BINUNICODE: lambda m: m.push(m.text(4)),
        pickle.BINUNICODE8: lambda m: m.push(m.text(8)),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.counted(1)),
        pickle.BINBYTES: lambda m: m.push(m.counted(4)),
        pickle.BINBYTES8: lambda m: m.push(m.counted(8)),
        pickle.BYTEARRAY8: lambda m: m.push(m.counted(8)),
        # Containers.
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.EMPTY_SET: lambda m: m.push([]),
        pickle.TUPLE1: lambda m: m.push(m.last(1)),
        pickle.TUPLE2: lambda m: m.push(m.last(2)),
        pickle.TUPLE3: lambda m: m.push(m.last(3)),
        pickle.TUPLE: lambda m: m.push(tuple(m.since_mark())),
        pickle.APPEND: lambda m: m.append(list(m.last(1))),
        pickle.APPENDS: lambda m: m.append(m.since_mark()),
        pickle.ADDITEMS: lambda m: m.append(m.since_mark()),
        pickle.SETITEM: lambda m: m.set_items(list(m.last(2))),
        pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
        pickle.FROZENSET: _frozen_set,
        # Stack and memo.
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.POP: lambda m: m.stack.pop(),
        pickle.POP_MARK: lambda m: m.since_mark(),
        pickle.BINPUT: lambda m: m.remember(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.remember(m.number(4)),
        pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
        pickle.BINGET: lambda m: m.push(m.memo[m.number(1)]),
        pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number(4)]),
        # Names and calls.
        pickle.GLOBAL: lambda m: m.find(m.line(), m.line()),
        pickle.STACK_GLOBAL: lambda m: m.find(*m.last(2)),
        pickle.REDUCE: lambda m: m.call(*m.last(2)),
        pickle.NEWOBJ: lambda m: m.call(*m.last(2)),
        pickle.NEWOBJ_EX: _new_object_with_keywords,
        pickle.BUILD: _Machine.build,
        pickle.BINPERSID: _Machine.refer,
    }.items()
}
