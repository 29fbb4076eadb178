"""Nested values of a training state <-> JSON that anybody can read, and tensors beside it. No pickle, ever.

JSON says most of it: null, booleans, integers of 64 bits, finite floats (written so that they come back bit
for bit), text, lists, and objects for dictionaries whose keys are text. Everything else is an object with the
key `$`, which names its kind:

    float     v: "nan", "inf" or "-inf"           int     v: decimal digits, beyond 64 bits
    complex   v: [real, imaginary]                bytes, bytearray   v: base64
    tuple, set, frozenset, deque   v: list        dict, ordered, counter   v: list of [key, value]
    dtype, device   v: its name                   size    v: list
    scalar    dtype, v: the bytes of a numpy scalar in hex
    tensor    see `state`                         array   the same, for a numpy array

What has no safe form here is refused with the path at which it lies.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from outlast.checkpoint.state_file import DEPTH_MAX, INT_DIGITS_MAX
from outlast.errors import Corrupt, Refused

Node = Any
"""what JSON can say"""

Path = tuple[object, ...]
"""keys from the root of the state down to a value"""

TakeTensor = Callable[[Path, torch.Tensor], Node]
GiveTensor = Callable[[Node], torch.Tensor]

_INT_MAX = 1 << 63
_SCALAR = re.compile(r"[<>|=]?[biufc][0-9]{1,2}")
_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


def encode(value: object, path: Path, take: TakeTensor) -> Node:
    """The JSON form of a value; `take(path, tensor)` gives that of each tensor. Raises `Refused`."""
    if isinstance(value, torch.Tensor):
        return take(path, value)
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        return writable(value, path)
    if type(value) is int:
        return value if -_INT_MAX <= value < _INT_MAX else {"$": "int", "v": _digits(value, path)}
    if type(value) is float:
        return value if math.isfinite(value) else {"$": "float", "v": str(value)}
    if len(path) > DEPTH_MAX:
        raise Refused(f"{shown(path)} lies more than {DEPTH_MAX} levels deep, or holds itself; nothing was saved.")

    def inner(each: object, where: object) -> Node:
        return encode(each, (*path, where), take)

    def listed(values: Iterable[object]) -> list[Node]:
        return [inner(each, at) for at, each in enumerate(values)]

    if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {writable(key, (*path, key)): inner(each, key) for key, each in value.items()}
    if type(value) is list:
        return listed(value)
    pairs = _PAIRS.get(type(value))
    if pairs:
        assert isinstance(value, dict)
        return {"$": pairs, "v": [[inner(key, key), inner(each, key)] for key, each in value.items()]}
    kind = _LISTS.get(type(value))
    if kind:
        assert isinstance(value, Iterable)
        found = listed(sorted(value, key=repr) if kind in ("set", "frozenset") else value)
        return {"$": kind, "v": found, **({"max": value.maxlen} if isinstance(value, deque) else {})}
    return _encode_other(value, path, take)


_PAIRS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_LISTS: dict[type, str] = {
    tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque", torch.Size: "size",
}  # fmt: skip


def _encode_other(value: object, path: Path, take: TakeTensor) -> Node:
    match value:
        case complex() if type(value) is complex:
            return {"$": "complex", "v": [value.real.hex(), value.imag.hex()]}
        case bytes() | bytearray() if type(value) in (bytes, bytearray):
            return {"$": type(value).__name__, "v": base64.b64encode(value).decode()}
        case torch.dtype():
            return {"$": "dtype", "v": str(value).removeprefix("torch.")}
        case torch.device():
            return {"$": "device", "v": str(value)}
        case np.generic() if value.dtype.kind in "biufc":
            return {"$": "scalar", "dtype": value.dtype.str, "v": value.tobytes().hex()}
        case np.ndarray() if type(value) is np.ndarray and value.dtype.kind in "biufc":
            return {"$": "array", "dtype": value.dtype.str, "v": take(path, _as_tensor(value))}
    what = f"a {type(value).__module__}.{type(value).__qualname__}"
    raise Refused(
        f"{shown(path)} is {what}, which has no form that could be read back without running code; nothing was saved.",
        hint="Leave it out of the state, or give the object that holds it `state_dict()` and `load_state_dict()` "
        "methods that speak of numbers, text, lists, dictionaries and tensors.",
    )


def writable(text: str, path: Path) -> str:
    """The text itself. Raises `Refused` for what UTF-8 can't say, such as a file name that was no UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise Refused(
                f"{shown(path)} has a lone surrogate in its text, which JSON can't hold; nothing was saved.",
                hint="Keep it as bytes: os.fsencode of a file name.",
            ) from exc
    return text


