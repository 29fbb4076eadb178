"""The commands that look into snapshots: show, diff."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from outlast.cli import runs
from outlast.cli.command import CORRUPT, Argument, Call, Command
from outlast.cli.protect import name_option, snapshot_argument, snapshot_document, tags_text
from outlast.cli.text import (
    count_text,
    path_quoted,
    path_shown,
    printable,
    shape_text,
    short_id,
    size_text,
    table,
    time_text,
)
from outlast.errors import NotFound

if TYPE_CHECKING:
    from outlast.backup.inspect import DiffReport, FileChange, FileSide, FileView
    from outlast.records import Entry, Snapshot
    from outlast.repo.formats import Tensor
    from outlast.repo.repository import Repository

_TENSORS_SHOWN = 20
_CHANGES_SHOWN = 100
_KINDS = {
    "Files": ("file", "hardlink", "unreadable", "fifo"),
    "Folders": ("dir",),
    "Links": ("symlink",),
}


@click.command(cls=Command, codes=(10, 12, 20, 21))
@snapshot_argument
@click.argument(
    "path", cls=Argument, metavar="[PATH]", required=False, help="Only this file or folder, with all its tensors."
)
@name_option
def show(call: Call, snapshot: str, path: str | None, name: str | None) -> int:
    """List the files of a snapshot, and the tensors inside them: name, dtype, shape, bytes.

    Of a checkpoint of a training run: what was captured and what not, and where it comes from.
    """
    from outlast.backup import inspect

    repository = call.readable_repository()
    chosen = call.snapshot(repository, snapshot, name)
    if chosen.kind == "checkpoint" and not path:
        from outlast.checkpoint.inventory import rank_files

        ranks = rank_files(repository, chosen)
        if ranks:  # else it was saved by another program, through torch.distributed.checkpoint
            runs.show_checkpoint(call, chosen, ranks)
            return 0
    views = inspect.show(repository, chosen, _below(os.fsencode(path)) if path else lambda entry: True)
    first = next(views, None)
    if path and first is None:
        raise NotFound(
            f"snapshot {short_id(chosen.id)} has no {path!r}.",
            hint=f"`outlast show {short_id(chosen.id)}` lists what it has.",
        )
    damaged: list[str] = []
    found = _noting_damage(chain([first] if first else [], views), damaged)
    document = snapshot_document(chosen)
    document["file_count"] = document.pop("files")
    document["files"] = map(_view_document, found)
    call.result(document, _show_lines(chosen, found, whole=path is not None), always=True)
    return CORRUPT if damaged else 0


def _below(wanted: bytes) -> Any:
    wanted = os.path.normpath(wanted)
    inside = wanted + b"/"

    def fits(entry: Entry) -> bool:
        raw = entry.raw_path
        return raw == wanted or raw.startswith(inside) or wanted == b"."

    return fits


def _noting_damage(views: Iterable[FileView], damaged: list[str]) -> Iterator[FileView]:
    for view in views:
        if view.problem:
            damaged.append(view.entry.path)
        yield view


def _view_document(view: FileView) -> dict[str, Any]:
    entry = view.entry
    document: dict[str, Any] = {
        "path": entry.path,
        "type": entry.type,
        "size": entry.size,
        "mode": f"{entry.mode:04o}",
        "mtime": _moment(entry.mtime_ns),
        "mtime_ns": entry.mtime_ns,
    }
    for name in ("target", "reason", "unstable"):
        if getattr(entry, name):
            document[name] = getattr(entry, name)
    if view.problem:
        document["problem"] = view.problem
    if view.archived:
        document["archived"] = True
    if view.format is not None:
        document["format"] = view.format
        document["tensors"] = [_tensor_document(tensor) for tensor in view.tensors or ()]
    return document


def _moment(time_ns: int) -> str | None:
    """RFC 3339, or None for a time that has no such text."""
    from outlast.records import time_text as rfc3339

    try:
        return rfc3339(time_ns)
    except (ValueError, OverflowError, OSError):
        return None


def _tensor_document(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.length}


def _show_lines(snapshot: Snapshot, views: Iterable[FileView], *, whole: bool) -> Iterator[str]:
    yield f"Snapshot {short_id(snapshot.id)}  {printable(snapshot.name)}  {time_text(snapshot.time)} UTC"
    origin = f" from {printable(', '.join(snapshot.sources))}" if snapshot.sources else ""
    host = f" on {printable(snapshot.host)}" if snapshot.host else ""
    tags = f"; tags {tags_text(snapshot)}" if snapshot.tags else ""
    yield f"{count_text(snapshot.files, 'file')}, {size_text(snapshot.bytes)}{origin}{host}{tags}"
    yield ""
    for view in views:
        yield _view_line(view)
        if view.tensors:
            yield from _tensor_lines(view, snapshot, None if whole else _TENSORS_SHOWN)


def _view_line(view: FileView) -> str:
    entry = view.entry
    size = size_text(entry.size) if entry.type == "file" else entry.type
    line = f"{size:>10}  {path_shown(entry.path)}"
    if entry.type == "dir":
        line += "" if entry.path == "." else "/"
    elif entry.type == "symlink":
        line += f" -> {path_shown(entry.target)}"
    elif entry.type == "hardlink":
        line += f" = {path_shown(entry.target)}"
    elif entry.type == "unreadable":
        line += f"  ({printable(entry.reason)})"
    if view.format is not None:
        line += f"  ({view.format}, {count_text(len(view.tensors or ()), 'tensor')})"
    if entry.unstable:
        line += "  (unstable: it changed while it was read)"
    if view.problem:
        line += f"  (damaged: {printable(view.problem)})"
    if view.archived:
        line += "  (archived, so that it isn't known which tensors are in it)"
    return line


def _tensor_lines(view: FileView, snapshot: Snapshot, limit: int | None) -> Iterator[str]:
    tensors = view.tensors or []
    shown = tensors[:limit]
    rows = [(printable(each.name), each.dtype, shape_text(each.shape), size_text(each.length)) for each in shown]
    for line in table(("", "", "", "bytes"), rows, right="bytes"):
        if line.strip() != "bytes":
            yield f"{'':14}{line}"
    if len(shown) < len(tensors):
        yield (
            f"{'':14}… and {len(tensors) - len(shown):,} more: "
            f"`outlast show {short_id(snapshot.id)} {path_quoted(view.entry.path)}` lists all"
        )


@click.command(cls=Command, codes=(10, 12, 20, 21))
@click.argument("before", cls=Argument, metavar="BEFORE", help="The earlier snapshot, RUN@STEP or RUN@loss:min.")
@click.argument("after", cls=Argument, metavar="AFTER", help="The later one, `latest`, RUN, RUN@STEP or RUN@loss:min.")
@name_option
def diff(call: Call, before: str, after: str, name: str | None) -> int:
    """Compare two snapshots: files and tensors added, removed, changed, and by how many bytes.

    Of two checkpoints of training runs: each tensor that changed, by how much, and every other value.
    """
    import msgspec

    from outlast.backup import inspect

    repository = call.readable_repository()
    old, new = (call.snapshot(repository, each, name) for each in (before, after))
    if all(each.kind == "checkpoint" and _is_of_run(repository, each) for each in (old, new)):
        runs.diff_checkpoints(call, repository, old, new)
        return 0
    report = inspect.diff(repository, old, new)
    call.result(msgspec.to_builtins(report), _diff_lines(report), always=True)
    return CORRUPT if report.problems else 0


def _is_of_run(repository: Repository, snapshot: Snapshot) -> bool:
    from outlast.checkpoint.state_file import ranks_of

    return ranks_of({entry.path: entry for entry in repository.entries(snapshot)}) > 0


def _diff_lines(report: DiffReport) -> Iterator[str]:
    files, tensors = report.files, report.tensors
    yield f"From snapshot {short_id(report.before)} to {short_id(report.after)}:"
    for title, types in _KINDS.items():
        added = [each for each in files.added if each.type in types]
        removed = [each for each in files.removed if each.type in types]
        changed = [each for each in files.changed if each.type in types]
        how_much = (
            f" ({size_text(report.bytes_added)} added, {size_text(report.bytes_removed)} removed, "
            f"{size_text(report.bytes_changed)} changed)"
        )
        if title == "Files" or added or removed or changed:
            yield from _changes(
                title,
                [("+", *_side(each)) for each in added],
                [("-", *_side(each)) for each in removed],
                [_change_row(each) for each in changed],
                how_much if title == "Files" else "",
            )
    groups: list[Sequence[Any]] = [tensors.added, tensors.removed, tensors.changed]
    if any(groups):
        many = len({each.path for group in groups for each in group}) > 1

        def name(each: Any) -> str:
            return (f"{path_shown(each.path)}: " if many else "") + printable(each.name)

        yield from _changes(
            "Tensors",
            [("+", name(each), size_text(each.bytes), _kind(each)) for each in tensors.added],
            [("-", name(each), size_text(each.bytes), _kind(each)) for each in tensors.removed],
            [
                (
                    "~",
                    name(each),
                    size_text(each.bytes_changed),
                    f"of {size_text(each.bytes)}  {_kind(each)}",
                )
                for each in tensors.changed
            ],
            f" ({size_text(sum(each.bytes_changed for each in tensors.changed))} changed)",
        )
    for problem in report.problems:
        yield f"Damaged, so not compared inside: {printable(problem)}"


def _change_row(each: FileChange) -> tuple[str, str, str, str]:
    content = "content" in each.what
    return (
        "~",
        path_shown(each.path),
        size_text(each.bytes_changed) if content else "",
        f"of {size_text(each.bytes_after)}" if each.what == ["content"] else ", ".join(each.what),
    )


def _side(file: FileSide) -> tuple[str, str, str]:
    return path_shown(file.path), size_text(file.bytes) if file.type == "file" else file.type, ""


def _kind(tensor: Any) -> str:
    now = f"{tensor.dtype} {shape_text(tensor.shape)}"
    was = getattr(tensor, "shape_before", None)
    return now if was is None else f"{now}, was {tensor.dtype_before} {shape_text(was)}"


def _changes(
    title: str, added: Sequence[Any], removed: Sequence[Any], changed: Sequence[Any], how_much: str
) -> Iterator[str]:
    """A summary line, then the rows; the largest part of a long list is left to --json."""
    yield f"{title}: {len(added):,} added, {len(removed):,} removed, {len(changed):,} changed{how_much}"
    rows = [*added, *removed, *changed]
    for line in table(("", "", "bytes", ""), rows[:_CHANGES_SHOWN], right="bytes"):
        if line.strip() != "bytes":
            yield f"  {line}"
    if len(rows) > _CHANGES_SHOWN:
        yield f"  … and {len(rows) - _CHANGES_SHOWN:,} more; --json has them all"
