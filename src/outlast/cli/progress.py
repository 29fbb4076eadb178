"""The progress bar. Loaded only when one is shown: Rich takes longer to load than most commands to run."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from outlast.cli.text import size_text
from outlast.events import Progress


class _RateColumn(ProgressColumn):
    """Bytes a second, in the same binary units as everything else."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{size_text(int(speed))}/s" if speed else "")


class Bar:
    """Phase, bytes, rate and time left, on standard error, gone when the work is done."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._rich = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            DownloadColumn(binary_units=True),
            _RateColumn(),
            TextColumn("{task.fields[files]}", markup=False),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._phase = ""
        self._rich.start()

    def show(self, progress: Progress) -> None:
        if progress.phase != self._phase:
            if self._task is not None:
                self._rich.remove_task(self._task)
            self._task = self._rich.add_task(progress.phase, total=None, files="")
            self._phase = progress.phase
        assert self._task is not None
        files = f"{progress.done_files:,}" if progress.done_files or progress.total_files else ""
        if progress.total_files:
            files += f"/{progress.total_files:,}"
        self._rich.update(
            self._task,
            completed=progress.done_bytes,
            total=progress.total_bytes or None,
            files=f"{files} files" if files else "",
        )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        self._rich.stop()
