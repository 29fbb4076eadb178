"""Is what a restored folder holds a model, or a training state, that programs can read? Torch is not needed.

Two rungs of the ladder that a drill climbs. Structure: every file that has a known tensor format parses, and so do the
JSON files that models are loaded by; the shards that an index names are there, and `state.json` of a checkpoint agrees
with its files. Values: every tensor is read, and what is no number is named. No pickle is executed, and no link is
followed out of the folder.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import numpy as np

from outlast.checkpoint import not_finite
from outlast.checkpoint.state_file import STATE_FILE, Description, described_by, folder_of
from outlast.checkpoint.tree_text import tensor_nodes
from outlast.errors import OutlastError
from outlast.records import Snapshot, path_text
from outlast.repo import formats
from outlast.repo.formats import Span, Tensor

_PROBLEMS_MAX = 100
_MASKS_SHOWN = 5
_JSON_BYTES_MAX = 64 << 20
_PIECE_BYTES = 8 << 20

_SAFETENSORS = b".safetensors"
_ALWAYS = {_SAFETENSORS: "safetensors", b".gguf": "gguf"}
_TORCH = (b".pt", b".pth", b".bin", b".ckpt", b".distcp")
# `.bin` is what many things are called; these are weights.
_WEIGHTS_BIN = re.compile(rb"(?:pytorch_model|adapter_model|diffusion_pytorch_model|optimizer|scheduler).*\.bin")
_INDEX = b".index.json"
# By these, models are loaded. Other JSON files may be lines of JSON, or have comments, as their programs like it.
_LOADED_BY = re.compile(
    rb"(?:.*config|.*\.index|model_index|state|trainer_state|tokenizer|special_tokens_map|added_tokens|vocab)\.json"
)
_RANK = re.compile(r"rank-\d{5}/")


class Looked(msgspec.Struct):
    """What one rung looked at, and what it found."""

    files: int = 0
    """that hold tensors; of restored bytes: all"""
    tensors: int = 0
    documents: int = 0
    """JSON files"""
    bytes: int = 0
    problems: list[str] = []
    """why it is not reached"""
    notes: list[str] = []
    """what a person should know, and that is no failure"""

    def problem(self, text: str) -> None:
        self._add(self.problems, text)

    def note(self, text: str) -> None:
        self._add(self.notes, text)

    @staticmethod
    def _add(told: list[str], text: str) -> None:
        if len(told) < _PROBLEMS_MAX:
            told.append(text)
        elif len(told) == _PROBLEMS_MAX:
            told.append("… and more")


class TensorFile(msgspec.Struct, frozen=True):
    """A file that holds tensors."""

    path: bytes
    """relative to the folder"""
    format: str
    tensors: list[Tensor] | None
    """None: only where they lie is known, see `spans`"""
    spans: list[Span]


class Structure(msgspec.Struct):
    """A folder that was looked through."""

    folder: bytes
    looked: Looked
    files: list[TensorFile] = []
    ranks: int = 0
    """that saved it, where it is a checkpoint of a `Run`; else 0"""


def structure(folder: bytes, snapshot: Snapshot) -> Structure:
    """Look through all that was restored of a snapshot. What is wrong is told in `looked`."""
    found = Structure(os.path.realpath(folder), Looked())
    survey = _Survey(found, snapshot)
    for path in _walk(found.folder):
        survey.look(path)
    survey.compare()
    return found


def values(found: Structure, *, allowed: Sequence[str] = ()) -> Looked:
    """Read every tensor, and name those with elements that are no number or infinite.

    NaN in a model file is a problem, and so is infinity, but in what models have so on purpose: a mask of minus
    infinity and one other value, or a bound of one element. Arrays in `.npy` files may lack values, and gradients kept
    between two steps may overflow: those are noted. So is what fits `allowed`, globs of names of tensors.
    """
    looked = Looked()
    masks: list[str] = []
    seen: set[tuple[int, int]] = set()
    for file in found.files:
        with _opened(found.folder, file.path) as (fd, _):
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) in seen:
                continue  # another name of a file that was read
            seen.add((status.st_dev, status.st_ino))
            looked.files += 1
            _read_values(file, _reader(fd), looked, masks, allowed)
    if masks:
        more = ", …" if len(masks) > _MASKS_SHOWN else ""
        looked.note(f"infinite on purpose, as masks and bounds are: {', '.join(masks[:_MASKS_SHOWN])}{more}")
    return looked


def _read_values(
    file: TensorFile, read: formats.ReadAt, looked: Looked, masks: list[str], allowed: Sequence[str]
) -> None:
    if file.tensors is None:
        for span in file.spans:
            for start in range(0, span.length, _PIECE_BYTES):
                looked.bytes += len(read(span.offset + start, min(_PIECE_BYTES, span.length - start)))
        return
    places = set()
    for tensor in file.tensors:
        place = (tensor.offset, tensor.length, tensor.strides)
        looked.tensors += 1
        if place in places:
            continue  # tied
        places.add(place)
        looked.bytes += tensor.length

        def pieces(tensor: Tensor = tensor) -> Iterator[bytes]:
            return formats.tensor_bytes(read, tensor)

        if not not_finite.is_float(tensor.dtype):
            for _ in pieces():
                pass
            continue
        odd = not_finite.count(tensor.dtype, pieces)
        if odd is None:
            continue
        told = f"{_shown(file.path)}: {tensor.name}: {odd}"
        if any(fnmatch.fnmatchcase(tensor.name, glob) for glob in allowed):
            looked.note(f"{told}, which is allowed")
        elif odd.is_mask:
            masks.append(tensor.name)
        elif file.format == "npy" or _is_gradient(file, tensor):
            looked.note(told)
        else:
            looked.problem(told)


def _is_gradient(file: TensorFile, tensor: Tensor) -> bool:
    return file.path.endswith(b".more.safetensors") and tensor.name.startswith("grad.")


# -- structure -----------------------------------------------------------------------------------------------


class _Survey:
    """Looks at one file after the other, and then at what they say of each other."""

    def __init__(self, found: Structure, snapshot: Snapshot) -> None:
        self._found, self._looked, self._snapshot = found, found.looked, snapshot
        self._by_path: dict[bytes, TensorFile] = {}
        self._indexes: list[tuple[bytes, Any]] = []
        self._states: dict[str, Description] = {}
        """folder of a rank -> what its `state.json` says"""

    def look(self, path: bytes) -> None:
        name = os.path.basename(path)
        is_document = name.endswith(b".json")
        whole = os.path.join(self._found.folder, path)
        if os.path.islink(whole):
            if _LOADED_BY.fullmatch(name) or name.endswith((*_ALWAYS, *_TORCH)):
                self._look_at_link(path, whole)
            if not is_document or not os.path.isfile(self._inside(whole)):
                return  # what it leads to is looked at under its own name
        try:
            with _opened(self._found.folder, path) as (fd, size):
                if is_document:
                    self._look_at_document(path, name, fd, size)
                else:
                    self._look_at_tensors(path, name, fd, size)
        except PermissionError:
            self._looked.note(f"{_shown(path)} can't be looked into: its mode keeps this user out")

    def _inside(self, whole: bytes) -> bytes:
        """Where a link leads, if that is inside the folder; else nowhere."""
        real = os.path.realpath(whole)
        return real if real.startswith(self._found.folder + b"/") else b""

    def _look_at_link(self, path: bytes, whole: bytes) -> None:
        inside = self._inside(whole)
        if inside and os.path.lexists(inside):
            return
        target = os.readlink(whole)
        told = f"{_shown(path)} is a link to {_shown(target)}, which is not in the backup"
        sources = [os.fsencode(source).rstrip(b"/") + b"/" for source in self._snapshot.sources]
        if target.startswith(tuple(sources)):
            self._looked.note(f"{_shown(path)} is a link to {_shown(target)}, and leads there only in its old place")
        else:
            self._looked.problem(told)

    # -- JSON --

    def _look_at_document(self, path: bytes, name: bytes, fd: int, size: int) -> None:
        self._looked.documents += 1
        strict = _LOADED_BY.fullmatch(name)
        tell = self._looked.problem if strict else self._looked.note
        if size > _JSON_BYTES_MAX:
            self._looked.note(f"{_shown(path)} is too large to be parsed here")
            return
        data = _reader(fd)(0, size)
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError) as exc:
            if strict or not _are_lines(data):
                tell(f"{_shown(path)} is no JSON: {exc}")
            return
        if name.endswith(_INDEX):
            self._indexes.append((path, parsed))
        shown = _shown(path)
        folder = shown.removesuffix(STATE_FILE)
        is_rank = not folder or _RANK.fullmatch(folder)
        if self._snapshot.kind == "checkpoint" and name == STATE_FILE.encode() and is_rank:
            self._found.ranks += 1
            try:
                self._states[folder] = described_by(data, self._snapshot)
            except OutlastError as exc:
                self._looked.problem(f"{shown}: {exc.message}")

    # -- tensors --

    def _look_at_tensors(self, path: bytes, name: bytes, fd: int, size: int) -> None:
        read, ending = _reader(fd), os.path.splitext(name)[1]
        kind = formats.detect(read, size)
        expected = _ALWAYS.get(ending)
        if expected and kind != expected:
            begins = "it is empty" if not size else f"it is cut short, or no {expected} file"
            self._looked.problem(f"{_shown(path)} can't be read: {begins}")
        elif kind is not None:
            self._look_inside(path, kind, read, size)
        elif ending in _TORCH or ending == b".npz":
            self._look_at_unknown(path, name, fd, size)

    def _look_inside(self, path: bytes, kind: str, read: formats.ReadAt, size: int) -> None:
        spans = formats.spans(read, size)
        if spans is None:
            why = _npy_problem(self._found.folder, path) if kind == "npy" else "its tensors don't fit the file"
            if why:
                self._looked.problem(f"{_shown(path)} is cut short or damaged: {why}")
            return
        tensors = formats.tensors(read, size)
        if kind == "safetensors" and tensors is not None:
            header_bytes = 8 + int.from_bytes(read(0, 8), "little")
            rest = size - header_bytes - sum(each.length for each in tensors)
            if rest:  # which the reference implementation refuses too
                self._looked.problem(f"{_shown(path)} has {rest:,} bytes that belong to no tensor")
        if tensors is None and kind == "torch":
            self._looked.note(f"{_shown(path)}: where its tensors lie is known, not what they are called")
        file = TensorFile(path, kind, tensors, spans)
        self._by_path[path] = file
        self._found.files.append(file)
        self._looked.files += 1
        self._looked.tensors += len(spans) if tensors is None else len(tensors)

    def _look_at_unknown(self, path: bytes, name: bytes, fd: int, size: int) -> None:
        """What is called as torch's files are, and isn't one of today's: a broken one, an old one, or another thing."""
        if not size:
            if not name.endswith(b".bin") or _WEIGHTS_BIN.fullmatch(name):
                self._looked.problem(f"{_shown(path)} is empty")
        elif _reader(fd)(0, 4) == b"PK\x03\x04":
            try:
                with os.fdopen(os.dup(fd), "rb") as file:
                    zipfile.ZipFile(file).close()
            except (zipfile.BadZipFile, OSError, ValueError) as exc:
                self._looked.problem(f"{_shown(path)} is cut short or damaged: {exc}")
        elif name.endswith(b".distcp") or _WEIGHTS_BIN.fullmatch(name):
            self._looked.note(f"{_shown(path)} was not looked into: it is in no format that is known here")

    # -- together --

    def compare(self) -> None:
        for path, index in self._indexes:
            self._compare_index(path, index)
        for folder, described in sorted(self._states.items()):
            self._compare_state(folder, described)
        ranks = self._found.ranks
        if not ranks:
            return
        expected = {folder_of(rank, ranks) for rank in range(ranks)}
        told: Any = next((each.facts.get("parallel", {}) for each in self._states.values()), {})
        if self._states.keys() != expected or told.get("ranks", ranks) != ranks:
            there = ", ".join(sorted(self._states)) or STATE_FILE
            self._looked.problem(
                f"{told.get('ranks', ranks)} ranks saved the checkpoint, and there is what {ranks} saved: {there}"
            )

    def _compare_index(self, path: bytes, index: Any) -> None:
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(each, str) for each in weight_map.values()):
            self._looked.problem(f"{_shown(path)} names no shards")
            return
        folder = os.path.dirname(path)
        shards = {each: os.path.join(folder, os.fsencode(each)) for each in set(weight_map.values())}
        real = {each: self._inside(os.path.join(self._found.folder, shards[each])) for each in shards}
        lacking = sorted(each for each in shards if not os.path.isfile(real[each]))
        if len(lacking) == len(shards) and any(os.path.dirname(file) == folder for file in self._by_path):
            # Somebody took one of the formats that a model is published in, and the index of the other one too.
            self._looked.note(f"{_shown(path)} is of weights that are not here in this format")
            return
        for each in lacking:
            self._looked.problem(f"{_shown(path)} names {each}, which is not there")
        names: dict[str, set[str]] = {}
        for each in shards:
            file = self._by_path.get(real[each].removeprefix(self._found.folder + b"/"))
            if file is not None and file.tensors is not None:
                names[each] = {tensor.name for tensor in file.tensors}
        for tensor, each in sorted(weight_map.items()):
            if each in names and tensor not in names[each]:
                self._looked.problem(f"{_shown(path)} names {tensor} of {each}, which lacks it")

    def _compare_state(self, folder: str, described: Description) -> None:
        for key, (_, tree) in described.parts.items():
            there: set[str] = set()
            for name in (f"{folder}{key}.safetensors", f"{folder}{key}.more.safetensors"):
                file = self._by_path.get(name.encode())
                there.update(tensor.name for tensor in (file.tensors or ()) if file) if file else None
            for node in tensor_nodes(tree):
                if node["name"] not in there:
                    self._looked.problem(f"{folder}{STATE_FILE} names {node['name']} of {key}, and no file has it")


