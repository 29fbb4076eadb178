"""The tensors that the pickle of a torch file describes, read without executing it. Pure.

The opcodes (CPython's `pickletools`, protocols 2 to 5) are interpreted over inert values only: numbers,
strings, tuples, lists, `Record`s. No name is imported and nothing is called; a handful of known names
(tensor rebuilders, storages, OrderedDict) are understood, everything else becomes an empty object whose
attributes are kept. The work and memory are bounded by the length of the pickle, and by a `Budget`
that all the pickles of a file share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from struct import Struct, error
from typing import Any

from outlast.repo.layout import Malformed, item_bytes

# Memory that the values may take: a real checkpoint needs 10 to 20 bytes per byte of pickle, and a
# hostile one could ask for 130. Charged generously as things are made, never given back.
_MEMORY_PER_BYTE = 48
_MEMORY_MIN = 4 << 20
_MEMORY_MAX = 80 << 20
_STEPS_BETWEEN_CHARGES = 1024
_STEPS_MAX = 4 << 20  # a tensor takes about 30
_VISITS_MAX = 4 << 20
_VISITS_TO_ENTER = 4  # a list or dict takes longer than a value
_TEXT_BYTES_MAX = 4096
_NAME_CHARACTERS_MAX = 4096
_ALL_NAMES_CHARACTERS_MAX = 16 << 20
_TENSORS_MAX = 1 << 17
_DIMENSIONS_MAX = 64

_TORCH_DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "int64": "I64", "long": "I64",
    "int32": "I32", "int": "I32", "int16": "I16", "short": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex32": "C32",
    "complex64": "C64", "complex128": "C128",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128", "QInt8Storage": "I8", "QUInt8Storage": "U8", "QInt32Storage": "I32",
}  # fmt: skip

# Where torch.nn.Module keeps its parts: left out, so that names read like those of a state_dict.
_MODULE_PARTS = {"_parameters", "_buffers", "_modules"}


class Unreadable(Malformed):
    """Not a pickle that torch writes, or one that asks for too much."""


class Record:
    """A dict or an object. Keys are never hashed: a hostile key, nested deeply enough, ends the process."""

    __slots__ = ("items", "of_object")

    def __init__(self, *, of_object: bool) -> None:
        self.items: list[tuple[Any, Any]] = []
        self.of_object = of_object


class Named:
    """Something that a real unpickler would import."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name


class Storage:
    """A member `data/<key>` of the archive; `dtype` is "" where only its views know it."""

    __slots__ = ("dtype", "key")

    def __init__(self, key: str, dtype: str) -> None:
        self.key = key
        self.dtype = dtype


