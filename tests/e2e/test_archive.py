"""Repositories whose packs lie in archive classes of S3: moving them there, and getting them back."""

from __future__ import annotations

import json
import os
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell import Shell

from outlast.backup.create import create
from outlast.backup.repair import repair
from outlast.backup.restore import RestoreReport, execute, plan
from outlast.backup.thawed import Thawing, restore_thawed
from outlast.clock import SYSTEM_CLOCK, ManualClock
from outlast.errors import Archived, InvalidInput, Refused
from outlast.repo import archive, forget, keyless
from outlast.repo.archive_plan import ArchivePolicy
from outlast.repo.check import check
from outlast.repo.copy import copy
from outlast.repo.index import build_segment, segment_name
from outlast.repo.pack import object_name
from outlast.repo.prove import prove
from outlast.repo.prune import prune
from outlast.repo.prune_plan import Policy
from outlast.repo.repository import Repository
from outlast.store.archive import Archive
from outlast.store.layers import open_store
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore
from servers import S3_ENVIRONMENT, MotoServer

pytestmark = pytest.mark.server

PACK_BYTES = 1 << 20


class Bucket:
    """A bucket of the server, and how fast it thaws."""

    def __init__(self, server: MotoServer, client: Any) -> None:
        self.name = f"archive-{uuid.uuid4().hex}"
        self.url = f"s3://{self.name}/models"
        self.client = client
        self._server = server
        client.create_bucket(Bucket=self.name)

    def thaws(self, *, by_looks: bool) -> None:
        """At once; or so that the first look after a thaw was asked for finds it under way, and the next one done."""
        change = {"progression": "manual", "times": 1} if by_looks else {"progression": "immediate"}
        body = json.dumps({"model_name": "s3::keyrestore", "transition": change}).encode()
        request = urllib.request.Request(
            f"{self._server.url}/moto-api/state-manager/set-transition", body, method="POST"
        )
        urllib.request.urlopen(request, timeout=30).close()

    def classes(self) -> dict[str, str]:
        page = self.client.list_objects_v2(Bucket=self.name, Prefix="models/")
        return {each["Key"].removeprefix("models/"): each["StorageClass"] for each in page["Contents"]}

    def archived(self) -> list[str]:
        return sorted(name for name, kind in self.classes().items() if kind in ("GLACIER", "DEEP_ARCHIVE"))

    def thaw(self, name: str) -> None:
        request = {"Days": 1, "GlacierJobParameters": {"Tier": "Standard"}}
        self.client.restore_object(Bucket=self.name, Key=f"models/{name}", RestoreRequest=request)


@pytest.fixture
def bucket(moto_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    import boto3

    for key, text in S3_ENVIRONMENT.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_server.url)
    made = Bucket(moto_server, boto3.client("s3", region_name="us-east-1"))
    yield made
    made.thaws(by_looks=False)


def fill(folder: Path, **files: int) -> Path:
    """Files of so many bytes each, which look random and are the same in every run: so are the packs."""
    folder.mkdir(exist_ok=True)
    for name, size in files.items():
        (folder / name).write_bytes(np.random.default_rng([size, *name.encode()]).bytes(size))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made(bucket: Bucket, data: Path) -> Repository:
    """A repository of small packs with one verified snapshot."""
    repository = Repository.create(open_store(bucket.url), pack_bytes=PACK_BYTES)
    create(repository, [os.fsencode(data)])
    assert check(repository, data="all").ok
    repository.refresh()
    return repository


def archived(bucket: Bucket, data: Path, storage_class: str = "GLACIER") -> Repository:
    """The same, opened anew after all of its data was archived."""
    repository = made(bucket, data)
    planned = archive.plan(repository, ArchivePolicy(storage_class))
    report = archive.execute(repository, planned)
    assert report.packs
    assert not report.failed
    return Repository.open(open_store(bucket.url))