def _are_lines(data: bytes) -> bool:
    """Whether each line is JSON: so many data sets are, under this name too."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        for line in lines:
            json.loads(line)
    except (ValueError, RecursionError):
        return False
    return len(lines) > 1


def _npy_problem(folder: bytes, path: bytes) -> str:
    """Why a .npy file can't be read; empty for one of records or Python's objects, of which there is no more to say."""
    with _opened(folder, path) as (fd, size), os.fdopen(os.dup(fd), "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            if dtype.hasobject:
                return ""
            needed = file.tell() + dtype.itemsize * int(np.prod(shape, dtype=object))
        except (ValueError, OverflowError, RecursionError) as exc:
            return str(exc).split("\n")[0]
        return f"it has {size:,} bytes, and needs {needed:,}" if size < needed else ""


# -- files ---------------------------------------------------------------------------------------------------


def _walk(folder: bytes) -> Iterator[bytes]:
    """Every file and link below the folder, in order."""
    for where, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in sorted([*names, *links]):
            path = os.path.join(where, name)
            kind = stat.S_IFMT(os.lstat(path).st_mode)
            if kind in (stat.S_IFREG, stat.S_IFLNK):
                yield os.path.relpath(path, folder)


@contextmanager
def _opened(folder: bytes, path: bytes) -> Iterator[tuple[int, int]]:
    """(descriptor, bytes) of a file, or of what a link leads to; the caller has made sure that it is inside."""
    real = os.path.realpath(os.path.join(folder, path))
    fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd, os.fstat(fd).st_size
    finally:
        with suppress(OSError):
            os.close(fd)


def _reader(fd: int) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        found = os.pread(fd, length, offset)
        while len(found) < length:  # one call gives 2 GiB at most
            more = os.pread(fd, length - len(found), offset + len(found))
            if not more:
                break
            found += more
        return found

    return read


def _shown(path: bytes) -> str:
    return path_text(path)
