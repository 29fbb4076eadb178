"""Whether a checkpoint is whole, as far as its files tell. Pure: they are read through a function.

Told by what trainers write last, by the parts that files name, and by the ends of the files themselves. What has
none of these is whole as soon as it is quiet, which the caller waits for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from struct import Struct

import msgspec

from outlast.backup import trained
from outlast.backup.trained import DCP_METADATA, TRAINER_STATE, Found, Seen
from outlast.repo import dcp_folder, formats, torchfile
from outlast.repo.layout import Malformed, Window

ReadFile = Callable[[bytes, int, int], bytes]
"""read(path, offset, length) -> those bytes of a file below the folder; fewer only at its end"""

_INDEX_BYTES_MAX = 64 << 20
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_HDF5_HEAD_BYTES = 96
_ADDRESS = Struct("<Q")
_OF_DEEPSPEED = re.compile(rb"(?:bf16_|fp16_)?(?:zero_pp_rank_\d+_)?mp_rank_\d+(?:_\d+)?_(?:model|optim)_states\.pt")
_OF_MEGATRON = re.compile(rb"iter_(\d{7,})")
_PARSED = (b".safetensors", b".gguf")


class _Index(msgspec.Struct):
    """`model.safetensors.index.json`: which file holds which tensor."""

    weight_map: dict[str, str]


def flaw(found: Found, pointers: dict[bytes, Seen], read: ReadFile) -> str:
    """Why a checkpoint is not whole, in words that follow its name; "" when nothing speaks against it.

    `read` may raise `OSError`, which passes through.
    """
    for each in found.seen:
        if each.kind == "unreadable":
            return f"{_text(each.path)} can't be looked at: {each.reason}"
        if each.kind == "file" and trained.is_being_written(each.base) and b"/." not in each.path:
            return f"{_text(each.path)} is still being written"
    return next(_flaws(found, pointers, read), "")


def _flaws(found: Found, pointers: dict[bytes, Seen], read: ReadFile) -> Iterator[str]:
    folders: dict[bytes, dict[bytes, Seen]] = {}
    for each in found.files:
        folder, _, base = each.path.rpartition(b"/")
        folders.setdefault(folder, {})[base] = each
    yield from _unsaid(found, pointers, read)
    for folder, files in folders.items():
        yield from _lacks_trainer_state(folder, files)
        yield from _lacks_parts(files)
        yield from _lacks_indexed(files, read)
        yield from _lacks_shards(files, read)
    for each in found.files:
        if trained.is_model_file(each.base):
            yield from _lacks_end(each, read)


def _unsaid(found: Found, pointers: dict[bytes, Seen], read: ReadFile) -> Iterator[str]:
    """DeepSpeed and Megatron write the name of a checkpoint into a file once they are through with it."""
    megatron = _OF_MEGATRON.fullmatch(found.name)
    if megatron:
        pointer, wanted = pointers.get(b"latest_checkpointed_iteration.txt"), megatron[1].lstrip(b"0") or b"0"
        if pointer is None:
            yield "latest_checkpointed_iteration.txt, which the trainer writes last, isn't there yet"
    elif any(_OF_DEEPSPEED.fullmatch(each.base) for each in found.files):
        pointer, wanted = pointers.get(b"latest"), found.name
    else:
        return
    # One that was finished before the last is not named any more, but the file was written after it.
    if pointer is None or pointer.mtime_ns >= found.changed_ns:
        return
    if read(pointer.path, 0, pointer.size).strip() != wanted:
        yield f"{_text(pointer.path)} doesn't name it yet"


def _lacks_trainer_state(folder: bytes, files: dict[bytes, Seen]) -> Iterator[str]:
    """The Trainer of Hugging Face writes its state last. A model that it exports has no such state, nor a step."""
    is_of_trainer = b"training_args.bin" in files or {b"optimizer.pt", b"scheduler.pt"} <= files.keys()
    if is_of_trainer and re.fullmatch(rb"(?:.*/)?checkpoint-\d+", folder) and TRAINER_STATE not in files:
        yield "trainer_state.json, which the Trainer writes last, isn't there yet"


def _lacks_parts(files: dict[bytes, Seen]) -> Iterator[str]:
    sets: dict[tuple[bytes, bytes, int], set[int]] = {}
    for name in files:
        if part := trained.part(name):
            beginning, number, count, end = part
            sets.setdefault((beginning, end, count), set()).add(number)
    for (beginning, end, count), numbers in sets.items():
        lacking = count - len(numbers)
        if lacking > 0:
            yield f"{lacking:,} of the {count:,} parts of {_text(beginning + end)} are not there yet"
    for name in files:
        whole, data, _ = name.partition(b".data-00000-of-")
        if data and whole + b".index" not in files:
            yield f"{_text(whole)}.index, which is written last, isn't there yet"


def _lacks_indexed(files: dict[bytes, Seen], read: ReadFile) -> Iterator[str]:
    for name, each in files.items():
        if not name.endswith(b".index.json") or each.size > _INDEX_BYTES_MAX:
            continue
        try:
            named = msgspec.json.decode(read(each.path, 0, each.size), type=_Index).weight_map.values()
        except msgspec.ValidationError:
            continue  # another kind of index
        except (msgspec.DecodeError, UnicodeDecodeError):
            yield f"{_text(each.path)} ends early"
            continue
        lacking = sorted(part for part in set(named) if "/" not in part and part.encode() not in files)
        if lacking:
            yield f"{lacking[0]}, which {_text(each.path)} names, isn't there yet"


def _lacks_shards(files: dict[bytes, Seen], read: ReadFile) -> Iterator[str]:
    """torch.distributed.checkpoint writes `.metadata` last, which names every piece of every file."""
    if not any(name.endswith(b".distcp") for name in files):
        return
    metadata = files.get(DCP_METADATA)
    if metadata is None:
        yield ".metadata, which is written last, isn't there yet"
        return
    data = read(metadata.path, 0, min(metadata.size, dcp_folder.METADATA_BYTES_MAX))
    if not data.endswith(b".") and metadata.size <= dcp_folder.METADATA_BYTES_MAX:
        yield f"{_text(metadata.path)} ends early"  # a pickle ends with its STOP
        return
    try:
        items = dcp_folder.read_items(data)
    except Malformed:
        return  # it has something that is not understood here
    for item in items.values():
        for shard in item.shards:
            file = files.get(shard.file.encode())
            if file is None or file.size < shard.offset + shard.length:
                yield f"{shard.file}, which .metadata names, {'is too short' if file else 'is not there yet'}"
                return


def _lacks_end(file: Seen, read: ReadFile) -> Iterator[str]:
    """What the format of a file says of where it ends."""
    name = _text(file.path)
    if file.size == 0:
        yield f"{name} is empty"
        return
    window = Window(lambda offset, length: read(file.path, offset, length), file.size)
    head = window.get(0, min(file.size, _HDF5_HEAD_BYTES))
    if head.startswith(torchfile.MAGIC):
        try:
            torchfile.directory_place(window, file.size, torchfile.TAIL_BYTES, torchfile.Room())
        except Malformed:
            yield f"{name} is cut short: it doesn't end as a zip archive does"
    elif head.startswith(_HDF5_MAGIC):
        if not _hdf5_is_closed(head, file.size):
            yield f"{name} is cut short or still open: it is not as long as its superblock says"
    elif file.base.lower().endswith(_PARSED):
        spans = formats.spans(lambda offset, length: read(file.path, offset, length), file.size)
        if spans is None:
            yield f"{name} is cut short: its tensors don't lie inside it"


def _hdf5_is_closed(head: bytes, size: int) -> bool:
    """Whether the file ends where its superblock says, as a closed one does (HDF5 File Format Specification, II.A)."""
    if len(head) < _HDF5_HEAD_BYTES:
        return False
    version = head[8]
    if version > 3:
        return True  # a version of the future
    offset_bytes, at = (head[13], 28 if version else 24) if version < 2 else (head[9], 12)
    if offset_bytes != 8:
        return True
    base = _ADDRESS.unpack_from(head, at)[0]
    end = _ADDRESS.unpack_from(head, at + 16)[0]
    is_open = version == 3 and head[11] & 1
    return not is_open and size in (end, base + end)


def _text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
