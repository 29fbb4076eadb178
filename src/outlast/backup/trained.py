"""Which of the things in a trainer's folder are checkpoints, what each is called, and which step it is of. Pure.

A checkpoint is a child of the folder, with these exceptions:

* Files that are parts of one are one: `x-00001-of-00003.safetensors`, `x.index` with `x.data-00000-of-00001`.
* Where the folder itself is laid out as one model (`config.json` beside `model.safetensors`, `model_index.json`,
  `.metadata`), it is a checkpoint called ".": its files and folders, less those that tell a step or an epoch and so
  are checkpoints of their own, and less logs.
* What is being written under another name, what is hidden, links, logs and what else holds no model are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from outlast.records import Entry

Kind = Literal["file", "dir", "link", "other", "unreadable"]
Relation = Literal["same", "fewer", "other"]


class Seen(msgspec.Struct, frozen=True, gc=False):
    """One thing below the folder that is watched, as the file system tells of it."""

    path: bytes
    kind: Kind
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    reason: str = ""
    """unreadable: why"""

    @property
    def base(self) -> bytes:
        return self.path.rpartition(b"/")[2]


class Found(msgspec.Struct, frozen=True):
    """A checkpoint, whole or not. `sources` are the children of the folder that it is made of."""

    name: bytes
    sources: tuple[bytes, ...]
    seen: tuple[Seen, ...]
    """all that is in it, in the order of a walk; paths are those below the folder that is watched"""

    @property
    def files(self) -> list[Seen]:
        return [each for each in self.seen if each.kind == "file"]

    @property
    def changed_ns(self) -> int:
        """When the newest of its files was last written, by the file system's clock."""
        return max((each.mtime_ns for each in self.files), default=0)

    @property
    def touched_ns(self) -> int:
        """The same, but nobody can set this time back: when it came into this place, at the earliest."""
        return max((each.ctime_ns for each in self.files), default=0)


class Contents(msgspec.Struct, frozen=True):
    """What a folder holds."""

    checkpoints: list[Found]
    """those that were written first come first"""
    others: list[bytes]
    """children that are none, in byte order; what is hidden or being written is not among them"""
    pointers: dict[bytes, Seen]
    """files by which trainers say which checkpoint they finished last"""


POINTERS = {b"latest", b"latest_checkpointed_iteration.txt"}
"""DeepSpeed's and Megatron's"""
DCP_METADATA = b".metadata"
TRAINER_STATE = b"trainer_state.json"

_LINE_BYTES_MAX = 4096
_MODEL = re.compile(
    rb".*\.(?:safetensors|pt|pth|bin|ckpt|distcp|gguf|npy|npz|h5|hdf5|keras|onnx|pkl|pickle|joblib|msgpack|ubj|tflite|pb"
    rb"|nemo|params|pdparams|pdopt|pth\.tar|pt2|mlmodel|ocdbt|weights|data-\d{5}-of-\d{5})",
    re.IGNORECASE | re.DOTALL,
)
_BESIDE_A_MODEL = re.compile(
    rb".*\.(?:json|jsonl|txt|ya?ml|md|py|log|toml|cfg|ini|sh|csv|jinja|lock|err|out)", re.IGNORECASE | re.DOTALL
)
_MARKS = {DCP_METADATA, TRAINER_STATE, b"_CHECKPOINT_METADATA", b"_METADATA", b"manifest.ocdbt"}
"""files that only checkpoints have: of DCP, the Trainer, Orbax"""
_IS_A_MODEL = {DCP_METADATA, b"model_index.json", b"modules.json"}
_IS_A_MODEL_WITH_WEIGHTS = {b"config.json", b"adapter_config.json", b"training_args.bin", TRAINER_STATE}
_WEIGHTS_OF_A_MODEL = re.compile(rb"(?:\w+_)?model\b.*", re.DOTALL)
_BEING_WRITTEN = re.compile(
    rb"tmp[-_.].*|.*\.(?:temp|part|partial|incomplete)|.*\.(?:orbax-checkpoint-)?tmp[-.\w]*",
    re.IGNORECASE | re.DOTALL,
)
_LOGS = re.compile(
    rb"runs|logs?|wandb|mlruns|lightning_logs|tensorboard|tb_logs|events\.out\.tfevents.*|.*\.log", re.DOTALL
)
_PART = re.compile(rb"(.+)-(\d{5})-of-(\d{5})(\.[\w.]+)", re.DOTALL)
_PART_OF_TENSORFLOW = re.compile(rb"(.+)\.(?:index|data-\d{5}-of-\d{5})", re.DOTALL)
_STEP = re.compile(
    rb"(?:^|[^a-z])(?:global[-_]?step|steps?|iter(?:ation)?|checkpoint|ckpt|ba)[-_=.]?(\d{1,15})(?!\d)",
    re.IGNORECASE,
)
_EPOCH = re.compile(rb"(?:^|[^a-z])(?:epoch|ep)[-_=.]?(\d{1,15})(?!\d)", re.IGNORECASE)


