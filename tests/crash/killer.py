"""Runs `outlast` and kills it with SIGKILL at one moment of its work, chosen by number.

    python killer.py POINT [--count FILE] [--store] -- ARGUMENTS...
    python killer.py serve

A moment is right before each call that changes something in the file system or, with `--store`, in an
object store; halfway through each write of bytes; and right after each call by which others come to see
something. They are numbered from 1. With POINT 0 nobody is killed, and FILE says what moments there were.
Pools of threads do their work at once, in the thread that hands it out, so that each run has the same ones.

`serve` reads jobs as JSON lines and forks for each: a fork has everything imported already, so that it
costs a tenth of a new process. Answers each job with the exit code, -9 for one that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

SMALL = {
    "outlast.backup.staging.BIG_BYTES": 4 << 10,
    "outlast.repo.log.STATE_EVERY": 3,
    "outlast.repo.seal.ARGON2_ITERATIONS": 1,
    "outlast.repo.seal.ARGON2_LANES": 1,
    "outlast.repo.seal.ARGON2_MEMORY_KIB": 64,
    "outlast.repo.write.COMMIT_PACKS_BYTES": 24 << 10,
    "outlast.repo.write.SEGMENT_PACKS": 3,
    "outlast.store.local.DIRECT_BYTES_MIN": 4 << 10,
}
"""So that a little data has several packs, commits on the way, index segments and states, and keys cost nothing."""
PACK_BYTES = 8 << 10
CUTTING = {"block_bytes": 4096, "min_bytes": 512, "avg_bytes": 2048, "max_bytes": 4096}

STUCK_SECONDS = 120

SYNCS = {"fsync", "fdatasync", "sync", "syncfs"}
"""change nothing that outlives a process but not the machine"""
PUBLISHING = {"link", "rename", "replace", "renameat2", "obstore.put"}
WRITING = {"write": 1, "pwrite": 1}
"""-> which argument has the bytes"""
OF_FILES = [
    *("open", "write", "writev", "pwrite", "pwritev", "truncate", "ftruncate", "posix_fallocate", "copy_file_range"),
    *("sendfile", "splice", "fsync", "fdatasync", "sync", "link", "symlink", "rename", "replace", "unlink", "remove"),
    *("rmdir", "mkdir", "mkfifo", "mknod", "utime", "chmod", "fchmod", "chown", "fchown", "lchown", "setxattr"),
    "removexattr",
]
OF_STORES = ["put", "put_async", "delete", "delete_async", "copy", "copy_async", "rename", "rename_async"]
HINTS = {"sync_file_range", "__errno_location"}
CHANGING_EVENTS = {
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename", "os.rmdir"),
    *("os.setxattr", "os.symlink", "os.truncate", "os.utime"),
}
_WRITABLE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killer:
    """Numbers the moments, and ends the process at one of them."""

    def __init__(self, point: int) -> None:
        self._point = point
        self._count = 0
        self._has_changed = True
        self._depth = 0
        self.moments: list[dict[str, Any]] = []
        """`what`, and `fresh`: whether anything has changed since the moment before"""
        self.unseen: list[str] = []
        """changes of the file system that went by outside of every call that is numbered"""

    def moment(self, when: str, call: str, shown: Callable[[], str], half: Callable[[], object] | None = None) -> None:
        self._count += 1
        if self._point == 0:
            fresh = self._has_changed or half is not None
            self.moments.append({"what": f"{when} {call} {shown()}", "fresh": fresh})
            self._has_changed = False
        elif self._count == self._point:
            with self._inside():
                os.write(2, f"killed at {self._count}, {when} {call} {shown()}\n".encode())
                if half is not None:
                    half()
            os.kill(os.getpid(), signal.SIGKILL)

    def numbered(self, call: str, real: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        name = call.removeprefix("os.")

        def wrapped(*given: Any, **named: Any) -> Any:
            if self._depth or not counts(*given, **named):
                with self._inside():
                    return real(*given, **named)
            shown = partial(_shown, given, named)
            self.moment("before", call, shown)
            if name in WRITING and len(given[WRITING[name]]) > 1:
                self.moment("amid", call, shown, partial(_write_half, real, given))
            with self._inside():
                result = real(*given, **named)
            self._has_changed = self._has_changed or name not in SYNCS
            if name in PUBLISHING:
                self.moment("after", call, shown)
            return result

        return wrapped

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def audit(self, event: str, given: tuple[Any, ...]) -> None:
        """Note what changes files and is not numbered: then the list of calls lacks something."""
        if self._depth:
            return
        opened = event == "open" and given[2] and given[2] & _WRITABLE and given[0] != os.devnull
        if opened or event in CHANGING_EVENTS:
            self.unseen.append(f"{event} {_shown(given, {})}")


def _write_half(real: Callable[..., Any], given: tuple[Any, ...]) -> None:
    file, content, *rest = given
    real(file, memoryview(content)[: len(content) // 2], *rest)


def _shown(given: tuple[Any, ...], named: dict[str, Any]) -> str:
    """What a call is about: its descriptor by path, and its paths."""
    words = []
    for number, each in enumerate([*given[:2], *(named[name] for name in named if name.endswith("dir_fd"))]):
        each = each.fileno() if hasattr(each, "fileno") else each
        if isinstance(each, int) and number != 1:
            with suppress(OSError):
                words.append(os.readlink(f"/proc/self/fd/{each}"))
        elif isinstance(each, str | bytes) and len(each) < 200:
            words.append(os.fsdecode(each))
    return " ".join(words)


def arm(killer: Killer, *, store_alone: bool) -> None:
    """From here on every moment counts: those of the file system or, `store_alone`, those of object stores."""
    _work_at_once()
    if store_alone:
        import obstore

        for name in OF_STORES:
            if hasattr(obstore, name):
                setattr(obstore, name, killer.numbered(f"obstore.{name}", getattr(obstore, name), _always))
        return
    sys.addaudithook(killer.audit)
    some: dict[str, Callable[..., bool]] = {"open": _creates, "write": _is_of_ours, "writev": _is_of_ours}
    for name in OF_FILES:
        counts = some.get(name, _always)
        setattr(os, name, killer.numbered(f"os.{name}", getattr(os, name), counts))
    _number_files(killer)
    _number_libraries(killer)


def _number_files(killer: Killer) -> None:
    """What Python's own files write, which goes past the functions of `os`."""
    import builtins
    import io

    real = builtins.open
    writes = killer.numbered("os.write", io.FileIO.write, _always)

    class File(io.FileIO):
        def write(self, content: Any) -> int:
            return int(writes(self, content))

    def open_file(file: Any, mode: str = "r", buffering: int = -1, *given: Any, **named: Any) -> Any:
        if "b" not in mode or not set(mode) & set("wax+") or "opener" in named:
            return real(file, mode, buffering, *given, **named)
        make: Callable[..., Any] = File
        raw = killer.numbered("os.open", make, _is_path)(file, mode)
        return raw if buffering == 0 else io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    builtins.open = open_file