def test_only_packs_move_and_the_rest_is_known_without_them(bucket: Bucket, tmp_path: Path) -> None:
    data = fill(tmp_path / "data", one=2_500_000, two=2_500_000)
    before = made(bucket, data)
    packs = {object_name(name) for name in before.state.packs}
    report = archive.execute(before, archive.plan(before, ArchivePolicy("DEEP_ARCHIVE")))
    assert set(bucket.archived()) == packs
    assert (report.packs, report.manifests_stored_again) == (len(packs), 1)
    assert {name.removeprefix("footers/") for name in bucket.classes() if name.startswith("footers/")} == {
        name.rpartition("/")[2] for name in packs
    }

    for info in open_store(bucket.url).list("index/"):
        open_store(bucket.url).delete(info.name)
    repository = Repository.open(open_store(bucket.url))
    [snapshot] = repository.snapshots()
    assert {entry.path for entry in repository.entries(snapshot)} == {".", "one", "two"}
    found = check(repository, data="all")
    assert found.ok, found.damaged
    assert (found.archived_packs, found.packs_unread) == (len(packs), len(packs))
    assert not repair(repository, data="all").quarantined
    again = create(repository, [os.fsencode(data)], full=True)
    assert again.bytes_added == 0, "the data is known to be there, though it can't be read"
    assert not archive.plan(repository, ArchivePolicy("DEEP_ARCHIVE")).packs


def test_what_is_not_verified_too_young_or_too_small_stays(bucket: Bucket, tmp_path: Path) -> None:
    repository = Repository.create(open_store(bucket.url), pack_bytes=PACK_BYTES)
    create(repository, [os.fsencode(fill(tmp_path / "data", big=1_200_000, small=20_000))])

    def reasons(policy: ArchivePolicy) -> set[str]:
        planned = archive.plan(repository, policy)
        assert not planned.packs
        return {each.reason.partition(":")[0] for each in planned.left}

    assert reasons(ArchivePolicy("GLACIER")) == {"no check has read them", "too small"}
    assert check(repository, data="all").ok
    repository.refresh()
    assert reasons(ArchivePolicy("GLACIER", 3600)) == {"too young", "too small"}


