"""What every command shares: the global options, the open repository, and how each kind of end is told."""

from __future__ import annotations

import errno
import inspect
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from outlast.cli.output import Failure, JsonPrinter, OutputClosed, Printer, TextPrinter
from outlast.cli.passphrase import Secret, is_given, known_secret
from outlast.clock import SYSTEM_CLOCK
from outlast.errors import Cancelled, Corrupt, InvalidInput, OutlastError, StoreFull, Unavailable, WrongKey

if TYPE_CHECKING:
    from outlast.records import Snapshot
    from outlast.repo.naming import Snapshots
    from outlast.repo.repository import Repository
    from outlast.store.base import ObjectStore

FAILED = 1
PARTLY_DONE = 3
CORRUPT = 20
TERMINATED = 128 + signal.SIGTERM
CLOSED = 128 + signal.SIGPIPE

_MAY_LACK = "newer snapshots than those listed may exist that can't be read"

CODES = {
    0: "done",
    1: "failed",
    2: "wrong usage",
    3: "partly done: what was left out is named",
    10: "no repository",
    11: "busy",
    12: "wrong key",
    20: "corrupt",
    21: "refused",
    130: "cancelled",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the work the same clean way as Ctrl-C does."""


class Options(NamedTuple):
    """The global options, as given before or after the command."""

    repo: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    json: bool = False
    json_lines: bool = False
    quiet: bool = False
    debug: bool = False

    def over(self, outer: Options) -> Options:
        """These options, and those of `outer` where these say nothing."""
        return Options._make(inner or other for inner, other in zip(self, outer, strict=True))


SHARED = [
    click.Option(
        ["--repo", "-r"], metavar="URL", help="The repository: a path, s3://, gs://, az:// (or OUTLAST_REPO)."
    ),
    click.Option(
        ["--passphrase-file"], metavar="FILE", help="A file that holds the passphrase (or OUTLAST_PASSPHRASE)."
    ),
    click.Option(["--passphrase-command"], metavar="COMMAND", help="A command that prints the passphrase."),
    click.Option(["--json"], is_flag=True, help="Print one JSON document."),
    click.Option(
        ["--json-lines"], is_flag=True, help="Print progress and events as JSON lines; the last is the result."
    ),
    click.Option(["--quiet", "-q"], is_flag=True, help="No progress and no summary."),
    click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
]
"""The global options as the command line knows them; each is a field of `Options`."""


class Call:
    """One run of one command: its options, its printer, and the repository it works on."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.printer: Printer = make_printer(options)
        self.warnings: list[str] = []
        """what makes the result less than the truth; it is in JSON objects too"""
        self.damaged = ""
        """the repository whose log is damaged, so that what is latest can't be told"""

    def store(self) -> ObjectStore:
        """The store of `--repo`. Raises `InvalidInput` when none is named."""
        from outlast.store.layers import open_store

        url = self.options.repo or os.environ.get("OUTLAST_REPO")
        if not url:
            raise InvalidInput(
                "no repository was named; nothing was touched.",
                hint="Give --repo URL, or set OUTLAST_REPO; of a tier give its url. `outlast init` makes a new one.",
            )
        if url.lower().startswith("memory:"):
            raise InvalidInput(
                "memory:// lives only inside one Python process; nothing was touched.",
                hint="Give a path or a bucket.",
            )
        return open_store(url, SYSTEM_CLOCK)

    def secret(self) -> Secret | None:
        """How to open a repository that turns out to be encrypted; asks at most once."""
        secret = known_secret(self.options.passphrase_file, self.options.passphrase_command)
        return cache(secret) if secret else None

    def repository(self) -> Repository:
        """The open repository, which reports to the printer."""
        from outlast.repo.repository import Repository

        return self._expected(Repository.open(self.store(), secret=self.secret(), sink=self.printer))

    def readable_repository(self) -> Repository:
        """The repository for reading only: where its log is damaged, with what is still there.

        That there is damage is told on standard error and kept in `warnings`.
        """
        from outlast.events import ListSink
        from outlast.repo.repository import Repository

        store, secret = self.store(), self.secret()
        try:
            return self._expected(Repository.open(store, secret=secret, sink=self.printer))
        except Corrupt:
            told = ListSink()
            repository = self._expected(Repository.open_damaged(store, secret=secret, sink=told))
        repository.sink = self.printer
        for event in told.events:
            self.printer.event(event)
        damage = [event.reason for event in told.events if event.kind == "log.damaged"]
        self.damaged = store.url
        self.warnings = [*damage, f"the log of {store.url} is damaged: {_MAY_LACK}."]
        self.printer.warn(self.warnings[-1])
        return repository

    def readable_repositories(self, also: Sequence[str]) -> list[Repository]:
        """The repository, and those of `also` behind it. Those that can't be opened are told and left out.

        Raises what the first one raises, where none can be opened.
        """
        found: list[Repository] = []
        failures: list[OutlastError] = []
        for url in (self.options.repo, *also):
            place = Call(self.options._replace(repo=url))
            place.printer = self.printer
            try:
                found.append(place.readable_repository())
            except InvalidInput:
                raise
            except OutlastError as exc:
                failures.append(exc)
                continue
            self.warnings += place.warnings
            self.damaged = self.damaged or place.damaged
        if not found:
            raise failures[0]
        for failure in failures:
            self.warnings.append(f"{failure.message} It is left out: what is nowhere else is missing.")
            self.printer.warn(self.warnings[-1])
        return found

    def snapshot(self, repository: Snapshots, reference: str, name: str | None = None) -> Snapshot:
        """The snapshot that the user named: the start of an id, `latest`, RUN, RUN@STEP or RUN@METRIC:min|max.

        Raises `Corrupt` for the latest where newer ones may be lost.
        """
        from outlast.checkpoint.references import find, is_relative

        is_latest = reference.strip().lower() == "latest"
        found = None if is_latest else find(repository, reference, name)
        if self.damaged and (found is None or is_relative(reference, found)):
            raise Corrupt(
                f"the log of {self.damaged} is damaged: {_MAY_LACK}, so `{reference}` can't be told. "
                "Nothing was changed.",
                hint="`outlast snapshots` lists those that can be read; name one of them by its id.",
            )
        return found or repository.find_snapshot(reference, name)

    def result(self, document: dict[str, Any], lines: Iterable[str], *, always: bool = False) -> None:
        """Print the result, in JSON with the warnings if there are any."""
        warned = {**document, "warnings": self.warnings} if self.warnings else document
        self.printer.result(warned, lines, always=always)

    def connected(self) -> Repository:
        """The repository with its log unread, however damaged that is."""
        from outlast.repo.repository import Repository

        store, secret = self.store(), self.secret()
        if self._is_secret_given():
            with suppress(WrongKey):  # it is encrypted, as it should be, and is opened just below
                self._expected(Repository.connect(store))
        return Repository.connect(store, secret=secret, sink=self.printer)

    def _expected(self, repository: Repository) -> Repository:
        from outlast import expect_encrypted

        if self._is_secret_given():
            expect_encrypted(repository)
        return repository

    def _is_secret_given(self) -> bool:
        """Whether the user named a passphrase; that a terminal could be asked for one doesn't count."""
        return is_given(self.options.passphrase_file, self.options.passphrase_command)


def make_printer(options: Options) -> Printer:
    if options.json or options.json_lines:
        return JsonPrinter(lines=options.json_lines)
    return TextPrinter(quiet=options.quiet)


class _Sharing(click.Command):
    """What takes the global options besides its own, and leaves them as `Options` in the context."""

    def __init__(self, *names: Any, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.params += SHARED

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as exc:
            exc.ctx = exc.ctx or ctx
            raise
        _refuse_empty(ctx)
        options = Options(**{name: ctx.params.pop(name) for name in Options._fields})
        ctx.obj = options.over(ctx.obj or Options())
        return rest


class Command(_Sharing):
    """A function `run(call, ...)` as a command.

    `codes` are its exit codes beyond 0, 1, 2 and 130; `when_stopped` says what is safe when the user
    stops it.
    """

    def __init__(
        self, *names: Any, codes: tuple[int, ...] = (), when_stopped: str = "Nothing was changed.", **settings: Any
    ) -> None:
        super().__init__(*names, **settings)
        told = "; ".join(f"{code} {CODES[code]}" for code in sorted({0, 1, 2, 130, *codes}))
        self.help = f"{inspect.cleandoc(self.help or '')}\n\nExit codes: {told}."
        self.when_stopped = when_stopped

    def invoke(self, ctx: click.Context) -> int:
        call = Call(ctx.obj)
        assert self.callback
        return end(call.printer, call.options.debug, self.when_stopped, partial(self.callback, call, **ctx.params))


class Group(_Sharing, click.Group):
    """Commands that take the global options also before their name. Without a name it shows the help."""

    def __init__(self, *names: Any, **settings: Any) -> None:
        usage = "COMMAND [ARGS]..."
        super().__init__(*names, invoke_without_command=True, subcommand_metavar=usage, **settings)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as they were added; Click sorts them

    def invoke(self, ctx: click.Context) -> Any:
        code = super().invoke(ctx)
        if ctx.invoked_subcommand is not None:
            return code
        if ctx.obj.json or ctx.obj.json_lines:
            raise InvalidInput("no command was given.", hint=f"`{ctx.command_path} --help` lists them.")
        click.echo(ctx.get_help())
        return InvalidInput.exit_code


class Argument(click.Argument):
    """An argument that the help explains; Click itself can only since 8.5."""

    def __init__(self, names: list[str], help: str, **settings: Any) -> None:
        super().__init__(names, **settings)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.human_readable_name, self.help or ""


def _refuse_empty(context: click.Context) -> None:
    """Raise `InvalidInput` for an empty word: it is mostly a variable of a script that was not set."""
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value == "" or (isinstance(value, tuple) and "" in value):
            label = parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.name).upper()
            raise InvalidInput(f"{label} is empty; nothing was done.", hint="Give it a value, or leave it out.")


def end(printer: Printer, debug: bool, when_stopped: str, run: Callable[[], int | None]) -> int:
    """Run a command to its exit code; whatever it raises is told in a sentence."""
    try:
        try:
            return run() or 0
        finally:
            printer.close()
    except OutputClosed:
        return CLOSED
    except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001  the outermost place: everything is told
        return tell(printer, debug, exc, when_stopped)


def tell(printer: Printer, debug: bool, exc: BaseException, when_stopped: str = "") -> int:
    """Print an error and return its exit code."""
    failure = explain(exc, when_stopped)
    try:
        if debug:
            printer.trace(exc)
        printer.failure(failure)
    except (OutputClosed, OutlastError):
        return failure.exit_code  # nobody listens; the exit code still says it
    return failure.exit_code


def explain(exc: BaseException, when_stopped: str = "") -> Failure:
    """What to say about an exception, and the exit code."""
    if isinstance(exc, OutlastError):
        return Failure(exc.kind, exc.message, exc.hint, exc.exit_code)
    if isinstance(exc, KeyboardInterrupt):
        terminated = isinstance(exc, Terminated)
        how = "ended by SIGTERM." if terminated else "cancelled."
        code = TERMINATED if terminated else Cancelled.exit_code
        return Failure(Cancelled.kind, f"{how} {when_stopped}".rstrip(), "", code)
    if isinstance(exc, click.UsageError):
        path = exc.ctx.command_path if exc.ctx else "outlast"
        hint = f"`{path} --help` shows what it takes."
        return Failure(InvalidInput.kind, _sentence(exc.format_message()), hint, InvalidInput.exit_code)
    if isinstance(exc, OSError) and exc.errno is not None:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        where = f" ({os.fsdecode(exc.filename)})" if isinstance(exc.filename, str | bytes) else ""
        return Failure(
            (StoreFull if full else Unavailable).kind,
            f"the operating system refused: {exc.strerror}{where}. Everything committed before is whole.",
            "Make room, then run the same command again." if full else "",
            FAILED,
        )
    if isinstance(exc, MemoryError):
        return Failure("failed", "there is not enough memory. Everything committed before is whole.", "", FAILED)
    return Failure(
        "bug",
        f"this is a bug in outlast: {type(exc).__name__}: {exc}. Everything committed before is whole.",
        "Run the same command with --debug, and report what it prints.",
        FAILED,
    )


def _sentence(text: str) -> str:
    """A usage error of the option parser in our form."""
    text = " ".join(text.split())
    return text[:1].lower() + text[1:] + ("" if text.endswith((".", "?", ")")) else ".")


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of SIGTERM and SIGINT: ends the work by an exception, and lets nothing disturb that end."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
