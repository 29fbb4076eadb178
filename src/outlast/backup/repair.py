"""Repair a repository: mend what can be mended, quarantine what is damaged, and say what is lost to whom."""

from __future__ import annotations

import msgspec

from outlast.errors import Corrupt
from outlast.repo import formats
from outlast.repo.check import Checker, CheckReport, Examined
from outlast.repo.content import Content, RecentChunks
from outlast.repo.formats import Tensor
from outlast.repo.references import HurtFile
from outlast.repo.repair import Mended, Origin, quarantine, rebuild_segments, rescue, store_again
from outlast.repo.repository import Repository, chunk_offsets
from outlast.repo.scrub import Data

_ROUNDS = 6
FILES_MAX = 100
TENSORS_MAX = 100
_MODEL_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".distcp", ".gguf", ".npy")


class LostFile(msgspec.Struct):
    """A file that can't be restored whole. Of its tensors at most `TENSORS_MAX` are named."""

    path: str
    snapshots: list[str]
    bytes: int
    bytes_lost: int
    format: str | None = None
    tensors: list[str] | None = None
    """those that are hurt; None where it isn't a model file, or its tensors can't be told"""
    tensors_hurt: int = 0
    tensors_whole: int = 0
    problem: str = ""
    """why its tensors can't be told"""


class RepairReport(msgspec.Struct):
    """What was done. `ok`: nothing is damaged or lost any more. `check`: what the last look found."""

    ok: bool
    check: CheckReport
    chunks_rescued: int = 0
    """out of packs that are damaged, condemned or quarantined"""
    bytes_rescued: int = 0
    chunks_found: int = 0
    """in the other repository or the folder"""
    bytes_found: int = 0
    origin: str = ""
    segments: int = 0
    """index segments written anew"""
    quarantined: list[str] = []
    """packs that were quarantined now"""
    missing: list[str] = []
    """packs that were there no more, and of which the log says so now"""
    ignored: list[str] = []
    """damaged derived objects that were quarantined now"""
    chunks_lost: int = 0
    """of those that are known: what a lost part of a manifest lists is not"""
    bytes_lost: int = 0
    lost: list[LostFile] = []
    """at most `FILES_MAX`"""
    more_lost: int = 0
    refused: str = ""
    """why nothing was repaired at all"""


def repair(repository: Repository, *, data: Data = "all", origin: Origin | None = None) -> RepairReport:
    """Check as `check` does and mend what is damaged, also from `origin`; never edits and never deletes.

    The repository may be one that was only connected to. Where its log is damaged nothing is written.
    Raises `Refused` (read-only), `StoreFull`, `Unavailable`: then nothing is worse than it was, and the next
    repair goes on from there. A second repair finds nothing to do; it only records what it read, as `check` does.
    """
    started = repository.clock.monotonic_seconds()
    checker = Checker(repository, data, for_repair=True)
    found = checker.look()
    report = RepairReport(ok=False, check=found.report, origin=origin.where if origin else "")
    tried: set[bytes] = set()
    for _ in range(_ROUNDS):
        if not found.log_is_whole:
            report.refused = (
                "The log is damaged, and nothing else knows what it said: nothing was written. Copy the objects "
                "of the log that are named above back from a replica; they are small and never change."
            )
            break
        if not _mend(found, origin, tried, report):
            break
        found = checker.look()
    found.report.recorded = checker.record(found)
    checker.date(found)
    report.check, report.ok = found.report, found.report.ok
    report.chunks_lost, report.bytes_lost = len(found.needs.lost), sum(found.needs.lost.values())
    files = sorted(found.needs.files.values(), key=lambda each: each.entry.path)
    report.lost = [_lost_file(found.view, each, found.needs.lost) for each in files[:FILES_MAX]]
    report.more_lost = len(files) - len(report.lost) + found.needs.files_left_out
    found.report.seconds = repository.clock.monotonic_seconds() - started
    return report


def _mend(found: Examined, origin: Origin | None, tried: set[bytes], report: RepairReport) -> bool:
    """Whether anything was written, so that another look is due."""
    rescued = rescue(found)
    report.chunks_rescued += rescued.chunks
    report.bytes_rescued += rescued.bytes
    wanted = {chunk: size for chunk, size in (found.needs.lost | rescued.failed).items() if chunk not in tried}
    fetched = Mended()
    if origin is not None and wanted:
        tried.update(wanted)
        fetched = store_again(found.view, origin.chunks(found.view, wanted, found.needs.places))
        report.chunks_found += fetched.chunks
        report.bytes_found += fetched.bytes
    segments = rebuild_segments(found)
    report.segments += segments
    packs, objects = quarantine(found.view, found.damaged_packs, found.damaged_derived)
    report.quarantined += [name for name in packs if name not in found.missing]
    report.missing += [name for name in packs if name in found.missing]
    report.ignored += objects
    return bool(rescued.chunks or fetched.chunks or segments or packs or objects)


def _lost_file(view: Repository, hurt: HurtFile, lost: dict[bytes, int]) -> LostFile:
    entry = hurt.entry
    view.sums.learn(entry)
    parts = entry.parts
    gaps = [
        (offset, length)
        for offset, (chunk, length) in chunk_offsets(entry)
        if any(bytes.fromhex(part) in lost for part in parts.get(chunk, [chunk]))
    ]
    report = LostFile(entry.path, list(hurt.snapshots), entry.size, sum(length for _, length in gaps))
    read = Content(entry, RecentChunks(view).get).read
    try:
        report.format = formats.detect(read, entry.size)
        tensors = formats.tensors(read, entry.size) if report.format else None
    except Corrupt:
        if report.format or entry.path.endswith(_MODEL_ENDINGS):
            report.problem = "the part that says which tensors are where is lost too"
        return report
    if tensors is not None:
        names = [tensor.name for tensor in tensors if _touches(tensor, gaps)]
        report.tensors, report.tensors_hurt = names[:TENSORS_MAX], len(names)
        report.tensors_whole = len(tensors) - len(names)
    return report


def _touches(tensor: Tensor, gaps: list[tuple[int, int]]) -> bool:
    end = tensor.offset + tensor.reach_bytes
    return any(tensor.offset < offset + length and offset < end for offset, length in gaps)
