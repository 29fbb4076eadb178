"""What Outlast promises about speed, bytes and memory, and whether the measured runs keep it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

Record = dict[str, Any]
"""One measured run, as a line of the results file."""

MEMORY_BYTES_MAX = 600_000_000


@dataclass(frozen=True)
class Bar:
    """One promise. `slower`: subject / against must be at most `limit`; `faster`: against / subject at
    least `limit`; `seconds`: the subject's time at most `limit`; `memory`: its peak, in bytes; `added`:
    bytes added / bytes changed; `size`: bytes kept / bytes of the source; `rate`: bytes of the source for each second
    of a core, at least `limit`."""

    row: str
    subject: str
    kind: Literal["slower", "faster", "seconds", "memory", "added", "size", "rate"]
    limit: float
    against: str = ""

    @property
    def text(self) -> str:
        if self.limit == 1:
            return f"{'no slower' if self.kind == 'slower' else 'faster'} than {self.against}"
        if self.kind == "slower":
            return f"at most {self.limit:g}x the time of {self.against}"
        if self.kind == "faster":
            return f"at least {self.limit:g}x faster than {self.against}"
        if self.kind == "seconds":
            return f"at most {in_unit(self.limit, 'g')}"
        if self.kind == "memory":
            return f"at most {self.limit / 1e6:g} MB at its peak"
        if self.kind == "size":
            return f"at most {self.limit:g}x the bytes"
        if self.kind == "rate":
            return f"at least {self.limit / 1e6:g} MB/s of a core"
        return f"adds at most {self.limit:g}x the bytes that changed"


@dataclass(frozen=True)
class Verdict:
    """What came of a bar: the figure as a reader sees it; `kept` is None when it was not measured."""

    bar: str
    row: str
    subject: str
    figure: str
    kept: bool | None


BARS = (
    Bar("first", "outlast none", "slower", 1.15, "cp + fsync"),
    Bar("first", "outlast auto", "faster", 2.5, "restic"),
    Bar("first", "outlast auto", "slower", 1.0, "borg"),
    Bar("first", "outlast encrypted", "faster", 2.0, "restic"),
    Bar("unchanged", "outlast auto", "seconds", 0.5),
    Bar("onelayer", "outlast auto", "faster", 5.0, "restic"),
    Bar("onelayer", "outlast auto", "added", 1.03),
    Bar("onelayer-steps", "outlast auto", "faster", 5.0, "restic"),
    Bar("onelayer-steps", "outlast auto", "added", 1.03),
    Bar("restore", "outlast auto", "slower", 1.2, "read + write + fsync"),
    Bar("restore", "outlast none", "slower", 1.2, "read + write + fsync"),
    Bar("restore", "outlast auto", "faster", 1.0, "restic"),
    Bar("restore", "outlast auto", "faster", 1.0, "borg"),
    Bar("check", "outlast auto", "slower", 1.2, "plain read (auto)"),
    Bar("check", "outlast none", "slower", 1.2, "plain read (none)"),
    Bar("small-backup", "outlast auto", "slower", 1.0, "restic"),
    Bar("small-restore", "outlast auto", "slower", 1.0, "restic"),
    Bar("grown-commit", "outlast, 10,000 snapshots", "seconds", 1.5),
    Bar("grown-commit", "outlast, 10,000 snapshots", "memory", 400e6),
    Bar("grown-prune", "outlast, 10,000 snapshots", "seconds", 10),
    Bar("grown-plan", "outlast, 10,000 snapshots", "seconds", 0.5),
    Bar("grown-status", "outlast, 10,000 snapshots", "seconds", 0.5),
    Bar("grown-agent", "outlast, 10,000 snapshots", "seconds", 0.5),
    Bar("cold-fp32", "outlast copy --delta", "size", 0.80),
    Bar("cold-bf16", "outlast copy --delta", "size", 0.69),
    Bar("cold-read", "outlast, fp32", "rate", 300e6),
    Bar("cold-read", "outlast, bf16", "rate", 300e6),
    Bar("copy-s3", "outlast copy", "slower", 1.25, "obstore"),
    Bar("help", "outlast auto", "seconds", 0.2),
    Bar("stall", "Run.save, overlap=False", "slower", 1.2, "memcpy"),
    Bar("stall-overlap", "Run.save", "seconds", 0.010),
    Bar("loop", "Run.save", "slower", 0.4, "dcp.async_save"),
    Bar("durable", "Run.save", "slower", 1.1, "write + fsync"),
    Bar("durable", "Run.save", "faster", 1.0, "torch.save + fsync"),
    Bar("durable", "Run.save", "faster", 1.0, "dcp.save"),
    Bar("frozen", "Run.save", "faster", 5.0, "torch.save + fsync"),
    Bar("load-cold", "Run.load", "slower", 1.15, "plain read"),
    Bar("load-cold", "Run.load", "faster", 1.0, "torch.load"),
    Bar("load-cold", "Run.load", "faster", 1.0, "dcp.load"),
    Bar("load-warm", "mapped.open", "slower", 2.0, "safetensors load_file"),
    Bar("step", "Run.step", "seconds", 5e-6),
)


def shown_seconds(seconds: float) -> str:
    return in_unit(seconds, ".2f" if abs(seconds) >= 0.1 else ".1f")


def in_unit(seconds: float, form: str) -> str:
    factor, unit = (1, "s") if abs(seconds) >= 0.1 else (1e3, "ms") if abs(seconds) >= 1e-4 else (1e6, "µs")
    return f"{seconds * factor:{form}} {unit}"


def times(records: Iterable[Record], row: str, contender: str) -> list[float]:
    return [item["wall_seconds"] for item in records if item["row"] == row and item["contender"] == contender]


def judge(records: list[Record]) -> list[Verdict]:
    """Every bar, in the order of the list, and the one about memory at the end."""
    verdicts = [judge_one(bar, records) for bar in BARS]
    peaks = [item["rss_bytes"] for item in records if item["contender"].startswith("outlast")]
    peak = max(peaks, default=0)
    text = f"at most {MEMORY_BYTES_MAX / 1e6:.0f} MB at its peak"
    kept = peak <= MEMORY_BYTES_MAX if peaks else None
    return [*verdicts, Verdict(text, "every row", "outlast", f"{peak / 1e6:.0f} MB" if peaks else "", kept)]


def judge_one(bar: Bar, records: list[Record]) -> Verdict:
    subject = times(records, bar.row, bar.subject)
    against = times(records, bar.row, bar.against)
    figure, kept = "", None
    if bar.kind == "added":
        ratios = [
            item["added_bytes"] / item["changed_bytes"]
            for item in records
            if item["row"] == bar.row and item["contender"] == bar.subject and item.get("changed_bytes")
        ]
        if ratios:
            figure, kept = f"{median(ratios):.3f}x", median(ratios) <= bar.limit
    elif bar.kind in ("size", "rate"):
        mine = [item for item in records if (item["row"], item["contender"]) == (bar.row, bar.subject)]
        if mine and bar.kind == "size":
            share = median(item["repository_bytes"] / item["source_bytes"] for item in mine)
            figure, kept = f"{share:.3f}x", share <= bar.limit
        elif mine:
            rate = median(item["source_bytes"] / item["cpu_seconds"] for item in mine)
            figure, kept = f"{rate / 1e6:.0f} MB/s", rate >= bar.limit
    elif bar.kind == "memory":
        peaks = [item["rss_bytes"] for item in records if (item["row"], item["contender"]) == (bar.row, bar.subject)]
        if peaks:
            figure, kept = f"{max(peaks) / 1e6:.0f} MB", max(peaks) <= bar.limit
    elif bar.kind == "seconds":
        if subject:
            figure, kept = shown_seconds(median(subject)), median(subject) <= bar.limit
    elif subject and against and median(against) > 0:
        slower = median(subject) / median(against)
        ratio = slower if bar.kind == "slower" else 1 / slower
        figure = f"{ratio:.2f}x"
        kept = ratio <= bar.limit if bar.kind == "slower" else ratio >= bar.limit
    return Verdict(bar.text, bar.row, bar.subject, figure, kept)
