"""The commands that find out what is wrong with the ground that a repository stands on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from outlast.cli.command import FAILED, Argument, Call, Command, Group
from outlast.cli.text import count_text, duration_text, printable

if TYPE_CHECKING:
    from outlast.store.base import ObjectStore
    from outlast.testing.conformance import CheckResult


@click.group(cls=Group)
def doctor() -> None:
    """Find out what is wrong with the ground that a repository stands on."""


@doctor.command(cls=Command, codes=(21,), when_stopped="What the checks wrote was removed.")
@click.argument("url", cls=Argument, metavar="URL", help="A path, s3://, gs:// or az://, as for --repo.")
def store(call: Call, url: str) -> int:
    """Check that a store keeps the promises a repository needs.

    It writes about 40 MiB below a name of its own, touches nothing else, and removes what it wrote.
    """
    import msgspec

    from outlast.clock import SYSTEM_CLOCK
    from outlast.store.layers import open_store
    from outlast.testing.conformance import check_store

    place = open_store(url, SYSTEM_CLOCK)
    with _leaving_no_folder(place):
        results = list(check_store(place))
    ok = all(result.passed for result in results)
    document = {"url": place.url, "ok": ok, "checks": msgspec.to_builtins(results)}
    call.printer.result(document, _lines(place.url, results), always=True)
    return 0 if ok else FAILED


@contextmanager
def _leaving_no_folder(place: ObjectStore) -> Iterator[None]:
    """Remove the folders that the checks made to have somewhere to write, and only while they are empty."""
    from outlast.store.layers import own_folder

    made: list[bytes] = []
    root = own_folder(place)
    if root is not None:
        folder = os.path.join(root, b"tmp")
        while not os.path.lexists(folder):
            made.append(folder)
            folder = os.path.dirname(folder)
    try:
        yield
    finally:
        for each in made:
            with suppress(OSError):
                os.rmdir(each)


def _lines(url: str, results: list[CheckResult]) -> Iterator[str]:
    for result in results:
        mark = "ok    " if result.passed else "FAILED"
        detail = f"  ({printable(result.detail)})" if result.detail else ""
        yield f"{mark}  {duration_text(result.seconds):>8}  {printable(result.name)}{detail}"
    failed = sum(not result.passed for result in results)
    promises = count_text(len(results), "promise")
    if failed:
        yield f"{printable(url)} broke {failed} of {promises}: don't keep a repository there."
    elif url.startswith("memory:"):
        yield f"{printable(url)} kept all {promises}, but lives in one process only: what is put there ends with it."
    else:
        yield f"{printable(url)} kept all {promises}: a repository is safe there."
