"""Fixtures for real servers, which are started in servers.py; and the sum of what the crash tests looked at."""

from __future__ import annotations

import compileall
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import outlast
from servers import S3_ENVIRONMENT, LossyProxy, MotoServer


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in what a shell runs in the background. Processes that tests start would ignore it too, as they should.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        # As installing does. Where the environment forbids it to each process, thousands of them would compile anew.
        compileall.compile_dir(Path(outlast.__file__).parent, quiet=1)


@pytest.fixture(scope="session")
def moto_server() -> Iterator[MotoServer]:
    server = MotoServer()
    yield server
    server.stop()


@pytest.fixture
def s3(moto_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a fresh bucket; the AWS variables point at its server."""
    for key, text in S3_ENVIRONMENT.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_server.url)
    bucket = f"bucket-{uuid.uuid4().hex}"
    moto_server.make_bucket(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def lossy_s3(s3: str, moto_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, LossyProxy]]:
    """Like `s3`, through a proxy that can lose replies."""
    proxy = LossyProxy(moto_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield s3, proxy
    proxy.close()


CRASHES: Counter[str] = Counter()
"""of all worker processes"""


def pytest_sessionfinish(session: pytest.Session) -> None:
    crashing = sys.modules.get("crashing")
    if crashing is not None:
        output = getattr(session.config, "workeroutput", None)
        (CRASHES if output is None else output.setdefault("crashes", {})).update(vars(crashing.TOTAL))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    CRASHES.update(node.workeroutput.get("crashes", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CRASHES["cuts"]:
        terminalreporter.write_line(
            f"crashes: {CRASHES['cuts']} cuts, {CRASHES['outcomes']} outcomes, "
            f"{CRASHES['distinct']} different states examined"
        )
