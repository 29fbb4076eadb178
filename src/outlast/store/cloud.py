"""S3, Google Cloud Storage and Azure Blob Storage, through obstore.

The rule for every conditional write: a refused, failed or unanswered one proves nothing. The
object is read back, and only what is there decides. S3 answers 412 to a retry of a write that
succeeded, and 409 when two writers met and neither may have won (AWS S3 User Guide, "How to
prevent object overwrites with conditional writes").
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from outlast.errors import (
    Archived,
    Exists,
    InvalidInput,
    NotFound,
    OutlastError,
    Refused,
    StoreFull,
    Unavailable,
)
from outlast.store.base import HOW_TO_THAW, Buffer, Capabilities, ObjectInfo, check_name
from outlast.store.classes import AT_ONCE
from outlast.store.local import check_range

if TYPE_CHECKING:
    from obstore import ObjectMeta

SCHEMES = ("s3", "gs", "az")
COMPARE_BYTES = 8 << 20
SINGLE_PUT_BYTES_MAX = 64 << 20
LIST_PAGE = 1000
GAP_BYTES = 1 << 20
OFFSET_MAX = 1 << 62

# One request may carry a whole pack over a slow line, so it is given minutes; obstore's own retries
# only bridge a hiccup, because RetryStore sees to the rest with the read-back rule.
_CLIENT_OPTIONS = {"timeout": "300s", "connect_timeout": "10s"}
_RETRY_CONFIG = {"max_retries": 2, "retry_timeout": timedelta(seconds=60)}

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_URL_SECRETS = re.compile(r"(?<=://)[^/\s@]*@|\?[^\s\"')]+")
_EFFORT = re.compile(r"^.*?Error performing \w+ \S+ in .*? - ", re.DOTALL)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
_METADATA_HOST = "169.254.169.254"  # asked for credentials when the environment has none
_CONNECTION_FAILURES = {
    "ConnectionRefused": "connection refused",
    "Connection refused": "connection refused",
    "dns error": "no such host",
    "failed to lookup": "no such host",
    "kind: Connect": "no connection",
}
_WORTH_RETRYING = {408, 409, 412, 416, 425, 429}
_ARCHIVED_CODES = {"InvalidObjectState", "BlobArchived"}  # of S3 and of Azure
_FULL_CODES = {"QuotaExceeded", "QuotaExceededException", "InsufficientStorage", "XMinioStorageFull"}


class CloudStore:
    """Objects in a bucket, below the prefix that the URL names.

    Credentials and endpoint come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and
    so on, likewise for Google and Azure), never from the URL. `put_if_absent` can't tell its own
    earlier success from another writer's identical bytes, so identical bytes succeed.
    """

    def __init__(self, url: str, pack_class: str = "") -> None:
        import obstore
        import obstore.exceptions
        import obstore.store

        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.netloc:
            raise InvalidInput(f"{_scrub(url)!r} is not a bucket; write s3://BUCKET/PREFIX, gs://… or az://….")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise InvalidInput(
                "The URL of a store must hold nothing but bucket and prefix; nothing was contacted.",
                hint="Give credentials in the environment, as AWS_ACCESS_KEY_ID and so on.",
            )
        if pack_class and (pack_class not in AT_ONCE or parts.scheme != "s3"):
            raise InvalidInput(
                f"packs can't be created in a storage class {pack_class!r} of {_scrub(url)}; nothing was contacted.",
                hint=f"On s3:// it may be {', '.join(AT_ONCE)}; `outlast repo archive` moves verified packs to others.",
            )
        self._url = url.rstrip("/")
        self._pack_class = pack_class
        self._api = obstore
        self._errors = (obstore.exceptions.BaseError, OSError, ValueError, NotImplementedError)
        # S3's directory buckets (the suffix is reserved for them) are the ones that list in no order.
        self._lists_in_order = parts.scheme == "s3" and not parts.netloc.endswith("--x-s3")
        from_url: Any = obstore.store.from_url  # its overloads want to know the kind of store beforehand
        options: dict[str, Any] = dict(_CLIENT_OPTIONS)
        if parts.scheme == "s3" and s3_endpoint().startswith("http://"):
            options["allow_http"] = True  # the user wrote http:// himself; that is the permission
        with self._translated("open", ""):
            self._store: Any = from_url(self._url, client_options=options, retry_config=_RETRY_CONFIG)

    @property
    def url(self) -> str:
        return self._url

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(durable_when_listed=True, concurrency=16, pack_class=self._pack_class)

    @contextmanager
    def _translated(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except self._errors as exc:
            raise _translate(exc, action, name, self._url) from None
        except BaseException as exc:
            # What the library itself did not expect comes as a class that can't be imported and is no Exception.
            if type(exc).__name__ != "PanicException":
                raise
            raise _translate(exc, action, name, self._url) from None

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        named = {"Storage-Class": self._pack_class} if self._pack_class and name.startswith("packs/") else None
        try:
            with self._translated("write", name):
                # Sent as they are: to join 64 MB takes a fifth as long as to sign and send them.
                self._api.put(
                    self._store, check_name(name), list(parts), attributes=named, mode="create", use_multipart=False
                )
        except (Exists, Unavailable) as error:
            if isinstance(error, StoreFull):
                raise
            self._settle(name, b"".join(parts), error)

    def _settle(self, name: str, content: bytes, error: OutlastError) -> None:
        """After a reply that proves nothing: return when our bytes are there, else raise what is true."""
        try:
            same = self._holds(name, content)
        except NotFound:
            raise Unavailable(
                f"the object `{name}` was not written to {self._url}: {error.message.rstrip('.')}, "
                "and nothing is there."
            ) from error
        if not same:
            raise Exists(f"the object `{name}` already exists with other content; it was left as it is.") from error

    def _holds(self, name: str, content: bytes) -> bool:
        """Whether the object has exactly these bytes; big ones are compared range by range."""
        size_bytes = len(content)
        if self.stat(name).size_bytes != size_bytes:
            return False
        if size_bytes <= COMPARE_BYTES:
            return self.get(name) == content
        with memoryview(content) as ours:
            return all(
                self.get_ranges(name, [(start, min(COMPARE_BYTES, size_bytes - start))])[0]
                == ours[start : start + COMPARE_BYTES]
                for start in range(0, size_bytes, COMPARE_BYTES)
            )

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        multipart = len(content) > SINGLE_PUT_BYTES_MAX
        with self._translated("write", name):
            self._api.put(
                self._store,
                check_name(name),
                content,
                use_multipart=multipart,
                chunk_size=16 << 20,
                max_concurrency=4,
            )

    def get(self, name: str) -> bytes:
        with self._translated("read", name):
            reply = self._api.get(self._store, check_name(name))
            expected = reply.meta["size"]
            content = reply.bytes().to_bytes()
        if len(content) != expected:
            raise Unavailable(f"the object `{name}` was cut off after {len(content)} of {expected} bytes.")
        return content

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if any(offset < 0 or length <= 0 or offset + length > OFFSET_MAX for offset, length in ranges):
            self._check_ranges(name, ranges)
        spans = _merged(ranges)
        if not spans:
            return [b""] * len(ranges)
        try:
            with self._translated("read", name):
                replies = self._api.get_ranges(
                    self._store,
                    check_name(name),
                    starts=[start for start, _ in spans],
                    lengths=[end - start for start, end in spans],
                )
        except NotFound:
            raise
        except OutlastError:
            self._check_ranges(name, ranges)  # past the end: then that is what to say
            raise
        blocks = [memoryview(reply) for reply in replies]
        for (start, end), block in zip(spans, blocks, strict=True):
            if len(block) != end - start:
                self._check_ranges(name, ranges)
                raise Unavailable(f"the object `{name}` was cut off: bytes {start} to {end} gave only {len(block)}.")
        starts = [start for start, _ in spans]
        found = []
        for offset, length in ranges:
            number = max(0, bisect_right(starts, offset) - 1)
            begin = offset - starts[number]
            found.append(bytes(blocks[number][begin : begin + length]) if length else b"")
        return found

    def _check_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        size_bytes = self.stat(name).size_bytes
        for offset, length in ranges:
            check_range(name, offset, length, size_bytes)

    def stat(self, name: str) -> ObjectInfo:
        with self._translated("read", name):
            return _info(self._api.head(self._store, check_name(name)))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        folder = prefix[: prefix.rfind("/") + 1]
        if folder and not _is_legal(folder[:-1]):
            return  # no object can have such a name
        near = self._list_folder(folder, prefix, after)
        found = (info for info in near if info.name.startswith(prefix) and info.name > after)
        yield from found if self._lists_in_order else sorted(found, key=lambda info: info.name)

    def _list_folder(self, folder: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
        """Everything in the folder, from about where names that start with `prefix` begin.

        The store takes whole path parts only, and skips names up to an offset: everything that
        starts with `prefix` comes after `prefix` less its last character.
        """
        offset = max(filter(_is_legal, (after, prefix[:-1])), default=None)
        with self._translated("list", prefix):
            pages = self._api.list(self._store, folder.rstrip("/") or None, offset=offset, chunk_size=LIST_PAGE)
            for page in pages:
                for meta in page:
                    info = _info(meta)
                    if self._lists_in_order and info.name > prefix and not info.name.startswith(prefix):
                        return
                    yield info

    def delete(self, name: str) -> None:
        with self._translated("delete", name), suppress(FileNotFoundError):
            self._api.delete(self._store, check_name(name))


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges as few (start, end) to ask for, joined over gaps that cost less than a request.

    obstore joins ranges over the same gap by itself, but panics when one of a joined span begins
    behind the end of the object; so it only gets spans that it leaves alone.
    """
    spans: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if not length:
            continue
        if spans and offset - spans[-1][1] <= GAP_BYTES:
            spans[-1] = spans[-1][0], max(spans[-1][1], offset + length)
        else:
            spans.append((offset, offset + length))
    return spans