class View:
    """A tensor: elements of a storage; offset and strides are counted in elements."""

    __slots__ = ("dtype", "key", "offset", "shape", "strides")

    def __init__(self, key: str, dtype: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.key = key
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.strides = strides


class Pickled:
    """What a pickle describes: its root, the element width of each storage, and how long it took."""

    __slots__ = ("root", "steps", "widths")

    def __init__(self, root: Any, widths: dict[str, int], steps: int) -> None:
        self.root = root
        self.widths = widths
        self.steps = steps


class Budget:
    """What all the pickles of one file may cost together: operations, values visited, tensors and their names."""

    __slots__ = ("characters", "steps", "tensors", "visits")

    def __init__(self) -> None:
        self.steps = _STEPS_MAX
        self.visits = _VISITS_MAX
        self.tensors = _TENSORS_MAX
        self.characters = _ALL_NAMES_CHARACTERS_MAX


BARE_TENSOR = "tensor"
"""the name of a tensor that is all a file holds"""

_OPAQUE = Named("", "")
"""Stands for any value that names no tensor: floats, bytes, long texts, sets."""


def interpret(pickle: bytes, budget: Budget) -> Pickled:
    """Read one pickle; raises `Unreadable`."""
    machine = _Machine(pickle, budget)
    try:
        return machine.run()
    except (IndexError, KeyError, error) as exc:
        raise Unreadable("the pickle ends early or takes what it never put") from exc


class _Machine:
    """The stack machine of the pickle format; `pos` is behind the opcode when an operation is called."""

    def __init__(self, pickle: bytes, budget: Budget) -> None:
        self.pickle = pickle
        self.budget = budget
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.names: dict[tuple[str, str], Named] = {}
        self.widths: dict[str, int] = {}
        self.memory_left = min(_MEMORY_MIN + _MEMORY_PER_BYTE * len(pickle), _MEMORY_MAX)

    def run(self) -> Pickled:
        pickle, stack, memo, operations = self.pickle, self.stack, self.memo, _OPERATIONS
        pos = steps = 0
        while (code := pickle[pos]) != _STOP:
            steps += 1
            # The commonest operations, two thirds of every pickle, are written out here.
            if code == _BINGET:
                stack.append(memo[pickle[pos + 1]])
                pos += 2
            elif code == _BININT1:
                stack.append(pickle[pos + 1])
                pos += 2
            elif code == _LONG_BINPUT and int.from_bytes(pickle[pos + 1 : pos + 5], "little") == len(memo):
                memo.append(stack[-1])
                pos += 5
            else:
                self.pos = pos + 1
                operations[code](self)
                pos = self.pos
                if self.memory_left < 0:
                    self.charge(0)
            if not steps % _STEPS_BETWEEN_CHARGES:
                self.charge(8 * _STEPS_BETWEEN_CHARGES)
                self.spend(_STEPS_BETWEEN_CHARGES)
        self.spend(1 + steps % _STEPS_BETWEEN_CHARGES)
        return Pickled(stack[-1], self.widths, steps)

    def spend(self, steps: int) -> None:
        self.budget.steps -= steps
        if self.budget.steps < 0:
            raise Unreadable("pickles longer than any model needs")

    def charge(self, memory: int) -> None:
        """Stop before something of unknown size is made; `run` watches the sum of small things."""
        self.memory_left -= memory
        if self.memory_left < 0:
            raise Unreadable("the pickle builds more than any model needs")

    def number(self, form: Struct) -> int:
        value: int = form.unpack_from(self.pickle, self.pos)[0]
        self.pos += form.size
        return value

    def line(self) -> bytes:
        end = self.pickle.find(b"\n", self.pos, self.pos + _TEXT_BYTES_MAX)
        if end < 0:
            raise Unreadable("a line without end")
        start, self.pos = self.pos, end + 1
        return self.pickle[start:end]

    def text(self, form: Struct) -> None:
        length = self.number(form)
        start = self.pos
        self.pos = start + length
        if self.pos > len(self.pickle):
            raise Unreadable("a text past the end")
        if length > _TEXT_BYTES_MAX:
            self.stack.append(_OPAQUE)
        else:
            self.memory_left -= 64 + 2 * length
            self.stack.append(self.pickle[start : self.pos].decode("utf-8", "replace"))

    def skip(self, form: Struct) -> None:
        """A value of counted length that names nothing."""
        self.pos += self.number(form)
        self.stack.append(_OPAQUE)

    def push(self, value: object) -> None:
        self.stack.append(value)

    def integer(self, form: Struct) -> None:
        self.memory_left -= 40
        self.stack.append(self.number(form))

    def long(self, form: Struct) -> None:
        length = self.number(form)
        start = self.pos
        self.pos += length
        self.memory_left -= 40
        small = 0 <= length <= 16
        self.stack.append(int.from_bytes(self.pickle[start : self.pos], "little", signed=True) if small else _OPAQUE)

    def decimal(self) -> None:
        text = self.line()
        self.memory_left -= 40
        self.stack.append(int(text) if len(text) <= 20 and text.isdigit() else _OPAQUE)

    def text_line(self) -> None:
        self.line()
        self.push(_OPAQUE)

    def binfloat(self) -> None:
        self.pos += 8
        self.push(_OPAQUE)

    def mark(self) -> None:
        self.memory_left -= 40
        self.marks.append(len(self.stack))

    def to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        self.charge(8 * (len(self.stack) - mark))
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def collect(self, items: Iterable[Any]) -> None:
        values = tuple(items)
        self.memory_left -= 64 + 8 * len(values)
        self.stack.append(values)

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) != count:
            raise Unreadable("too little on the stack")
        self.memory_left -= 64 + 8 * count
        self.stack[-count:] = (values,)

    def new_list(self, items: list[Any]) -> None:
        self.memory_left -= 72 + 8 * len(items)
        self.stack.append(items)

    def new_record(self, *, of_object: bool = False) -> Record:
        self.memory_left -= 128
        return Record(of_object=of_object)

    def opaque_of_marked(self) -> None:
        self.to_mark()
        self.stack.append(_OPAQUE)

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            self.charge(16 * len(items))
            target.extend(items)
        elif isinstance(target, Record):
            self.charge(120 * len(items))
            target.items.extend((len(target.items) + at, item) for at, item in enumerate(items))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            self.charge(48 * len(items))
            target.items.extend(zip(items[::2], items[1::2], strict=False))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def dict_of_marked(self) -> None:
        items = self.to_mark()
        self.stack.append(self.new_record())
        self.set_items(items)

    def put(self, index: int) -> None:
        """Picklers number the memo from 0 or 1 upwards, so a list will do."""
        memo, value = self.memo, self.stack[-1]
        if index > len(memo) + 1:
            raise Unreadable("a memo with holes")
        if index > len(memo):
            memo.append(_OPAQUE)
        if index == len(memo):
            memo.append(value)
        else:
            memo[index] = value

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def named(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Unreadable("a name that is no text")
        known = self.names.get((module, name))
        if known is None:
            self.memory_left -= 400 + 2 * (len(module) + len(name))
            known = self.names[module, name] = Named(module, name)
        self.stack.append(known)

    def stack_named(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.named(module, name)

    def persistent(self) -> None:
        match self.stack.pop():
            case ("storage", Named() as kind, str() as key, _, int(), *_):
                dtype = _STORAGES.get(kind.name, "")
                self.memory_left -= 250
                if dtype:
                    self.widths.setdefault(key, item_bytes(dtype))
                self.stack.append(Storage(key, dtype))
            case _:
                self.stack.append(_OPAQUE)

    def new_object(self, count: int) -> None:
        """NEWOBJ and its kin: a class and `count - 1` arguments make an object that we know nothing of."""
        for _ in range(count):
            self.stack.pop()
        self.stack.append(self.new_record(of_object=True))

    def object_of_marked(self) -> None:
        self.to_mark()
        self.stack.append(self.new_record(of_object=True))

    def instance(self) -> None:
        self.line(), self.line()
        self.object_of_marked()

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    def call(self, function: object, arguments: object) -> object:
        """What calling a known name would make; an empty object for any other."""
        if isinstance(function, Named) and isinstance(arguments, tuple):
            where = function.module, function.name
            if where == ("torch._tensor", "_rebuild_from_type_v2"):
                # (rebuilder, type, its arguments, attributes); one level, since rebuilders don't nest it.
                match arguments:
                    case (Named() as inner, Named(), tuple() as inner_arguments, *_) if inner is not function:
                        return self.call(inner, inner_arguments)
            made = self.rebuild(where, arguments)
            if made is not None:
                return made
        return self.new_record(of_object=True)

    def rebuild(self, where: tuple[str, str], arguments: tuple[Any, ...]) -> object | None:
        match where, arguments:
            case ("torch._utils", "_rebuild_tensor"), (Storage() as storage, offset, shape, strides):
                return self.view(storage, storage.dtype, offset, shape, strides, ())
            case ("torch._utils", "_rebuild_tensor_v2"), (
                Storage() as storage,
                offset,
                shape,
                strides,
                _,
                _,
                *extra,
            ):
                return self.view(storage, storage.dtype, offset, shape, strides, extra)
            case (
                ("torch._utils", "_rebuild_tensor_v3"),
                (Storage() as storage, offset, shape, strides, _, _, Named(module="torch") as dtype, *extra),
            ):
                return self.view(storage, _TORCH_DTYPES.get(dtype.name, ""), offset, shape, strides, extra)
            case ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"), (
                View() as view,
                *_,
            ):
                return view
            case ("torch", "Size"), (tuple() as sizes,):
                return sizes
            case ("collections", "OrderedDict" | "defaultdict"), _:
                return self.new_record()
        return None

    def view(
        self, storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any, extra: Iterable[Any]
    ) -> View | None:
        if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
            raise Unreadable("a tensor without a shape")
        numbers = (offset, *shape, *strides)
        if len(shape) > _DIMENSIONS_MAX or set(map(type, numbers)) != {int} or min(numbers) < 0:
            raise Unreadable("a tensor with an impossible shape")
        # Lazy conjugation or negation: the stored bytes are not the values, so this is no plain tensor.
        if not dtype or any(isinstance(each, Record) and each.items for each in extra):
            return None
        self.memory_left -= 150
        self.widths.setdefault(storage.key, item_bytes(dtype))
        return View(storage.key, dtype, offset, shape, strides)

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record) and target.of_object:
            # Objects with slots bring (dict or None, slots).
            for part in state if isinstance(state, tuple) else (state,):
                self.memory_left -= 80
                target.items.append((None, part))
                if isinstance(part, Record):
                    part.of_object = True


