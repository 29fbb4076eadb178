"""Fixtures for real servers; what they start is in servers.py."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from servers import S3_ENVIRONMENT, LossyProxy, MotoServer


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