def _is_legal(name: str) -> bool:
    try:
        check_name(name)
    except InvalidInput:
        return False
    return True


def _info(meta: ObjectMeta) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())


def _scrub(text: str) -> str:
    """The text without user names and query strings of URLs, where signatures and tokens live."""
    return _URL_SECRETS.sub("", text)


def s3_endpoint() -> str:
    """Where S3 is, when the environment says so: an address that the library would panic about is refused."""
    found = ""
    for variable in _ENDPOINTS:
        address = os.environ.get(variable)
        if address == "":
            del os.environ[variable]  # an empty variable is an unset one, but not to the library
        elif address is not None:
            parts = urlsplit(address)
            if parts.scheme not in {"http", "https"} or not parts.hostname:
                raise InvalidInput(
                    f"{variable} {_scrub(address)!r} is not a URL; write http://{_scrub(address).rpartition('/')[2]}.",
                    hint="http:// is for a server of your own; everything else is https://.",
                )
            found = found or address
    return found


def _reply(exc: BaseException) -> tuple[int, str]:
    """What came back: the HTTP status (0 where there was no reply) and a short reason without secrets."""
    text = str(exc).split("\n\nDebug source", 1)[0]
    status, code = _STATUS.search(text), _CODE.search(text)
    if status:
        return int(status[1]), f"HTTP {status[1]}" + (f" {code[1]}" if code else "")
    return 0, _scrub(" ".join(_EFFORT.sub("", text).split()))[:300].rstrip(". ")


