"""Real servers on loopback for tests, and a proxy that loses replies."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress

import pytest

from outlast.clock import SYSTEM_CLOCK

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key-id",
    "AWS_SECRET_ACCESS_KEY": "test-secret-never-shown",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


def skip_or_fail(reason: str) -> None:
    """A server that is missing is a skip for a developer, and a failure in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (in CI nothing may be skipped)")
    pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# moto looks for the object and stores it in two steps, S3 in one: so one request at a time.
_SERVE = """
import sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

application, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

def one_at_a_time(environ, start_response):
    with turn:
        return list(application(environ, start_response))

run_simple("127.0.0.1", int(sys.argv[1]), one_at_a_time, threaded=True)
"""


class MotoServer:
    """An S3 server process of its own."""

    def __init__(self, port: int = 0) -> None:
        if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
            skip_or_fail("moto_server is not installed; make setup-servers")
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait()

    def _wait(self) -> None:
        deadline = SYSTEM_CLOCK.monotonic_seconds() + 60
        while SYSTEM_CLOCK.monotonic_seconds() < deadline:
            if self._process.poll() is not None:
                pytest.fail(f"The moto server ended at once with code {self._process.returncode}.")
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            SYSTEM_CLOCK.sleep(0.05)
        self.stop()
        pytest.fail("The moto server did not start within 60 seconds.")

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=30):
            pass

    def kill(self) -> None:
        """What it holds is lost: it is in its memory."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class LossyProxy:
    """A TCP proxy that lets a request through, and then drops the reply and the connection.

    `lose_replies(method, count)`: the next `count` requests with that HTTP method (any, when empty)
    reach the server and are applied; their callers see a broken connection.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._lock = threading.Lock()
        self._method = b""
        self._count = 0
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_replies(self, method: str, count: int) -> None:
        with self._lock:
            self._method, self._count = f"{method} ".lstrip().encode(), count

    def close(self) -> None:
        # shutdown wakes the thread that waits in accept; close alone would leave it there
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._target_port))
        doomed = threading.Event()
        back = threading.Thread(target=self._pump_back, args=(server, client, doomed), daemon=True)
        back.start()
        with suppress(OSError):
            while block := client.recv(1 << 16):
                # Requests are not pipelined, so a request line starts a block.
                if self._claims(block):
                    doomed.set()
                server.sendall(block)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)
        back.join(30)
        client.close()
        server.close()

    def _claims(self, block: bytes) -> bool:
        with self._lock:
            if self._count and block.startswith(self._method):
                self._count -= 1
                self.lost += 1
                return True
            return False

    def _pump_back(self, server: socket.socket, client: socket.socket, doomed: threading.Event) -> None:
        with suppress(OSError):
            while block := server.recv(1 << 16):
                if doomed.is_set():  # the server has answered, so it has applied the request
                    break
                client.sendall(block)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