def _digits(value: int, path: Path) -> str:
    # Longer text of digits neither Python nor others read without being told to.
    if value.bit_length() > INT_DIGITS_MAX * 3:
        raise Refused(
            f"{shown(path)} is an integer of {value.bit_length():,} bits; at most {INT_DIGITS_MAX * 3:,} can be kept; "
            "nothing was saved.",
            hint="Keep it as bytes: value.to_bytes.",
        )
    return str(value)


def shown(path: Path) -> str:
    """As a person would write it in Python."""
    return f"state{''.join(f'[{key!r}]' for key in path)}"


def _as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The bytes of an array, row by row; torch lacks some of numpy's types."""
    return torch.from_numpy(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).copy()).reshape(
        *array.shape, array.itemsize
    )


def decode(node: Node, give: GiveTensor, path: Path = ()) -> Any:
    """Undo `encode`, of a tree whose form was looked at. Raises `Corrupt` for what it never writes."""
    if isinstance(node, list):
        return [decode(each, give, (*path, at)) for at, each in enumerate(node)]
    if not isinstance(node, dict):
        return node
    kind = node.get("$")
    if kind is None:
        return {key: decode(each, give, (*path, key)) for key, each in node.items()}
    if kind == "tensor":
        return give(node)
    try:
        return _decode_kind(kind, node, give, path)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as exc:
        raise Corrupt(f"{shown(path)}, of kind {kind!r}, can't be read: {exc!r}.") from exc


def _decode_kind(kind: str, node: dict[str, Any], give: GiveTensor, path: Path) -> Any:
    value = node["v"]
    match kind:
        case "float":
            return float(value)
        case "int":
            return int(value)
        case "complex":
            return complex(float.fromhex(value[0]), float.fromhex(value[1]))
        case "bytes":
            return base64.b64decode(value, validate=True)
        case "bytearray":
            return bytearray(base64.b64decode(value, validate=True))
        case "dtype":
            return _DTYPES[value]
        case "device":
            return torch.device(value)
        case "scalar":
            [scalar] = np.frombuffer(bytes.fromhex(value), _numpy_type(node["dtype"]))
            return scalar
        case "array":
            raw = give(value)
            return raw.contiguous().numpy().copy().view(_numpy_type(node["dtype"])).reshape(raw.shape[:-1])
        case "dict" | "ordered" | "counter":
            keys = [decode(key, give, (*path, at)) for at, (key, _) in enumerate(value)]
            pairs = [(key, decode(each, give, (*path, key))) for key, (_, each) in zip(keys, value, strict=True)]
            return {"dict": dict, "ordered": OrderedDict, "counter": Counter}[kind](
                pairs if kind != "counter" else dict(pairs)
            )
    values = [decode(each, give, (*path, at)) for at, each in enumerate(value)]
    match kind:
        case "tuple":
            return tuple(values)
        case "set":
            return set(values)
        case "frozenset":
            return frozenset(values)
        case "deque":
            return deque(values, node["max"])
        case "size":
            return torch.Size(values)
    raise ValueError("no such kind")


def _numpy_type(name: str) -> np.dtype[Any]:
    if not _SCALAR.fullmatch(name):
        raise ValueError(f"{name} is no type of plain numbers")
    return np.dtype(name)