def _number_libraries(killer: Killer) -> None:
    """What is called past Python's own functions."""
    import ctypes

    library = ctypes.CDLL

    class Library:
        def __init__(self, *given: Any, **named: Any) -> None:
            self._real = library(*given, **named)

        def __getattr__(self, name: str) -> Any:
            function = getattr(self._real, name)
            return function if name in HINTS else killer.numbered(name, function, _always)

    ctypes.CDLL = Library  # type: ignore[misc,assignment]


def _always(*given: Any, **named: Any) -> bool:
    return True


def _is_path(file: Any, *given: Any) -> bool:
    return not isinstance(file, int)


def _creates(path: Any, flags: int, *given: Any, **named: Any) -> bool:
    return bool(flags & (os.O_CREAT | os.O_TRUNC))


def _is_of_ours(file: int, *given: Any) -> bool:
    """Not the terminal, nor what stands in for it."""
    return file > 2 and stat.S_ISREG(os.fstat(file).st_mode)


def _work_at_once() -> None:
    def submit(self: ThreadPoolExecutor, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*given, **named))
        except BaseException as exc:
            future.set_exception(exc)
        return future

    ThreadPoolExecutor.submit = submit  # type: ignore[method-assign,assignment]


def make_small() -> None:
    """Everything so small that little data has many objects."""
    from outlast.records import Chunking
    from outlast.repo.repository import Repository

    for path, small in SMALL.items():
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name), path
        setattr(import_module(module), name, small)
    defaults = Repository.create.__func__.__kwdefaults__  # type: ignore[attr-defined]
    defaults |= {"pack_bytes": PACK_BYTES, "chunking": Chunking(**CUTTING)}


def run(arguments: list[str], point: int, count: str | None, *, store_alone: bool) -> int:
    """Run the command line; the exit code, unless it is killed."""
    from outlast.cli.main import main

    make_small()
    killer = Killer(point)
    if point >= 0:
        arm(killer, store_alone=store_alone)
    try:
        return main(arguments)
    finally:
        if count:
            with killer._inside(), open(count, "w") as file:
                json.dump({"moments": killer.moments, "unseen": killer.unseen}, file)


def serve() -> None:
    """Fork for each job; only a process of one thread can be forked."""
    import gc

    import outlast

    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for module in walk_packages(outlast.__path__, "outlast."):
        # What imports torch starts threads, and none of these commands needs it.
        others = ("testing", "__main__", "rescue", "checkpoint", "integrations")
        if not module.name.startswith(tuple(f"outlast.{each}" for each in others)):
            import_module(module.name)
    for name in (
        "outlast.checkpoint.references",
        "obstore.store",
        "obstore.exceptions",
        "pyfastcdc",
        "zstandard",
        "getpass",
        "socket",
        "shlex",
    ):
        import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after the imports: a fork would lose them"
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _serve_one(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _serve_one(job: dict[str, Any]) -> None:
    code = 70
    signal.alarm(STUCK_SECONDS)
    try:
        os.chdir(job["folder"])
        os.environ.update(job["environment"])
        for number, path in enumerate([os.devnull, job["output"], job["output"]]):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(fd, number)
            os.close(fd)
        code = run(job["arguments"], job["point"], job["count"], store_alone=job["store_alone"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> int:
    words = sys.argv[1:]
    if words == ["serve"]:
        serve()
        return 0
    at = words.index("--")
    options, arguments = words[:at], words[at + 1 :]
    count = options[options.index("--count") + 1] if "--count" in options else None
    return run(arguments, int(options[0]), count, store_alone="--store" in options)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    sys.exit(main())
