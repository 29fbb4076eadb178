"""Stores that let nothing be overwritten or deleted, and S3 buckets that are told to for some days."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from shell import Shell

from outlast.backup.create import create
from outlast.backup.restore import execute, plan
from outlast.clock import SYSTEM_CLOCK, Clock, ManualClock
from outlast.errors import Refused
from outlast.repo import forget
from outlast.repo.check import check
from outlast.repo.form import WAY_OUT
from outlast.repo.pack import object_name
from outlast.repo.prune import prune
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.store.base import Buffer, ObjectStore
from outlast.store.layers import open_store
from outlast.store.local import LocalStore
from outlast.store.lock import DAY_SECONDS, LockingStore
from servers import S3_ENVIRONMENT, MotoServer

DAY_NS = DAY_SECONDS * 10**9


class WriteOnce(LocalStore):
    """What a write-once medium allows: nothing is replaced and nothing is deleted."""

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        raise Refused(f"{name} may not be overwritten")

    def delete(self, name: str) -> None:
        raise Refused(f"{name} may not be deleted")


def fill(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(os.urandom(100_000))
    (folder / "text").write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("passphrase", [None, b"a secret"], ids=["plain", "encrypted"])
def test_nothing_is_ever_overwritten_or_deleted_by_what_keeps_data(passphrase: bytes | None, tmp_path: Path) -> None:
    secret = (lambda: passphrase) if passphrase else None
    store = WriteOnce(str(tmp_path / "repo"))
    Repository.create(store, secret=secret)
    for turn in range(3):
        data = fill(tmp_path / "data", f"turn {turn}")
        create(Repository.open(store, secret=secret), [os.fsencode(data)])
    repository = Repository.open(store, secret=secret)
    assert len(repository.snapshots()) == 3
    assert check(repository, data="all").ok
    execute(repository, plan(repository, repository.snapshots()[-1], os.fsencode(tmp_path / "back")))
    assert contents(tmp_path / "back") == contents(tmp_path / "data")


# -- S3 Object Lock ----------------------------------------------------------------------------------


class Locked:
    """A bucket with Object Lock, and an account that may do everything there."""

    def __init__(self, bucket: str, client: Any) -> None:
        self.bucket = bucket
        self.client = client
        self.url = f"s3://{bucket}/models"

    def retained_days(self, clock: Clock = SYSTEM_CLOCK) -> dict[str, float]:
        """Object -> for how many days it is locked from now on; 0 where it isn't."""
        found = {}
        for info in open_store(self.url).list(""):
            head = self.client.head_object(Bucket=self.bucket, Key=f"models/{info.name}")
            until = head.get("ObjectLockRetainUntilDate")
            assert not until or head["ObjectLockMode"] == "COMPLIANCE"
            found[info.name] = (until.timestamp() - clock.now_ns() / 1e9) / DAY_SECONDS if until else 0
        return found


@pytest.fixture
def locked(moto_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Locked:
    import boto3

    for key, text in S3_ENVIRONMENT.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_server.url)
    client = boto3.client("s3", region_name="us-east-1")
    bucket = f"locked-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    return Locked(bucket, client)


