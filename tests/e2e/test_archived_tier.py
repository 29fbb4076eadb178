"""A tier that archives what is old: the agent proves and moves packs, and a restore by configuration thaws them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from shell import Shell
from test_archive import Bucket, contents, fill

from outlast.agent import once
from outlast.backup.create import create
from outlast.clock import SYSTEM_CLOCK, ManualClock
from outlast.config import load
from outlast.errors import Archived
from outlast.events import ListSink
from outlast.repo import footers
from outlast.repo.pack import object_name
from outlast.repo.prove import prove
from outlast.repo.repository import Repository
from outlast.store.base import ObjectStore
from outlast.store.layers import open_store
from outlast.tiers.jobs import jobs
from outlast.tiers.places import Places
from servers import S3_ENVIRONMENT, MotoServer

pytestmark = pytest.mark.server

CONFIG = """
storage_tiers:
  hot: {{type: nvme_ssd, url: ./hot}}
  far: {{url: "{url}", archive: {{class: DEEP_ARCHIVE, after: 1 s}}, sync: {{mode: sync}}}}
sources:
  models: {{paths: [./models]}}
policies:
  drill: off
  prices:
    currency: EUR
    DEEP_ARCHIVE: {{standard: {{hours: 13, per_gb: 0, per_1000_requests: 1000}}}}
