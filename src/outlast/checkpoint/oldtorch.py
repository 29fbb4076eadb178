"""Where the tensors lie in what `torch.save` wrote before version 1.6, and writes when told to. Pure, no pickle runs.

The file is five pickles (a magic number, the version, facts of the system, the object, the keys of the storages)
and then, for each key in order, the number of elements in 8 bytes and the elements. It has no checksums.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator

import msgspec

from outlast.repo import torchpickle
from outlast.repo.layout import DTYPE_BITS, Malformed, ReadAt, Tensor, element_count

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLES_BYTES_MAX = 24 << 20
_STEPS_MAX = 4 << 20
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_PUTS = {"BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"}


class Content(msgspec.Struct):
    """The tensors that lie inside the file, and why the others are lost."""

    tensors: list[Tensor] = []
    lost: dict[str, str] = {}


def content(read: ReadAt, size: int) -> Content:
    """Raises `Malformed` where the names of the tensors can't be read: then nothing of it can be told apart."""
    data = read(0, min(size, _PICKLES_BYTES_MAX))
    try:
        ends = list(_ends(data))
        if len(ends) < 5:
            raise Malformed("the description of its tensors is longer than that of any model, or cut off")
        keys, counts = _keys(data[ends[3] : ends[4]]), _counts(data[ends[2] : ends[3]])
    except (ValueError, UnicodeError, IndexError, KeyError) as exc:
        raise Malformed(f"the description of its tensors is damaged: {exc}") from exc
    budget = torchpickle.Budget()
    views = torchpickle.name_tensors(torchpickle.interpret(data[ends[2] : ends[3]], budget), budget)
    widths = {view.key: DTYPE_BITS[view.dtype] // 8 for _, view in views}
    places: dict[str, tuple[int, int]] = {}
    wrong: dict[str, str] = {}
    at = ends[4]
    for key in keys:
        if key not in widths or key not in counts:
            break  # nothing tells where the next one begins
        length = counts[key] * widths[key]
        said = read(at, 8) if at + 8 <= size else b""
        places[key] = at + 8, length
        if at + 8 + length > size:
            wrong[key] = "the file ends before its last byte"
        elif said != counts[key].to_bytes(8, "little"):
            wrong[key] = "the number of elements before it is not that of its description"
        at += 8 + length
    found = Content()
    for name, view in views:
        problem = wrong.get(view.key, "" if view.key in places else "where it lies is not known")
        try:
            if not problem:
                found.tensors.append(_tensor(name, view, *places[view.key]))
        except Malformed as exc:
            problem = str(exc)
        if problem:
            found.lost[name] = problem
    return found


def _tensor(name: str, view: torchpickle.View, start: int, stored: int) -> Tensor:
    item = DTYPE_BITS[view.dtype] // 8
    length = element_count(view.shape, max(stored, 1 << 30) // item) * item
    plain = torchpickle.contiguous(view.shape, view.strides)
    tensor = Tensor(name, view.dtype, view.shape, start + view.offset * item, length, None if plain else view.strides)
    if length and view.offset * item + tensor.reach_bytes > stored:
        raise Malformed("it reaches beyond its storage")
    return tensor


def _ends(data: bytes) -> Iterator[int]:
    """Where each of the five pickles ends."""
    file = io.BytesIO(data)
    steps = 0
    for _ in range(5):
        for opcode, _, _ in pickletools.genops(file):
            steps += 1
            if steps > _STEPS_MAX:
                raise Malformed("the description of its tensors is longer than that of any model")
            if opcode.name == "STOP":
                break
        yield file.tell()


def _keys(pickle: bytes) -> list[str]:
    return [str(value) for opcode, value, _ in pickletools.genops(pickle) if opcode.name in _STRINGS]


def _counts(pickle: bytes) -> dict[str, int]:
    """The number of elements of each storage, by key. Raises `Malformed` for parts of storages (before torch 0.4)."""
    found: dict[str, int] = {}
    recent: list[tuple[str, object]] = []
    for opcode, value, _ in pickletools.genops(pickle):
        if opcode.name in _PUTS:
            continue
        if opcode.name == "BINPERSID":
            # ("storage", type, key, device, number of elements, None)
            start = max((at for at, (name, _) in enumerate(recent) if name == "MARK"), default=-1)
            parts = recent[start + 1 :]
            if len(parts) != 7 or parts[5][0] != "NONE" or parts[6][0] != "TUPLE":
                raise Malformed("it is of a torch before 0.4, which is not known here")
            if parts[2][0] in _STRINGS and isinstance(parts[4][1], int):
                found[str(parts[2][1])] = parts[4][1]
        recent = [*recent[-15:], (opcode.name, value)]
    return found
