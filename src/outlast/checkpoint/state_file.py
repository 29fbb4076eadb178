"""What `state.json` of a checkpoint says: the part of a state that is no tensor. Torch is not needed to read it.

With several ranks each has a folder `rank-00000/` of its own inside the snapshot; one rank has its files at the root.
What it says is believed only after all of it was looked at: see `tree` for what the objects with a `$` stand for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from outlast.errors import Corrupt, Refused
from outlast.records import Entry, Snapshot, parse
from outlast.repo.content import Content, RecentChunks

STATE_FILE = "state.json"
STATE_VERSION = 1
RNG = "rng"
"""the key of the random number generators of the process"""
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
"""what names a part of a state, and its files"""
DEPTH_MAX = 100
"""levels of a tree"""
INT_DIGITS_MAX = 4300
"""that Python reads without being told to"""

_Kind = Literal["module", "optimizer", "stateful", "value", "generator", "rng"]


class Description(msgspec.Struct):
    """The content of `state.json`."""

    version: int
    step: int
    parts: dict[str, tuple[str, object]]
    """key -> (kind, tree)"""
    facts: dict[str, object] = {}


def folder_of(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}/" if ranks > 1 else ""


def ranks_of(files: Mapping[str, Entry]) -> int:
    """How many ranks saved a checkpoint, of whose files these are all; 0 for one that no `Run` saved."""
    return sum(path.rpartition("/")[2] == STATE_FILE for path in files)


def describe(files: Mapping[str, Entry], chunks: RecentChunks, snapshot: Snapshot) -> Description:
    """What `state.json` of a rank says, whose files these are; every value in it is of the form that it must have.

    Raises `Corrupt`, and `Refused` for a later version.
    """
    entry = files.get(STATE_FILE)
    if entry is None:
        raise Refused(f"snapshot {snapshot.id[:8]} is no checkpoint of a training state: it has no {STATE_FILE}.")
    return described_by(read(entry, chunks), snapshot)


def described_by(data: bytes, snapshot: Snapshot) -> Description:
    """What the bytes of such a file say; see `describe`."""
    what = f"{STATE_FILE} of checkpoint {snapshot.id[:8]}"
    found = parse(data, _Versioned, what)
    if found.version != STATE_VERSION:
        raise Refused(f"{what} is of version {found.version}, and this program knows {STATE_VERSION}.")
    described = parse(data, Description, what)
    if snapshot.tags.get("step", str(described.step)) != str(described.step):
        raise Corrupt(f"{what} is of step {described.step}, and the checkpoint of step {snapshot.tags['step']}.")
    _convert(described.facts, _Facts, f"{what}, facts")
    for key, (kind, tree) in described.parts.items():
        if not KEY.fullmatch(key):
            raise Corrupt(f"{what} has a part {key!r}, which can't be the key of one.")
        _convert(kind, _Kind, f"{what}, the kind of {key}")
        _check_tree(key, tree, what)
        _check_form(key, kind, tree, what)
    return described


def read(entry: Entry, chunks: RecentChunks) -> bytes:
    return Content(entry, chunks.get).read(0, entry.size)


class _Versioned(msgspec.Struct):
    version: int


# -- the form of what is said ----------------------------------------------------------------------------

_Count = Annotated[int, Meta(ge=0)]


class _Block(msgspec.Struct):
    shape: list[_Count]
    offset: list[_Count]


class _Marked(msgspec.Struct, tag_field="$", forbid_unknown_fields=True):
    """An object with a `$`, whose value is the name of the kind."""


class _Tensor(_Marked, tag="tensor"):
    name: str
    order: list[_Count] | UnsetType = UNSET
    complex: bool = False
    device: Annotated[str, Meta(pattern="^[a-z]{1,32}(:[0-9]{1,4})?$")] = "cpu"
    block: _Block | UnsetType = msgspec.field(default=UNSET, name="global")


_Numpy = Annotated[str, Meta(pattern="^[<>|=]?[biufc][0-9]{1,2}$")]


class _Array(_Marked, tag="array"):
    dtype: _Numpy
    v: _Tensor


class _Scalar(_Marked, tag="scalar"):
    dtype: _Numpy
    v: Annotated[str, Meta(pattern="^([0-9a-f]{2})+$", max_length=64)]


class _Float(_Marked, tag="float"):
    v: Literal["nan", "inf", "-inf"]


class _Int(_Marked, tag="int"):
    v: Annotated[str, Meta(pattern="^-?[0-9]+$", max_length=INT_DIGITS_MAX + 1)]


class _Complex(_Marked, tag="complex"):
    v: tuple[str, str]


class _Text(_Marked):
    v: str


class _Listed(_Marked):
    v: list[object]


class _Deque(_Marked, tag="deque"):
    v: list[object]
    max: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None


class _Pairs(_Marked):
    v: list[tuple[object, object]]


_TEXTS = ("bytes", "bytearray", "dtype", "device")
_LISTS = ("tuple", "set", "frozenset", "size")
_PAIRS = ("dict", "ordered", "counter")
_KINDS: dict[str, Any] = {"tensor": _Tensor, "array": _Array, "scalar": _Scalar, "float": _Float, "int": _Int,
                          "complex": _Complex, "deque": _Deque}  # fmt: skip
for _names, _base in ((_TEXTS, _Text), (_LISTS, _Listed), (_PAIRS, _Pairs)):
    for _name in _names:
        _KINDS[_name] = msgspec.defstruct(_name, [], bases=(_base,), tag=_name)
_PLAIN = (type(None), bool, int, float, str)


def _check_tree(key: str, tree: object, what: str) -> None:
    """Raises `Corrupt`. Not by recursion: what was made to be deep must not exhaust the stack."""
    rest: list[tuple[object, tuple[object, ...]]] = [(tree, (key,))]
    while rest:
        node, path = rest.pop()
        if type(node) in _PLAIN:
            continue
        where = f"{what}, state{''.join(f'[{each!r}]' for each in path[:8])}{'[…]' if len(path) > 8 else ''}"
        if len(path) > DEPTH_MAX + 1:
            raise Corrupt(f"{where} lies more than {DEPTH_MAX} levels deep.")
        inner: list[tuple[object, object]] = []
        if isinstance(node, list):
            inner = list(enumerate(node))
        elif isinstance(node, dict) and "$" not in node:
            inner = list(node.items())
        elif isinstance(node, dict):
            kind = node["$"]
            if not isinstance(kind, str) or kind not in _KINDS:
                raise Corrupt(f"{where} is of a kind {kind!r} that there is not.")
            marked = _convert(node, _KINDS[kind], where)
            if isinstance(marked, _Listed | _Deque):
                inner = list(enumerate(marked.v))
            elif isinstance(marked, _Pairs):
                inner = [(at, each) for at, pair in enumerate(marked.v) for each in pair]
        rest += [(each, (*path, at)) for at, each in inner if type(each) not in _PLAIN]


class _Module(msgspec.Struct):
    state: dict[str, object]
    buffers: dict[str, _Tensor]
    grads: dict[str, _Tensor | None]


class _Group(msgspec.Struct):
    params: list[str]


class _Optimizer(msgspec.Struct):
    state: dict[str, dict[str, object]]
    param_groups: list[_Group]


class _Random(msgspec.Struct):
    python: object
    numpy: object
    torch: object
    cuda: list[object]


def _check_form(key: str, kind: str, tree: Any, what: str) -> None:
    form = {"module": _Module, "optimizer": _Optimizer, RNG: _Random}.get(kind)
    if form is None:
        return
    where = f"{what}, state[{key!r}]"
    _convert(tree, form, where)
    for name in ("state", "buffers", "grads"):
        if "$" in tree or "$" in tree.get(name, ()):
            raise Corrupt(f"{where}[{name!r}] is no object of names.")


class _Parallel(msgspec.Struct, frozen=True):
    mesh: dict[str, int] = {}


class _Life(msgspec.Struct, frozen=True):
    run_seconds: Annotated[float, Meta(ge=0)] = 0.0
    failures: _Count = 0
    ended_well: bool = False


class _Facts(msgspec.Struct):
    """Those that something is decided by."""

    classes: dict[str, str] = {}
    parallel: _Parallel = _Parallel()
    life: _Life = _Life()
    environment: dict[str, object] = {}
    since: dict[str, object] = {}


def _convert(value: object, form: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, form)
    except (msgspec.ValidationError, OverflowError, RecursionError) as exc:
        raise Corrupt(f"{where} can't be read: {exc}.") from exc