def contents(seen: Sequence[Seen], own_name: bytes = b"") -> Contents:
    """Sort what a walk of the folder saw; `own_name` is what the folder itself is called."""
    children: dict[bytes, list[Seen]] = {}
    for each in seen:
        children.setdefault(each.path.partition(b"/")[0], []).append(each)
    folders = {name for name, inside in children.items() if inside[0].kind == "dir"}
    pointers = {
        name: children[name][0]
        for name in POINTERS & children.keys()
        if name not in folders and children[name][0].size <= _LINE_BYTES_MAX
    }
    own = _of_the_folder(children, folders, own_name)
    groups: dict[bytes, list[bytes]] = {b".": own} if own else {}
    others = []
    for name, inside in children.items():
        if name in own or name in pointers or is_passing(name):
            continue
        if inside[0].kind == "unreadable":
            part = name if tags(name) or is_model_file(name) else None
        elif name in folders:
            part = name if _is_checkpoint(name, inside) else None
        else:
            part = _whole_of(name) if inside[0].kind == "file" and _MODEL.fullmatch(_whole_of(name, True)) else None
        if part is None:
            others.append(name)
        else:
            groups.setdefault(part, []).append(name)
    _join_indexes(groups, others)
    found = [
        Found(name, tuple(sorted(sources)), tuple(each for source in sorted(sources) for each in children[source]))
        for name, sources in groups.items()
    ]
    return Contents(sorted(found, key=lambda each: (each.changed_ns, each.name)), sorted(others), pointers)


def tags(name: bytes) -> dict[str, str]:
    """What a name tells of a checkpoint, as tags.

    >>> tags(b"checkpoint-500"), tags(b"epoch=3-step=1200.ckpt")
    ({'step': '500'}, {'step': '1200', 'epoch': '3'})
    >>> tags(b"iter_0000500"), tags(b"best_model.pt")
    ({'step': '500'}, {})
    """
    step, epoch = _STEP.search(name), _EPOCH.search(name)
    told = {"step": str(int(step[1]))} if step else {"step": str(int(name))} if re.fullmatch(rb"\d{1,15}", name) else {}
    return {**told, "epoch": str(int(epoch[1]))} if epoch else told


def is_passing(name: bytes) -> bool:
    """Whether something is hidden, or is being written and will have another name.

    >>> is_passing(b"tmp-checkpoint-500"), is_passing(b"500.orbax-checkpoint-tmp-17"), is_passing(b"template.pt")
    (True, True, False)
    """
    return name.startswith(b".") or is_being_written(name)


def is_being_written(name: bytes) -> bool:
    return _BEING_WRITTEN.fullmatch(name) is not None


def is_model_file(name: bytes) -> bool:
    return _MODEL.fullmatch(name) is not None


def part(name: bytes) -> tuple[bytes, int, int, bytes] | None:
    """(beginning, number, count, end) of a name such as `model-00002-of-00005.safetensors`."""
    fits = _PART.fullmatch(name)
    return (fits[1], int(fits[2]), int(fits[3]), fits[4]) if fits else None


