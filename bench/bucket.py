"""An S3 server that is no bottleneck: objects in memory, and a line of so many bytes a second to it.

    python bench/bucket.py 125000000        prints its port; every bucket is there, and empty

It knows what `outlast` and obstore ask of a bucket: PUT (with `If-None-Match: *`), GET (with ranges), HEAD, DELETE, and
lists. `DELETE /` forgets every object, and `GET /` tells the PUTs so far as JSON, name -> how often. All
connections share the line, so whoever overlaps its work with it does best.
"""

from __future__ import annotations

import email.utils
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PIECE_BYTES = 256 << 10


class Line:
    """What all connections share."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._turn = threading.Lock()
        self._free_at = 0.0

    def carry(self, count: int) -> None:
        """Wait until so many bytes more have come through."""
        with self._turn:
            self._free_at = max(time.monotonic(), self._free_at) + count / self._bytes_per_second
            pause = self._free_at - time.monotonic()
        if pause > 0:
            time.sleep(pause)


class Bucket:
    def __init__(self, bytes_per_second: float) -> None:
        self.line = Line(bytes_per_second)
        self.objects: dict[str, bytearray] = {}
        self.puts: dict[str, int] = {}
        self.turn = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, format: str, *args: object) -> None:
        return

    def answer(self, status: int, body: bytes | memoryview = b"", *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if body:
            self.bucket.line.carry(len(body))
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code></Error>".encode())

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path)

    def do_PUT(self) -> None:
        content = bytearray(int(self.headers.get("Content-Length", 0)))
        view = memoryview(content)
        at = 0
        while at < len(content):
            count = self.rfile.readinto(view[at : at + PIECE_BYTES])  # type: ignore[attr-defined]
            if not count:
                return  # whoever sent it is gone, and a part of an object is none
            self.bucket.line.carry(count)
            at += count
        with self.bucket.turn:
            self.bucket.puts[self.key] = self.bucket.puts.get(self.key, 0) + 1
            taken = self.headers.get("If-None-Match") == "*" and self.key in self.bucket.objects
            if not taken:
                self.bucket.objects[self.key] = content
        if taken:
            self.refuse(412, "PreconditionFailed")
        else:
            self.answer(200, ETag=f'"{len(content)}"')

    def facts(self, content: bytearray) -> dict[str, str]:
        modified = email.utils.formatdate(time.time(), usegmt=True)
        return {"ETag": f'"{len(content)}"', "Last_Modified": modified, "Accept_Ranges": "bytes"}

    def do_HEAD(self) -> None:
        content = self.bucket.objects.get(self.key)
        if content is None:
            self.answer(404)
        else:
            self.answer(200, length=len(content), **self.facts(content))

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200, json.dumps(self.bucket.puts).encode())
            return
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            self.list({name: values[0] for name, values in query.items()})
            return
        content = self.bucket.objects.get(self.key)
        if content is None:
            self.refuse(404, "NoSuchKey")
            return
        wanted = self.headers.get("Range")
        if wanted is None:
            self.answer(200, memoryview(content), **self.facts(content))
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        if start >= len(content):
            self.refuse(416, "InvalidRange")
            return
        part = memoryview(content)[start : end + 1]
        self.answer(206, part, Content_Range=f"bytes {start}-{end}/{len(content)}", **self.facts(content))

    def list(self, query: dict[str, str]) -> None:
        """All in one page."""
        folder = f"{self.key.rstrip('/')}/"
        after = folder + query.get("start-after", "")
        with self.bucket.turn:
            sizes = {name: len(content) for name, content in self.bucket.objects.items()}
        names = sorted(name for name in sizes if name.startswith(folder + query.get("prefix", "")) and name > after)
        found = "".join(
            f"<Contents><Key>{escape(name.removeprefix(folder))}</Key><Size>{sizes[name]}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for name in names
        )
        head = f"<KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>"
        self.answer(200, f"<ListBucketResult>{head}{found}</ListBucketResult>".encode())

    def do_DELETE(self) -> None:
        with self.bucket.turn:
            if self.path == "/":
                self.bucket.objects.clear()
                self.bucket.puts.clear()
            else:
                self.bucket.objects.pop(self.key, None)
        self.answer(204)


def main() -> None:
    Handler.bucket = Bucket(float(sys.argv[1]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
