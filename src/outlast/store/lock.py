"""S3 Object Lock: objects that nobody, whoever has the keys of the account, can delete for a number of days.

Every object that can't be made again from others is created with a retention in compliance mode (AWS S3
User Guide, "Locking objects with Object Lock"), in the same request that creates it. Such a bucket
keeps versions: deleting an object only hides it, and its locked version can be had back. `extend`
lengthens the retention of what is still needed; it can't be shortened by anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice

import msgspec

from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Exists, NotFound, OutlastError, Refused, Unavailable
from outlast.store.base import Buffer, ObjectInfo, ObjectStore, check_name
from outlast.store.bucket import Bucket
from outlast.store.layers import Layer

DAY_SECONDS = 86_400
LOCK_DAYS_MAX = 36_500
"""what S3 accepts"""
_LOCKED = ("format", "keys/", "packs/", "log/")
_BATCH = 1000
_NOT_LOCKABLE = {"ObjectLockConfigurationNotFoundError", "InvalidRequest", "MethodNotAllowed", "NotImplemented"}


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
            bucket.create(name, content, self.until_seconds(), self.capabilities.pack_class)
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


class _Bucket(Bucket):
    """The requests about locks."""

    purpose = "are to be locked"
    permissions = "s3:PutObject, s3:PutObjectRetention, s3:GetObjectRetention and s3:GetBucketObjectLockConfiguration"

    def prove(self) -> None:
        with self.translated("lock objects in", ""):
            found = self.client.get_object_lock_configuration(Bucket=self.name)
        if found.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") != "Enabled":
            raise self._not_lockable("")

    def create(self, name: str, content: bytes, until_seconds: float, pack_class: str) -> None:
        named = {"StorageClass": pack_class} if pack_class and name.startswith("packs/") else {}
        with self.translated("write", name):
            self.client.put_object(
                Bucket=self.name,
                Key=self.key(name),
                Body=content,
                IfNoneMatch="*",
                ObjectLockMode="COMPLIANCE",
                ObjectLockRetainUntilDate=datetime.fromtimestamp(until_seconds, UTC),
                **named,
            )

    def retain(self, name: str, until_seconds: float) -> None:
        until = datetime.fromtimestamp(until_seconds, UTC)
        with self.translated("lock", name):
            self.client.put_object_retention(
                Bucket=self.name,
                Key=self.key(name),
                Retention={"Mode": "COMPLIANCE", "RetainUntilDate": until},
            )

    def retained_until_seconds(self, name: str) -> float:
        """Unix time until which the object is locked in compliance mode; 0 when it isn't, or it is kept from us."""
        with self.translated("read the lock of", name):
            head = self.client.head_object(Bucket=self.name, Key=self.key(name))
        until = head.get("ObjectLockRetainUntilDate")
        return float(until.timestamp()) if until and head.get("ObjectLockMode") == "COMPLIANCE" else 0

    def translate(self, code: str, status: int, action: str, name: str) -> OutlastError:
        if code in _NOT_LOCKABLE or (status == 404 and not name and code != "NoSuchBucket"):
            return self._not_lockable(f" (HTTP {status} {code})")
        return super().translate(code, status, action, name)

    def _not_lockable(self, reason: str) -> Refused:
        return Refused(
            f"the bucket {self.name} does not lock objects{reason}, as this repository needs it to. "
            "Nothing was written.",
            hint="Object Lock is switched on for a bucket, best when it is made: `aws s3api create-bucket "
            "--object-lock-enabled-for-bucket`. Give such a bucket, or leave --lock-days out.",
        )