"""
DAY_SECONDS = 86_400


@pytest.fixture
def bucket(moto_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    import boto3

    for key, text in S3_ENVIRONMENT.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_server.url)
    made = Bucket(moto_server, boto3.client("s3", region_name="us-east-1"))
    yield made
    made.thaws(by_looks=False)


def agent_in(shell: Shell, days: int) -> list[str]:
    """What `outlast agent --once` does so many days from now. Proofs before archiving wait for midnight."""
    clock = ManualClock(now_ns=SYSTEM_CLOCK.now_ns() + days * DAY_SECONDS * 10**9)
    sink = ListSink()

    def opened(store: ObjectStore) -> Repository:
        return Repository.open(store, clock=clock)

    policy = load(str(shell.folder / "outlast.yaml")).policy
    places = Places(policy, lambda tier: open_store(tier.url), opened, clock)
    once(jobs(policy, places, sink, one_thread=True), clock)
    assert not [event.reason for event in sink.events if event.kind == "job.failed" or event.fields.get("problems")]
    return [event.reason.partition(":")[0] for event in sink.events if event.kind == "job.done"]


@pytest.fixture
def team(shell: Shell, bucket: Bucket) -> Shell:
    """Two tiers, and a backup of three days ago in both; now its packs are old enough, as the bucket counts."""
    shell.environment |= {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    del shell.environment["OUTLAST_REPO"]
    (shell.folder / "outlast.yaml").write_text(CONFIG.format(url=bucket.url))
    fill(shell.folder / "models", one=1_500_000, two=1_500_000)
    shell("init", "--config", "outlast.yaml")
    assert agent_in(shell, -3) == ["backup of models in hot", "copy in far", "prove in hot"]
    assert bucket.archived() == [], "not proven there yet"
    SYSTEM_CLOCK.sleep(1.1)
    return shell


def test_an_agent_archives_what_it_has_proven_and_a_restore_by_configuration_thaws_it(
    team: Shell, bucket: Bucket
) -> None:
    done = team("agent", "--once", "--json").json
    assert ("prove", "far") in [(each["kind"], each["tier"]) for each in done["done"]]
    first = set(bucket.archived())
    assert first
    assert {kind for name, kind in bucket.classes().items() if not name.startswith("packs/")} == {"STANDARD"}
    assert bucket.classes()[min(first)] == "DEEP_ARCHIVE"

    fill(team.folder / "models", three=1_000_000)
    assert agent_in(team, 1)[:2] == ["backup of models in hot", "copy in far"], "on top of what can't be read there"
    SYSTEM_CLOCK.sleep(1.1)
    assert agent_in(team, 2)[-1] == "prove in far"
    assert first < set(bucket.archived()), "what is new is proven and archived as well"
    far = Repository.open(open_store(bucket.url))
    assert list(far.state.proven) == list(far.state.snapshots)[:-1], "all but that of just now"
    assert not far.state.hurt
    assert not far.state.damaged

    team("restore", "latest", "--to", "from-hot")
    assert contents(team.folder / "from-hot") == contents(team.folder / "models")
    assert "thaw" not in team("restore", "latest", "--to", "back", "--dry-run", "--json").json
    shutil.rmtree(team.folder / "hot")
    refused = team("restore", "latest", "--to", "back", code=21)
    assert "are archived" in refused.err
    assert "`--thaw standard` starts it" in refused.err
    planned = team("restore", "latest", "--to", "back", "--dry-run", "--json").json["thaw"]
    needed = len(planned["archived"])
    assert needed > 1
    assert planned["currency"] == "EUR"
    standard = next(way for way in planned["ways"] if way["tier"] == "standard")
    assert standard["hours"] == 13
    assert standard["cost"] == pytest.approx(needed, rel=0.01), "a request costs 1 EUR"
    bucket.thaws(by_looks=True)
    for _ in range(2):
        waiting = team("restore", "latest", "--to", "back", "--thaw", "standard", "--json", code=3).json
        assert waiting["hours"] == 13
    team("restore", "latest", "--to", "back", "--thaw", "standard")
    assert contents(team.folder / "back") == contents(team.folder / "models")
    team("restore", "latest", "--to", "again")
    assert contents(team.folder / "again") == contents(team.folder / "models"), "what has thawed is read like any other"


def test_what_another_tier_has_is_not_thawed_and_what_is_archived_is_no_damage(team: Shell, bucket: Bucket) -> None:
    team("agent", "--once")
    [far] = {each.id for each in Repository.open(open_store(bucket.url)).snapshots()[:1]}
    shutil.rmtree(team.folder / "hot")
    team("init", "--config", "outlast.yaml")
    team("--repo", "hot", "backup", "models/one")
    planned = team("restore", far, "--to", "back", "--dry-run", "--json").json
    assert [source["bytes"] for source in planned["sources"]] == [1_500_000, 1_500_000]
    assert len(planned["thaw"]["archived"]) == 1
    told = team("restore", far, "--to", "back", "--include", "two", code=21)
    assert "--thaw" in told.err
    team("restore", far, "--to", "back", "--include", "one")
    assert (team.folder / "back" / "one").read_bytes() == (team.folder / "models" / "one").read_bytes()

    told = team("agent", "--once", code=3)
    assert "copy in hot: failed, and is tried again in 60 s: far can't give them now." in told.out + told.err
    assert not Repository.open(open_store(bucket.url)).state.hurt


def test_an_archived_pack_that_was_never_read_proves_nothing_and_is_not_noted(bucket: Bucket, tmp_path: Path) -> None:
    """As where a lifecycle rule archives on its own."""
    repository = Repository.create(open_store(bucket.url), pack_bytes=1 << 20)
    create(repository, [os.fsencode(fill(tmp_path / "data", one=3_500_000))])
    [snapshot] = repository.snapshots()
    lists = repository.locate(bytes.fromhex(snapshot.manifest[0][0])).pack.name
    other = next(name for name in sorted(repository.state.packs) if name != lists)
    footers.keep(repository.store, repository.state.packs[other])
    key = {"Bucket": bucket.name, "Key": f"models/{object_name(other)}"}
    bucket.client.copy_object(**key, CopySource=key, StorageClass="GLACIER")

    repository = Repository.open(open_store(bucket.url))
    with pytest.raises(Archived, match="never verified"):
        prove(repository, repository.snapshots())
    state = Repository.open(open_store(bucket.url)).state
    assert other not in {**state.verified, **state.damaged}
    bucket.thaw(object_name(other))
    assert prove(Repository.open(open_store(bucket.url)), [snapshot]).proven == [snapshot.id]
