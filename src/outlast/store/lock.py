"""S3 Object Lock: objects that nobody, whoever has the keys of the account, can delete for a number of days.

Every object that can't be made again from others is created with a retention in compliance mode (AWS S3
User Guide, "Locking objects with Object Lock"), in the same request that creates it. Such a bucket
keeps versions: deleting an object only hides it, and its locked version can be had back. `extend`
lengthens the retention of what is still needed; it can't be shortened by anybody.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import msgspec

from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Exists, NotFound, OutlastError, Refused, Unavailable
from outlast.store.base import Buffer, ObjectInfo, ObjectStore, check_name
from outlast.store.layers import Layer

DAY_SECONDS = 86_400
LOCK_DAYS_MAX = 36_500
"""what S3 accepts"""
_LOCKED = ("format", "keys/", "packs/", "log/")
_BATCH = 1000
_NOT_LOCKABLE = {"ObjectLockConfigurationNotFoundError", "InvalidRequest", "MethodNotAllowed", "NotImplemented"}
_REFUSALS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidRetentionPeriod"}


class Extension(msgspec.Struct):
    """What `extend` did. `missing`: names of objects that are not there any more."""

    objects: int = 0
    asked: int = 0
    """those old enough that their retention had to be asked for, one request each"""
    extended: int = 0
    """those whose retention was lengthened, by one more request each"""
    until_seconds: float = 0
    """Unix time until which those are locked now"""
    missing: list[str] = []


class LockingStore(Layer):
    """A store on S3 whose objects are locked for `days` from when they are created, derived ones excepted.

    Nothing is contacted before the first write. It, and `prove`, raise `Refused` when the bucket can't
    lock objects, before anything is written; reading needs neither Object Lock nor boto3.
    """

    def __init__(self, store: ObjectStore, days: int, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(store)
        self.days = days
        self._clock = clock
        self._lock = threading.Lock()
        self._proven: _Bucket | None = None

    def prove(self) -> _Bucket:
        """The bucket, once it has said that it locks objects. Raises `Refused` or `Unavailable`."""
        with self._lock:
            if self._proven is None:
                bucket = _Bucket(self.url)
                bucket.prove()
                self._proven = bucket
            return self._proven

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        if not check_name(name).startswith(_LOCKED):
            self._store.put_if_absent(name, parts)
            return
        content = b"".join(parts)
        bucket = self.prove()
        try:
            bucket.create(name, content, self.until_seconds())
        except (Exists, Unavailable) as error:
            # Neither proves anything: what is there decides, as it does for every conditional write.
            try:
                same = self.stat(name).size_bytes == len(content) and self.get(name) == content
            except NotFound:
                raise Unavailable(f"{error.message} Nothing is there.") from error
            if not same:
                raise Exists(f"the object `{name}` exists with other content; it was left as it is.") from error

    def until_seconds(self) -> float:
        """Unix time until which an object is locked that is created, or extended, now."""
        return self._clock.now_ns() // 10**9 + self.days * DAY_SECONDS

    def extend(self, objects: Iterable[ObjectInfo]) -> Extension:
        """Lock these objects for `days` from now where less than half of that is left.

        An object as young as that has enough left by itself and costs no request; an older one costs
        one, and one more every half of `days`. Raises `Refused` or `Unavailable`; then some may be
        extended, and the same call goes on with the others.
        """
        bucket, until = self.prove(), self.until_seconds()
        due_before = until - self.days * DAY_SECONDS / 2
        report = Extension(until_seconds=until)

        def extend_one(info: ObjectInfo) -> bool | None:
            try:
                if bucket.retained_until_seconds(info.name) >= due_before:
                    return False
                bucket.retain(info.name, until)
            except NotFound:
                return None
            return True

        with ThreadPoolExecutor(self.capabilities.concurrency, thread_name_prefix="lock") as pool:
            waiting = iter(objects)
            while some := list(islice(waiting, _BATCH)):
                report.objects += len(some)
                old = [info for info in some if info.modified_seconds + self.days * DAY_SECONDS < due_before]
                report.asked += len(old)
                for info, extended in zip(old, pool.map(extend_one, old), strict=True):
                    report.extended += bool(extended)
                    if extended is None:
                        report.missing.append(info.name)
        return report


def locking(store: ObjectStore, days: int, clock: Clock = SYSTEM_CLOCK) -> ObjectStore:
    """The store, locking what is written to it when `days` is not 0.

    A copy of a repository in another kind of store can't lock; it is used as it is.
    """
    return LockingStore(store, days, clock) if days and store.url.startswith("s3://") else store


def prove_lockable(store: ObjectStore) -> None:
    """Raise `Refused` unless what is written to this store, made by `locking`, will be locked."""
    if not isinstance(store, LockingStore):
        raise Refused(
            f"{store.url} can't lock objects: only S3 with Object Lock can. Nothing was made.",
            hint="Leave --lock-days out, or give the s3:// URL of a bucket that was made with Object Lock.",
        )
    store.prove()


class _Bucket:
    """The requests that only boto3 can make, with the errors translated."""

    def __init__(self, url: str) -> None:
        try:
            import boto3
            import botocore.config
            import botocore.exceptions
        except ImportError as exc:
            raise Refused(
                f"the objects of {url} are to be locked, which needs the package boto3. Nothing was written.",
                hint="Install it: pip install 'outlast[lock]'.",
            ) from exc
        from outlast.store.cloud import s3_endpoint  # here, for repositories in folders never need it

        parts = urlsplit(url)
        self._url = url
        self._name = parts.netloc
        self._prefix = parts.path.strip("/")
        self._errors = botocore.exceptions
        endpoint = s3_endpoint()
        settings: dict[str, Any] = {"s3": {"addressing_style": "path"}} if endpoint else {}
        config = botocore.config.Config(
            connect_timeout=10,
            read_timeout=300,
            retries={"mode": "standard", "total_max_attempts": 5},
            max_pool_connections=32,
            **settings,
        )
        with self._translated("open", ""):
            self._client: Any = boto3.session.Session().client(
                "s3",
                endpoint_url=endpoint or None,
                region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None,
                config=config,
            )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def prove(self) -> None:
        with self._translated("lock objects in", ""):
            found = self._client.get_object_lock_configuration(Bucket=self._name)
        if found.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") != "Enabled":
            raise self._not_lockable("")

    def create(self, name: str, content: bytes, until_seconds: float) -> None:
        with self._translated("write", name):
            self._client.put_object(
                Bucket=self._name,
                Key=self._key(name),
                Body=content,
                IfNoneMatch="*",
                ObjectLockMode="COMPLIANCE",
                ObjectLockRetainUntilDate=datetime.fromtimestamp(until_seconds, UTC),
            )

    def retain(self, name: str, until_seconds: float) -> None:
        until = datetime.fromtimestamp(until_seconds, UTC)
        with self._translated("lock", name):
            self._client.put_object_retention(
                Bucket=self._name,
                Key=self._key(name),
                Retention={"Mode": "COMPLIANCE", "RetainUntilDate": until},
            )

    def retained_until_seconds(self, name: str) -> float:
        """Unix time until which the object is locked in compliance mode; 0 when it isn't, or it is kept from us."""
        with self._translated("read the lock of", name):
            head = self._client.head_object(Bucket=self._name, Key=self._key(name))
        until = head.get("ObjectLockRetainUntilDate")
        return float(until.timestamp()) if until and head.get("ObjectLockMode") == "COMPLIANCE" else 0

    @contextmanager
    def _translated(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except self._errors.ClientError as exc:
            raise self._translate(exc.response, action, name) from None
        except self._errors.NoCredentialsError:
            raise Refused(
                f"no AWS credentials were found, so {self._url} does not let us {action} {name or 'it'}; nothing was "
                "changed.",
                hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, then run the same command again.",
            ) from None
        except (self._errors.BotoCoreError, OSError, ValueError) as exc:
            raise Unavailable(
                f"{self._url} did not {action} {name or 'it'} ({type(exc).__name__}).",
                hint="Check the network and the endpoint; the same command can be run again.",
            ) from None

    def _translate(self, response: dict[str, Any], action: str, name: str) -> OutlastError:
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        reason = f"HTTP {status} {code}"
        if code in {"PreconditionFailed", "ConditionalRequestConflict"} or status == 412:
            return Exists(f"the object `{name}` may already exist ({reason}).")
        if code == "NoSuchBucket":
            return NotFound(f"the bucket {self._name} does not exist.", hint="Create it, or correct the URL.")
        if code == "NoSuchKey" or (status == 404 and name):
            return NotFound(f"there is no object `{name}` in {self._url}.")
        if code in _NOT_LOCKABLE or (status == 404 and not name):
            return self._not_lockable(f" ({reason})")
        if code in _REFUSALS or status in {401, 403} or (status == 400 and code != "RequestTimeout"):
            return Refused(
                f"{self._url} does not let us {action} {name or 'it'} ({reason}); nothing was changed.",
                hint="The account needs s3:PutObject, s3:PutObjectRetention, s3:GetObjectRetention and "
                "s3:GetBucketObjectLockConfiguration there.",
            )
        return Unavailable(
            f"{self._url} did not {action} {name or 'it'} ({reason}).", hint="The same command can be run again."
        )

    def _not_lockable(self, reason: str) -> Refused:
        return Refused(
            f"the bucket {self._name} does not lock objects{reason}, as this repository needs it to. "
            "Nothing was written.",
            hint="Object Lock is switched on for a bucket, best when it is made: `aws s3api create-bucket "
            "--object-lock-enabled-for-bucket`. Give such a bucket, or leave --lock-days out.",
        )