_U8, _U16, _I32, _U32, _U64 = Struct("<B"), Struct("<H"), Struct("<i"), Struct("<I"), Struct("<Q")
_STOP, _BINGET, _LONG_BINPUT, _BININT1 = b".hrK"

_Operation = Callable[[_Machine], object]
_OPERATIONS: dict[int, _Operation] = {
    0x80: lambda m: m.number(_U8),  # PROTO
    0x95: lambda m: m.number(_U64),  # FRAME
    ord("("): _Machine.mark,
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): _Machine.to_mark,
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.integer(_I32),
    ord("M"): lambda m: m.integer(_U16),
    0x8A: lambda m: m.long(_U8),
    0x8B: lambda m: m.long(_U32),
    ord("I"): _Machine.decimal,
    ord("L"): _Machine.text_line,
    ord("F"): _Machine.text_line,
    ord("S"): _Machine.text_line,
    ord("V"): _Machine.text_line,
    ord("P"): _Machine.text_line,
    ord("G"): _Machine.binfloat,
    ord("X"): lambda m: m.text(_U32),
    0x8C: lambda m: m.text(_U8),
    0x8D: lambda m: m.text(_U64),
    ord("T"): lambda m: m.text(_U32),
    ord("U"): lambda m: m.text(_U8),
    ord("B"): lambda m: m.skip(_U32),
    ord("C"): lambda m: m.skip(_U8),
    0x8E: lambda m: m.skip(_U64),
    0x96: lambda m: m.skip(_U64),  # BYTEARRAY8
    0x97: lambda m: m.push(_OPAQUE),  # NEXT_BUFFER
    0x98: lambda m: None,  # READONLY_BUFFER
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.collect(m.to_mark()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("]"): lambda m: m.new_list([]),
    ord("l"): lambda m: m.new_list(m.to_mark()),
    ord("a"): lambda m: m.add_items([m.stack.pop()]),
    ord("e"): lambda m: m.add_items(m.to_mark()),
    ord("}"): lambda m: m.stack.append(m.new_record()),
    ord("d"): _Machine.dict_of_marked,
    ord("s"): _Machine.set_item,
    ord("u"): lambda m: m.set_items(m.to_mark()),
    0x8F: lambda m: m.push(_OPAQUE),  # EMPTY_SET
    0x90: _Machine.to_mark,  # ADDITEMS
    0x91: _Machine.opaque_of_marked,  # FROZENSET
    ord("c"): lambda m: m.named(m.line().decode("utf-8", "replace"), m.line().decode("utf-8", "replace")),
    0x93: _Machine.stack_named,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    0x81: lambda m: m.new_object(2),  # NEWOBJ
    0x92: lambda m: m.new_object(3),  # NEWOBJ_EX
    ord("i"): _Machine.instance,
    ord("o"): _Machine.object_of_marked,
    0x82: lambda m: m.push((m.number(_U8), _OPAQUE)[1]),  # EXT1
    0x83: lambda m: m.push((m.number(_U16), _OPAQUE)[1]),  # EXT2
    0x84: lambda m: m.push((m.number(_I32), _OPAQUE)[1]),  # EXT4
    ord("Q"): _Machine.persistent,
    ord("q"): lambda m: m.put(m.number(_U8)),
    ord("r"): lambda m: m.put(m.number(_U32)),
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    ord("p"): lambda m: m.put(_decimal(m.line())),
    ord("j"): lambda m: m.get(m.number(_U32)),
    ord("g"): lambda m: m.get(_decimal(m.line())),
}