@pytest.mark.server
def test_everything_that_counts_is_locked_from_its_first_moment(locked: Locked, shell: Shell) -> None:
    import botocore.exceptions

    shell.environment |= {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    shell.environment |= {"OUTLAST_REPO": locked.url, "OUTLAST_PASSPHRASE": "a secret"}
    data = fill(shell.folder / "data", "first")
    made = shell("init", "--encrypt", "--lock-days", "30", "--json").json
    assert made["lock_days"] == 30
    shell("backup", "data")
    fill(data, "second")
    shell("backup", "data")
    days = {name: left for name, left in locked.retained_days().items() if name not in WAY_OUT}
    assert {name.partition("/")[0] for name in days} == {"format", "keys", "packs", "log"}
    assert all(29.9 < left <= 30 for left in days.values()), days

    for name in days:
        versions = locked.client.list_object_versions(Bucket=locked.bucket, Prefix=f"models/{name}")["Versions"]
        assert len(versions) == 1
        with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
            locked.client.delete_object(Bucket=locked.bucket, Key=f"models/{name}", VersionId=versions[0]["VersionId"])
    assert shell("check", "--data", "all", "--json").json["ok"]
    shell("restore", "latest", "--to", "back")
    assert contents(shell.folder / "back") == contents(data)
    assert shell("key", "rotate", "--json").json["epoch"] == 2
    shell("backup", "data")


@pytest.mark.server
def test_what_somebody_deleted_can_be_had_back(locked: Locked, tmp_path: Path) -> None:
    data = fill(tmp_path / "data", "precious")
    repository = Repository.create(open_store(locked.url), lock_days=1)
    create(repository, [os.fsencode(data)])
    for info in open_store(locked.url).list(""):
        locked.client.delete_object(Bucket=locked.bucket, Key=f"models/{info.name}")
    assert not list(open_store(locked.url).list(""))
    for marker in locked.client.list_object_versions(Bucket=locked.bucket)["DeleteMarkers"]:
        locked.client.delete_object(Bucket=locked.bucket, Key=marker["Key"], VersionId=marker["VersionId"])
    again = Repository.open(open_store(locked.url))
    execute(again, plan(again, again.snapshots()[0], os.fsencode(tmp_path / "back")))
    assert contents(tmp_path / "back") == contents(data)


@pytest.mark.server
def test_retention_is_extended_once_half_of_it_is_over(locked: Locked, tmp_path: Path) -> None:
    clock = ManualClock(now_ns=SYSTEM_CLOCK.now_ns())
    Repository.create(open_store(locked.url), lock_days=10, clock=clock)
    repository = Repository.open(open_store(locked.url), clock=clock)
    create(repository, [os.fsencode(fill(tmp_path / "data", "kept"))])
    store = repository.store
    assert isinstance(store, LockingStore)
    objects = [info for info in store.list("") if not info.name.startswith(("index/", "state/"))]

    fresh = store.extend(objects)
    assert (fresh.objects, fresh.asked, fresh.extended, fresh.missing) == (len(objects), 0, 0, [])
    clock.sleep(6 * DAY_SECONDS)
    later = store.extend(objects)
    assert (later.asked, later.extended, later.missing) == (len(objects), len(objects), [])
    assert all(9.9 < left <= 10.1 for left in locked.retained_days(clock).values())
    again = store.extend(objects)
    assert (again.asked, again.extended) == (len(objects), 0), "one question each, and nothing to do"
    gone = store.extend([*objects, *(type(info)(f"{info.name}0", 1, 0) for info in objects[:1])])
    assert gone.missing == [f"{objects[0].name}0"]


@pytest.mark.server
def test_prune_keeps_what_is_needed_locked_and_lets_the_rest_run_out(locked: Locked, tmp_path: Path) -> None:
    clock = ManualClock(now_ns=SYSTEM_CLOCK.now_ns())
    Repository.create(open_store(locked.url), lock_days=10, clock=clock)
    repository = Repository.open(open_store(locked.url), clock=clock)
    old = create(repository, [os.fsencode(fill(tmp_path / "old", "gone soon"))]).snapshot
    create(repository, [os.fsencode(fill(tmp_path / "data", "kept"))])
    forget.execute(repository, forget.plan(repository, ids=[old]), allow_empty=True)
    clock.sleep(6 * DAY_SECONDS)
    report = prune(repository, Policy(max_delete=1))
    assert report.condemned
    left = locked.retained_days(clock)
    needed = {object_name(name) for name in repository.state.packs}
    given_up = {object_name(name) for name in repository.state.condemned}
    assert needed
    assert given_up
    assert all(left[name] > 9.9 for name in [*needed, "format"])
    assert all(left[name] < 4.1 for name in given_up)
    assert report.extended >= len(needed) + 1


@pytest.mark.server
def test_a_name_is_taken_once_and_our_own_bytes_are_success(locked: Locked) -> None:
    from outlast.errors import Exists

    store = LockingStore(open_store(locked.url), 1)
    store.put_if_absent("log/00000000000000000001", [b"mine", b" own"])
    store.put_if_absent("log/00000000000000000001", [b"mine own"])
    with pytest.raises(Exists):
        store.put_if_absent("log/00000000000000000001", [b"another's"])
    assert store.get("log/00000000000000000001") == b"mine own"


@pytest.mark.server
def test_a_bucket_without_object_lock_is_refused_with_nothing_made(s3: str, shell: Shell) -> None:
    shell.environment |= {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    ran = shell("init", "--lock-days", "30", code=21, OUTLAST_REPO=f"{s3}/models")
    assert "does not lock objects" in ran.err and "--object-lock-enabled-for-bucket" in ran.err
    assert not list(open_store(s3).list(""))


def test_other_stores_are_refused_with_nothing_made(shell: Shell) -> None:
    ran = shell("init", "--lock-days", "30", code=21)
    assert "only S3 with Object Lock" in ran.err
    assert not (shell.folder / "repo").exists()
    assert "36500" in shell("init", "--lock-days", "0", code=2).err


@pytest.mark.server
def test_a_copy_elsewhere_is_an_ordinary_repository(locked: Locked, tmp_path: Path) -> None:
    Repository.create(open_store(locked.url), lock_days=30)
    copy: ObjectStore = LocalStore(str(tmp_path / "copy"))
    for info in open_store(locked.url).list(""):
        copy.put(info.name, [open_store(locked.url).get(info.name)])
    repository = Repository.open(copy)
    create(repository, [os.fsencode(fill(tmp_path / "data", "more"))])
    assert check(repository, data="all").ok