def test_the_command_line_from_archive_to_restore(bucket: Bucket, shell: Shell) -> None:
    shell.environment |= {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    shell.environment |= {"OUTLAST_REPO": bucket.url}
    data = fill(shell.folder / "data", weights=3_000_000)
    shell("init")
    shell("backup", "data")
    unread = shell("repo", "archive", "--class", "glacier", "--json").json
    assert (unread["packs"], unread["left"][0]["reason"][:13]) == (0, "no check has ")
    shell("check", "--data", "all")
    planned = shell("repo", "archive", "--class", "glacier", "--dry-run", "--json").json
    assert planned["dry_run"]
    assert planned["bytes"] > 3_000_000
    assert planned["month_after"] <= planned["month_before"]
    assert bucket.archived() == []
    moved = shell("repo", "archive", "--class", "glacier", "--json").json
    assert moved["packs"] == planned["packs"] == len(bucket.archived())

    refused = shell("restore", "latest", "--to", "back", code=21)
    assert "archived" in refused.err
    assert "--thaw" in refused.err
    assert not (shell.folder / "back").exists()
    thaw = shell("restore", "latest", "--to", "back", "--dry-run", "--json").json["thaw"]
    assert sorted(each["object"] for each in thaw["archived"]) == bucket.archived()
    assert {each["storage_class"] for each in thaw["archived"]} == {"GLACIER"}
    assert [(way["tier"], round(way["hours"], 2)) for way in thaw["ways"]] == [
        ("expedited", 0.08),
        ("standard", 5),
        ("bulk", 12),
    ]
    assert thaw["ways"][0]["cost"] >= 0.01 * len(bucket.archived()) > thaw["ways"][1]["cost"] > 0
    shown = shell("restore", "latest", "--to", "back", "--dry-run").out
    assert "To be thawed" in shown
    assert "expedited" in shown
    assert "5 h 00 min" in shown

    bucket.thaws(by_looks=True)
    for _ in range(2):
        waiting = shell("restore", "latest", "--to", "back", "--thaw", "standard", "--json", code=3).json
        assert not waiting["restored"]
        assert waiting["hours"] == 5
        assert waiting["ready"] > "2026"
    assert waiting["thaw"]["archived"] == []
    assert len(waiting["thaw"]["thawing"]) == planned["packs"]
    shell("restore", "latest", "--to", "back", "--thaw", "standard")
    assert contents(shell.folder / "back") == contents(data)
    shell("restore", "latest", "--to", "again")
    assert contents(shell.folder / "again") == contents(data), "thawed packs are read like any others"


def test_what_has_thawed_is_fetched_and_kept_for_the_next_try(bucket: Bucket, tmp_path: Path) -> None:
    data = fill(tmp_path / "data", one=4_000_000, two=4_000_000)
    repository = archived(bucket, data)
    [snapshot] = repository.snapshots()
    bucket.thaws(by_looks=True)
    first = bucket.archived()[0]
    bucket.thaw(first)
    for _ in range(2):
        bucket.client.head_object(Bucket=bucket.name, Key=f"models/{first}")

    target = os.fsencode(tmp_path / "back")
    waiting = restore_thawed(repository, snapshot, target, "bulk")
    assert isinstance(waiting, Thawing)
    assert len(waiting.thaw.archived) == len(bucket.archived()) - 1
    assert waiting.hours == 12
    assert not (tmp_path / "back").exists()

    bucket.thaws(by_looks=False)
    done = restore_thawed(Repository.open(open_store(bucket.url)), snapshot, target, "bulk")
    assert isinstance(done, RestoreReport)
    assert contents(tmp_path / "back") == contents(data)
    whole = sum(map(len, contents(data).values()))
    assert 0 < done.bytes_fetched < whole, "what had thawed was not fetched twice"


def test_a_restore_that_waits_looks_by_the_clock(bucket: Bucket, tmp_path: Path) -> None:
    data = fill(tmp_path / "data", one=2_000_000)
    archived(bucket, data, "DEEP_ARCHIVE")
    clock = ManualClock(now_ns=SYSTEM_CLOCK.now_ns())
    repository = Repository.open(open_store(bucket.url), clock=clock)
    bucket.thaws(by_looks=True)
    started = clock.monotonic_seconds()
    done = restore_thawed(repository, repository.snapshots()[0], os.fsencode(tmp_path / "back"), "standard", wait=True)
    assert isinstance(done, RestoreReport)
    assert contents(tmp_path / "back") == contents(data)
    assert 2 * 720 <= clock.monotonic_seconds() - started <= 3 * 720, "a sixtieth of 12 hours between two looks"


def test_prune_leaves_archived_packs_as_they_are_until_nobody_needs_them(bucket: Bucket, tmp_path: Path) -> None:
    old = fill(tmp_path / "old", gone=2_500_000, kept=700_000)
    repository = archived(bucket, old)
    shared = fill(tmp_path / "new")
    (shared / "kept").write_bytes((old / "kept").read_bytes())
    new = create(repository, [os.fsencode(shared)]).snapshot
    before = set(bucket.archived())
    forget.execute(repository, forget.plan(repository, ids=[repository.snapshots()[0].id]), allow_empty=True)
    policy = Policy(max_unused=0, max_delete=1, grace_seconds=0)
    report = prune(repository, policy)
    assert report.repacked == 0, "to repack, it would have to be thawed"
    left = set(bucket.archived())
    assert left < before, "what nobody needs at all goes"
    assert {name.removeprefix("footers/") for name in bucket.classes() if name.startswith("footers/")} == {
        name.rpartition("/")[2] for name in left
    }
    again = Repository.open(open_store(bucket.url))
    assert check(again).ok
    for name in left:
        bucket.thaw(name)
    done = restore_thawed(again, again.find_snapshot(new), os.fsencode(tmp_path / "back"), "standard")
    assert isinstance(done, RestoreReport)
    assert contents(tmp_path / "back") == contents(shared)


def test_lists_of_files_stay_readable_whatever_is_pruned(bucket: Bucket, tmp_path: Path) -> None:
    repository = archived(bucket, fill(tmp_path / "data", one=2_500_000, two=2_500_000))
    assert repository.state.packs.keys() - {name.rpartition("/")[2] for name in bucket.archived()}, (
        "the copy of the list"
    )
    report = prune(repository, Policy(max_unused=0, max_delete=1, grace_seconds=0))
    assert report.condemned == 0
    again = Repository.open(open_store(bucket.url))
    assert len(list(again.entries(again.snapshots()[0]))) == 3


def test_a_copy_from_archived_packs_says_what_to_do_and_goes_on_once_thawed(bucket: Bucket, tmp_path: Path) -> None:
    source = archived(bucket, fill(tmp_path / "data", one=1_500_000))
    target = Repository.create(MemoryStore("archive-copy"))
    report = copy(source, target)
    [failed] = report.failed
    assert "archived" in failed.problem
    assert "repo thaw" in failed.problem
    assert failed.files == ["one"]
    assert not target.snapshots()
    for name in bucket.archived():
        bucket.thaw(name)
    report = copy(Repository.open(open_store(bucket.url)), target)
    assert (report.copied, report.failed) == ([source.snapshots()[0].id], [])


def test_thaw_by_the_snapshot_lets_everything_else_read(bucket: Bucket, shell: Shell) -> None:
    archived(bucket, fill(shell.folder / "data", one=1_500_000))
    shell.environment |= {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    shell.environment |= {"OUTLAST_REPO": bucket.url}
    shown = shell("repo", "thaw", "latest", "--dry-run", "--json").json
    assert len(shown["thaw"]["archived"]) == len(bucket.archived())
    held = shell("check", "--data", "all").out
    assert "archived" in held
    assert "No damage found" in held
    shell("repo", "thaw", "latest", "--tier", "bulk")
    report = shell("check", "--data", "all", "--json").json
    assert (report["ok"], report["archived_packs"], report["packs_unread"]) == (True, 0, 0)
    assert "Nothing has to be thawed" in shell("repo", "thaw", "latest").out


def test_an_encrypted_repository_is_archived_and_checked_without_its_keys(bucket: Bucket, tmp_path: Path) -> None:
    data = fill(tmp_path / "data", one=2_500_000)
    made = Repository.create(open_store(bucket.url), pack_bytes=PACK_BYTES, secret=lambda: b"a secret")
    create(made, [os.fsencode(data)])
    assert check(made, data="all").ok
    made.refresh()
    archive.execute(made, archive.plan(made, ArchivePolicy("GLACIER")))
    repository = Repository.open(open_store(bucket.url), secret=lambda: b"a secret")
    assert [entry.path for entry in repository.entries(repository.snapshots()[0])] == [".", "one"]
    found = keyless.scrub(open_store(bucket.url), data="all")
    assert (found.ok, found.archived_packs) == (True, len(bucket.archived())), found.damaged
    done = restore_thawed(repository, repository.snapshots()[0], os.fsencode(tmp_path / "back"), "bulk", wait=False)
    assert isinstance(done, Thawing)
    done = restore_thawed(repository, repository.snapshots()[0], os.fsencode(tmp_path / "back"), "bulk", wait=False)
    assert isinstance(done, RestoreReport)
    assert contents(tmp_path / "back") == contents(data)


def test_a_folder_and_a_class_that_nobody_knows_are_refused(bucket: Bucket, tmp_path: Path) -> None:
    local = Repository.create(LocalStore(str(tmp_path / "repo")))
    with pytest.raises(Refused, match="storage classes"):
        archive.plan(local, ArchivePolicy("GLACIER"))
    with pytest.raises(InvalidInput, match="TAPE"):
        archive.plan(made(bucket, fill(tmp_path / "data", one=1_000)), ArchivePolicy("TAPE"))


def test_where_objects_are_locked_nothing_moves(bucket: Bucket, tmp_path: Path) -> None:
    bucket.client.create_bucket(Bucket=f"{bucket.name}-locked", ObjectLockEnabledForBucket=True)
    repository = Repository.create(open_store(f"s3://{bucket.name}-locked"), lock_days=1)
    with pytest.raises(Refused, match="locked"):
        archive.plan(repository, ArchivePolicy("GLACIER"))


@pytest.mark.parametrize("step", ["move", "commit"])
def test_an_archive_that_was_cut_short_costs_nothing_and_is_gone_on_with(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    data = fill(tmp_path / "data", one=2_500_000, two=2_500_000)
    repository = made(bucket, data)

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if step == "move":
            patched.setattr(Archive, "move", cut)
        else:
            patched.setattr(archive, "repack", cut)
        archive.execute(repository, archive.plan(repository, ArchivePolicy("GLACIER")))
    assert bucket.archived() == []
    again = Repository.open(open_store(bucket.url))
    prune(again, Policy(max_unused=0, max_delete=1, grace_seconds=0))
    assert check(again, data="all").ok
    again.refresh()
    report = archive.execute(again, archive.plan(again, ArchivePolicy("GLACIER")))
    assert report.packs == len(bucket.archived()) > 1
    last = Repository.open(open_store(bucket.url))
    assert len(list(last.entries(last.snapshots()[0]))) == 3


def test_expedited_is_refused_where_there_is_no_such_thing(bucket: Bucket, tmp_path: Path) -> None:
    repository = archived(bucket, fill(tmp_path / "data", one=1_500_000), "DEEP_ARCHIVE")
    with pytest.raises(InvalidInput, match="DEEP_ARCHIVE can't be thawed by expedited"):
        restore_thawed(repository, repository.snapshots()[0], os.fsencode(tmp_path / "back"), "expedited")


def test_packs_that_somebody_else_archived_are_no_damage(bucket: Bucket, tmp_path: Path) -> None:
    """As a lifecycle rule does it: no footer is kept beside them."""
    repository = made(bucket, fill(tmp_path / "data", one=3_500_000))
    segment = build_segment(list(repository.uncovered))
    repository.store.put(f"index/{segment_name(segment, None)}", [segment])
    [snapshot] = repository.snapshots()
    lists = repository.locate(bytes.fromhex(snapshot.manifest[0][0])).pack.name
    other = next(name for name in sorted(repository.state.packs) if name != lists)
    key = {"Bucket": bucket.name, "Key": f"models/{object_name(other)}"}
    bucket.client.copy_object(**key, CopySource=key, StorageClass="GLACIER")

    again = Repository.open(open_store(bucket.url))
    found = check(again, data="all")
    assert (found.ok, found.archived_packs) == (True, 1), found.damaged
    target = os.fsencode(tmp_path / "back")
    with pytest.raises(Archived, match="archived and not thawed"):
        execute(again, plan(again, snapshot, target))
    assert isinstance(restore_thawed(again, snapshot, target, "standard"), Thawing)
    assert isinstance(restore_thawed(again, snapshot, target, "standard"), RestoreReport)


def test_packs_alone_are_created_in_the_class_that_was_asked_for(bucket: Bucket, tmp_path: Path) -> None:
    store = open_store(bucket.url, pack_class="STANDARD_IA")
    create(Repository.create(store), [os.fsencode(fill(tmp_path / "data", one=1_000))])
    classes = {(name.partition("/")[0], kind) for name, kind in bucket.classes().items()}
    assert ("packs", "STANDARD_IA") in classes
    assert {kind for place, kind in classes if place != "packs"} == {"STANDARD"}
    with pytest.raises(InvalidInput, match="GLACIER"):
        open_store(bucket.url, pack_class="GLACIER")


def test_a_proof_needs_packs_that_were_read_once(bucket: Bucket, tmp_path: Path) -> None:
    """What was verified before it was archived is proven; what a lifecycle rule took earlier is not."""
    repository = archived(bucket, fill(tmp_path / "data", one=2_500_000))
    [kept] = repository.snapshots()
    assert prove(repository, [kept]).proven == [kept.id]
    assert kept.id in repository.state.proven

    unread = create(repository, [os.fsencode(fill(tmp_path / "more", two=3_500_000))], name="more")
    readable = create(repository, [os.fsencode(fill(tmp_path / "small", three=1_000))], name="small")
    repository.refresh()
    [manifest] = repository.find_snapshot(unread.snapshot).manifest
    lists = repository.locate(bytes.fromhex(manifest[0])).pack.name
    last = repository.locate(bytes.fromhex(repository.find_snapshot(readable.snapshot).manifest[0][0])).pack.name
    taken = repository.state.packs.keys() - repository.state.verified.keys() - {lists, last}
    for name in taken:
        key = {"Bucket": bucket.name, "Key": f"models/{object_name(name)}"}
        bucket.client.copy_object(**key, CopySource=key, StorageClass="GLACIER")
    with pytest.raises(Archived, match="never verified"):
        prove(repository, repository.snapshots())
    assert repository.state.proven.keys() == {kept.id, readable.snapshot}
    assert not repository.state.hurt
    assert taken
    assert not taken & repository.state.verified.keys()

    for name in taken:
        bucket.thaw(object_name(name))
    again = Repository.open(open_store(bucket.url))
    assert prove(again, again.snapshots()).proven == [each.id for each in again.snapshots()]