def _unreachable(exc: BaseException, url: str) -> Unavailable | None:
    text = str(exc)
    why = next((said for sign, said in _CONNECTION_FAILURES.items() if sign in text), None)
    if why is None:
        return None
    address = re.search(r"Error performing \w+ (https?://[^/\s]+)", text)
    place = _scrub(address[1]).rpartition("@")[2] if address else url
    return Unavailable(
        f"can't reach {place} ({why}).",
        hint="Check the network and the endpoint (AWS_ENDPOINT_URL for S3); the same command can be run again.",
    )


def _denial(reason: str, action: str, what: str, url: str) -> Refused:
    no_keys = not any(os.environ.get(variable) for variable in _KEYS)
    if url.startswith("s3://") and no_keys:
        return Refused(
            f"no AWS credentials were found, so {url} does not let us {action} {what}; nothing was changed.",
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, then run the same command again.",
        )
    return _refusal(reason, action, what, url)


def _refusal(reason: str, action: str, what: str, url: str) -> Refused:
    return Refused(
        f"{url} does not let us {action} {what} ({reason}). Nothing was changed.",
        hint="Check the credentials in the environment and what they are allowed to do.",
    )


def _translate(exc: BaseException, action: str, name: str, url: str) -> OutlastError:
    """The one place where obstore's exceptions become ours. Callers cut the chain: it holds URLs."""
    from obstore import exceptions as theirs

    status, reason = _reply(exc)
    what = "objects" if action == "list" else f"the object `{name}`"
    if action == "open":
        return InvalidInput(
            f"{url} can't be opened: {reason}. Nothing was contacted.",
            hint="Check the environment variables with the account, region and endpoint of the store.",
        )
    if status == 507 or any(code in reason for code in _FULL_CODES):
        return StoreFull(
            f"{url} has no room left to {action} {what} ({reason}). What was stored before is unchanged.",
            hint="Free space or raise the quota, then run the same command again.",
        )
    if _METADATA_HOST in str(exc):
        return _denial(reason, action, what, url)
    if any(code in reason for code in _ARCHIVED_CODES):
        return Archived(
            f"{what} of {url} is archived and has to be thawed before it can be read ({reason}). It is whole.",
            hint=HOW_TO_THAW,
        )
    if isinstance(exc, FileNotFoundError) or status == 404:
        if "NoSuchBucket" in reason or action in {"write", "list"}:
            bucket = urlsplit(url).netloc
            return NotFound(f"the bucket {bucket} of {url} does not exist.", hint="Create it, or correct the URL.")
        return NotFound(f"there is no object `{name}` in {url}.")
    if isinstance(exc, theirs.AlreadyExistsError | theirs.PreconditionError):
        return Exists(f"the object `{name}` may already exist ({reason}).")
    if isinstance(exc, theirs.PermissionDeniedError | theirs.UnauthenticatedError) or status in {401, 403}:
        return _denial(reason, action, what, url)
    if 300 <= status < 500 and status not in _WORTH_RETRYING:
        return _refusal(reason, action, what, url)
    if isinstance(exc, theirs.NotSupportedError | NotImplementedError) or status == 501:
        return Refused(
            f"{url} can't {action} {what} as asked ({reason}); it lacks conditional writes or ranges.",
            hint="`outlast doctor store URL` shows what this store does and does not do.",
        )
    if isinstance(exc, theirs.InvalidPathError | ValueError):
        return InvalidInput(f"{name!r} can't be used with {url} ({reason}); nothing was touched.")
    return (None if status else _unreachable(exc, url)) or Unavailable(
        f"{url} did not {action} {what} ({reason}).",
        hint="Check the network and the endpoint; the same command can be run again.",
    )