def compare(
    found: Found, entries: Iterable[Entry], readable: Sequence[bytes] = ()
) -> Literal["same", "fewer", "other"]:
    """Whether a checkpoint is what these entries of a manifest tell of, by sizes and times.

    "fewer": some files are gone, and the others are the same: it is being deleted, or was thinned out. What could
    not be read then is the same as long as it is not among the `readable` now. A file that was unstable never is.
    """
    prefix = len(found.sources[0]) + 1 if is_one_folder(found) else 0
    rest = {each.path[prefix:]: each for each in found.seen if each.kind != "dir"}
    is_fewer = False
    for entry in entries:
        if entry.type == "dir":
            continue
        now = rest.pop(entry.raw_path, None)
        if now is None:
            is_fewer = True
        elif entry.unstable or not _alike(entry, now, readable):
            return "other"
    return "other" if rest else "fewer" if is_fewer else "same"


def is_one_folder(found: Found) -> bool:
    """Whether paths in its snapshot are those below that folder, as `backup.create` has it for a single one."""
    return len(found.sources) == 1 and found.seen[0].kind == "dir"


def _alike(entry: Entry, now: Seen, readable: Sequence[bytes]) -> bool:
    if entry.type == "unreadable":
        return now.kind in ("other", "unreadable") or now.path not in readable
    if entry.type in ("file", "hardlink"):
        is_as_long = entry.type == "hardlink" or entry.size == now.size
        return now.kind == "file" and is_as_long and entry.mtime_ns == now.mtime_ns
    return now.kind == ("link" if entry.type == "symlink" else "other")


def _of_the_folder(children: dict[bytes, list[Seen]], folders: set[bytes], own_name: bytes) -> list[bytes]:
    """The children that make the folder itself a checkpoint; none where it is not laid out as one."""
    loose = children.keys() - folders
    is_model = bool(loose & _IS_A_MODEL)
    if loose & _IS_A_MODEL_WITH_WEIGHTS or any(name.endswith(b".index.json") for name in loose):
        is_model |= any(
            _WEIGHTS_OF_A_MODEL.fullmatch(name) and is_model_file(name) and not tags(name) for name in loose
        )
    if not is_model:
        return []
    own = [name for name, inside in children.items() if inside[0].kind in ("file", "dir")]
    if tags(own_name):
        return [name for name in own if not is_being_written(name)]
    return [
        name
        for name in own
        if not (_tells_a_step(name, name in folders) or _LOGS.fullmatch(name))
        and not (is_passing(name) and name != DCP_METADATA)
    ]


def _tells_a_step(name: bytes, is_folder: bool) -> bool:
    return bool(tags(name)) and (is_folder or is_model_file(name))


def _is_checkpoint(name: bytes, inside: list[Seen]) -> bool:
    if _LOGS.fullmatch(name):
        return False
    files = [each.base for each in inside if each.kind == "file"]
    if any(is_model_file(each) or each in _MARKS for each in files):
        return True
    # Whatever model it is, there is more than what is written beside one, such as its configuration.
    return bool(tags(name)) and any(not _BESIDE_A_MODEL.fullmatch(each) for each in files)


def _whole_of(name: bytes, as_file: bool = False) -> bytes:
    """The name of what this file is a part of; `as_file`, with the end of the name that tells the format."""
    parts = _PART.fullmatch(name)
    if parts:
        return parts[1] + parts[4]
    pieces = None if as_file else _PART_OF_TENSORFLOW.fullmatch(name)
    return pieces[1] if pieces else name


def _join_indexes(groups: dict[bytes, list[bytes]], others: list[bytes]) -> None:
    """An index is no model, but belongs to the parts that it is of."""
    for name in list(others):
        whole = _whole_of(name) if name.endswith(b".index") else name.removesuffix(b".index.json")
        if whole != name and whole in groups:
            groups[whole].append(name)
            others.remove(name)