def _decimal(text: bytes) -> int:
    if len(text) > 20 or not text.isdigit():
        raise Unreadable("a memo index that is no number")
    return int(text)


def name_tensors(pickled: Pickled, budget: Budget) -> list[tuple[str, View]]:
    """Every tensor under the path of keys and positions that leads to it, joined with ".".

    A tensor that is all the file holds is called `BARE_TENSOR`. Where two paths spell the same
    name, the later ones get "#2", "#3". Raises `Unreadable` for structures that unfold without end.
    """
    found: list[tuple[str, View]] = []
    taken: dict[str, int] = {}
    for path, view in _walk(pickled.root, 50_000 + 4 * pickled.steps, budget):
        plain = name = path or BARE_TENSOR
        while name in taken:
            taken[plain] += 1
            name = f"{plain}#{taken[plain]}"
        taken[name] = 1
        budget.characters -= len(name)
        budget.tensors -= 1
        if budget.characters < 0 or budget.tensors < 0:
            raise Unreadable("more names than any model has")
        found.append((name, view))
    return found


def _walk(root: Any, steps: int, budget: Budget) -> Iterator[tuple[str, View]]:
    """Depth first without recursion; a structure is not entered again from within itself."""
    if isinstance(root, View):
        yield "", root
    levels = [("", root, _children(root))]
    entered = {id(root)}
    while levels:
        path, parent, children = levels[-1]
        for part, child in children:
            steps -= 1
            budget.visits -= 1
            if steps < 0 or budget.visits < 0:
                raise Unreadable("a structure that unfolds without end")
            if not isinstance(child, (View, Record, list, tuple)) or id(child) in entered:
                continue
            below = f"{path}.{part}" if path and part else path or part
            if len(below) > _NAME_CHARACTERS_MAX:
                raise Unreadable("a name longer than any tool writes")
            if isinstance(child, View):
                yield below, child
            else:
                budget.visits -= _VISITS_TO_ENTER
                entered.add(id(child))
                levels.append((below, child, _children(child)))
                break
        else:
            levels.pop()
            entered.discard(id(parent))


def _children(parent: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(parent, Record):
        for at, (key, child) in enumerate(parent.items):
            part = str(key) if isinstance(key, (str, int)) else f"<{at}>"
            transparent = key is None or (parent.of_object and part in _MODULE_PARTS)
            yield "" if transparent else part, child
    elif isinstance(parent, (list, tuple)):
        for at, child in enumerate(parent):
            yield str(at), child


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements follow one another in row-major order; dimensions of one element don't matter."""
    if 0 in shape:
        return True
    real = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    return (not real or real[-1][1] == 1) and all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(real))
