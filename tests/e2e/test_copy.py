"""`outlast copy` as a user runs it: between stores, with two passphrases, killed, at once, and with damage."""

from __future__ import annotations

import json
import os
import random  # noqa: TID251  seeded
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from shell import PASSPHRASE, Shell
from trees import describe

from outlast.records import PackRef
from outlast.repo.pack import object_name
from outlast.repo.repository import Repository
from outlast.repo.state import FORGET
from outlast.store.layers import open_store
from outlast.store.local import LocalStore

OTHER = "a second passphrase"


def model(shell: Shell, turn: int) -> Path:
    """A folder of which most stays the same from turn to turn."""
    folder = shell.folder / "model"
    folder.mkdir(exist_ok=True)
    for number in range(6):
        seed = number if number else 100 + turn
        (folder / f"part{number}.bin").write_bytes(random.Random(seed).randbytes(150_000))
    (folder / "log").write_text("".join(f"step {step}\n" for step in range(1000 * (turn + 1))))
    if not (folder / "same.bin").exists():
        (folder / "link").symlink_to("log")
        os.link(folder / "part1.bin", folder / "same.bin")
    return folder


def back_up(shell: Shell, turns: int, *arguments: str, **environment: str) -> list[str]:
    made = []
    for turn in range(turns):
        model(shell, turn)
        made.append(shell("backup", "model", "--json", *arguments, **environment).json["snapshot"])
    return made


def assert_restores(shell: Shell, snapshot: str, *arguments: str, **environment: str) -> None:
    """The newest snapshot gives back the folder as it is now."""
    assert shell("check", "--data", "all", "--json", *arguments, **environment).json["ok"]
    target = f"back-{snapshot[:8]}"
    shell("restore", snapshot, "--to", target, "--overwrite", *arguments, **environment)
    assert describe(str(shell.folder / target)) == describe(str(shell.folder / "model"))


def listed(shell: Shell, *arguments: str, **environment: str) -> list[str]:
    return [each["id"] for each in shell("snapshots", "--json", *arguments, **environment).json]


# -- the main job --------------------------------------------------------------------------------------


def test_through_plain_and_encrypted_repositories(shell: Shell) -> None:
    """plain -> encrypted -> encrypted with another passphrase -> plain; what comes out is what went in."""
    (shell.folder / "other").write_text(OTHER + "\n")
    shell("init")
    shell("init", "--repo", "first", "--encrypt", OUTLAST_PASSPHRASE=PASSPHRASE)
    shell("init", "--repo", "second", "--encrypt", "--passphrase-file", "other")
    shell("init", "--repo", "third")
    made = back_up(shell, 2, "--tag", "a=1")
    report = shell("copy", "--from", "repo", "--to", "first", "--json", OUTLAST_PASSPHRASE=PASSPHRASE).json
    assert (report["copied"], report["skipped"], report["failed"]) == (made, [], [])
    assert {"chunks", "bytes_read", "bytes_added", "bytes_stored", "seconds"} <= report.keys()
    command = ["--from-passphrase-command", f"echo {PASSPHRASE}"]
    ran = shell("copy", "--from", "first", *command, "--to", "second", "--passphrase-file", "other")
    assert "Copied 2 snapshots to" in ran.out
    shell("copy", "--from", "second", "--repo", "third", OUTLAST_FROM_PASSPHRASE=OTHER)
    last = shell("snapshots", "--json", "--repo", "third").json
    first = shell("snapshots", "--json").json
    own = {"bytes_added": 0, "bytes_stored": 0}
    assert [{**each, **own} for each in last] == [{**each, **own} for each in first]
    assert_restores(shell, made[-1], "--repo", "third")
    again = shell("copy", "--from", "second", "--repo", "third", "--from-passphrase-file", "other")
    assert "Copied no snapshot" in again.out
    assert "There already: 2 snapshots." in again.out


@pytest.mark.parametrize("encrypted", [False, True])
def test_from_disk_to_s3_and_back(shell: Shell, s3: str, encrypted: bool) -> None:
    aws = {name: text for name, text in os.environ.items() if name.startswith("AWS_")}
    bucket = {**aws, "OUTLAST_REPO": s3} | ({"OUTLAST_PASSPHRASE": PASSPHRASE} if encrypted else {})
    shell("init")
    shell("init", *(["--encrypt"] if encrypted else []), **bucket)
    [first, second] = back_up(shell, 2)
    assert shell("copy", first, "--from", "repo", "--json", **bucket).json["copied"] == [first]
    report = shell("copy", "--from", "repo", "--json", **bucket).json
    assert (report["copied"], report["skipped"]) == ([second], [first])
    assert report["bytes_read"] < 250_000, "only what is new"
    assert_restores(shell, second, **bucket)
    shell("init", "--repo", "back", **aws)
    secret = {"OUTLAST_FROM_PASSPHRASE": PASSPHRASE} if encrypted else {}
    shell("copy", "--from", s3, "--to", "back", **aws, **secret)
    assert listed(shell, "--repo", "back") == [first, second]
    assert_restores(shell, second, "--repo", "back")


def test_a_name_or_some_snapshots_only(shell: Shell) -> None:
    shell("init")
    shell("init", "--repo", "copy")
    [a, b] = back_up(shell, 2, "--name", "one")
    [c] = back_up(shell, 1, "--name", "two")
    assert shell("copy", "--from", "repo", "--to", "copy", "--name", "two", "--json").json["copied"] == [c]
    assert shell("copy", "latest", "--from", "repo", "--to", "copy", "--name", "one", "--json").json["copied"] == [b]
    assert (
        "no snapshot is named three" in shell("copy", "--from", "repo", "--to", "copy", "--name", "three", code=1).err
    )
    shell("copy", "--from", "repo", "--to", "copy", "nonsense", code=1)
    shell("copy", "--from", "repo", "--to", "copy")
    assert listed(shell, "--repo", "copy") == [a, b, c], "by their times, whatever was copied first"
    assert shell("show", "latest", "--repo", "copy", "--json").json["id"] == c


def test_what_can_not_be_copied_is_said_in_a_sentence(filled: Shell) -> None:
    filled("init", "--repo", "sealed", "--encrypt", OUTLAST_PASSPHRASE=PASSPHRASE)
    assert (
        "are the same repository" in filled("copy", "--from", str(filled.folder / "repo"), "--to", "repo", code=21).err
    )
    assert "no repository at" in filled("copy", "--from", "repo", "--to", "nowhere", code=10).err
    assert "no repository at" in filled("copy", "--from", "nowhere", code=10).err
    assert "Set OUTLAST_PASSPHRASE" in filled("copy", "--from", "repo", "--to", "sealed", code=12).err
    ran = filled("copy", "--from", "sealed", code=12, OUTLAST_PASSPHRASE=PASSPHRASE)
    assert "Set OUTLAST_FROM_PASSPHRASE" in ran.err
    assert "opens no key" in filled("copy", "--from", "sealed", code=12, OUTLAST_FROM_PASSPHRASE="wrong").err
    ran = filled("copy", "--from", "repo", "--to", "sealed", code=21, OUTLAST_FROM_PASSPHRASE="x")
    assert "unset OUTLAST_FROM_PASSPHRASE" in ran.err
    both = ["--from-passphrase-file", "x", "--from-passphrase-command", "y"]
    assert "--from-passphrase-file and --from" in filled("copy", "--from", "sealed", *both, code=2).err
    assert "two repositories" in filled("copy", "--from", "a", "--to", "b", "--repo", "c", code=2).err
    assert "--from" in filled("copy", "--to", "sealed", code=2).err
    assert listed(filled) and listed(filled, "--repo", "sealed", OUTLAST_PASSPHRASE=PASSPHRASE) == []


def test_an_error_names_its_repository_and_its_hint_can_be_pasted(filled: Shell) -> None:
    filled("init", "--repo", "sealed", "--encrypt", OUTLAST_PASSPHRASE=PASSPHRASE)
    filled("init", "--repo", "a copy")
    place = {name: str(filled.folder / name) for name in ("repo", "sealed", "a copy", "nowhere")}

    def said(*arguments: str, code: int, **environment: str) -> str:
        return filled("copy", *arguments, code=code, **environment).err

    source, target = f"copying from {place['repo']}: ", f"copying to {place['a copy']}: "
    wrong = said("ffffffff", "--from", "repo", "--to", "a copy", code=1)
    assert source in wrong and f"`outlast snapshots --repo {place['repo']}` lists them" in wrong
    wrong = said("--name", "none", "--from", "repo", "--to", "a copy", code=1)
    assert source in wrong and f"`outlast snapshots --repo {place['repo']}`" in wrong
    wrong = said("--from", "repo", "--to", "nowhere", code=10)
    assert f"copying to {place['nowhere']}: " in wrong and f"`outlast init --repo {place['nowhere']}`" in wrong
    wrong = said("--from", "nowhere", "--to", "repo", code=10)
    assert f"copying from {place['nowhere']}: " in wrong and "Give --from" in wrong and "outlast init" not in wrong
    for environment in ({}, {"OUTLAST_FROM_PASSPHRASE": "wrong"}):
        wrong = said("--from", "sealed", "--to", "a copy", code=12, **environment)
        assert f"copying from {place['sealed']}: " in wrong and "OUTLAST_FROM_PASSPHRASE" in wrong
    wrong = said("--from", "repo", "--to", "sealed", code=12, OUTLAST_PASSPHRASE="wrong")
    assert f"copying to {place['sealed']}: " in wrong and "by OUTLAST_PASSPHRASE" in wrong
    wrong = said("--from", "repo", "--to", "repo", code=21)
    assert f"`outlast copy --from {place['repo']} --to URL`" in wrong
    assert "--from: nonsense://" in said("--from", "nonsense://x", "--to", "a copy", code=2)
    assert "--to: nonsense://" in said("--from", "repo", "--to", "nonsense://x", code=2)
    assert "Give --to" in filled("copy", "--from", "repo", code=2, without="OUTLAST_REPO").err
    log = filled.folder / "a copy" / "log"
    log.mkdir(exist_ok=True)
    (log / f"{1:020}").write_text("rubbish")
    wrong = said("--from", "repo", "--to", "a copy", code=20)
    assert target in wrong
    for command in re.findall("`(outlast [^`]*)`", wrong):
        assert f"--repo '{place['a copy']}'" in command


# -- killed, and at once --------------------------------------------------------------------------------

KILLED = textwrap.dedent(
    """
    import os, signal, sys
    import outlast.repo.write
    from outlast.cli.main import main
    from outlast.store.cloud import CloudStore
    from outlast.store.local import LocalStore

    outlast.repo.write.COMMIT_PACKS_BYTES = int(sys.argv[3])
    left = [int(sys.argv[1])]

    def killing(put):
        def count(store, name, parts):
            last = name.startswith("packs/") and left.__setitem__(0, left[0] - 1) is None and not left[0]
            if last and sys.argv[2] == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            put(store, name, parts)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
        return count

    for kind in (CloudStore, LocalStore):
        kind.put_if_absent = killing(kind.put_if_absent)
    sys.exit(main(sys.argv[4:]))
    """
)
MOMENTS = [(1, "after", 10**9), (4, "after", 10**9), (5, "before", 150_000), (5, "after", 150_000), (6, "after", 10**9)]


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize(("packs", "moment", "commit_bytes"), MOMENTS)
def test_killed_in_the_middle_it_sends_no_pack_twice(
    shell: Shell, s3: str, encrypted: bool, packs: int, moment: str, commit_bytes: int
) -> None:
    """Whatever had become durable in the bucket is used, be it in the log or not."""
    shell("init")
    secret = (lambda: PASSPHRASE.encode()) if encrypted else None
    url, target = s3, open_store(s3)
    Repository.create(target, secret=secret, pack_bytes=50_000)
    made = back_up(shell, 2)
    more = {name: text for name, text in os.environ.items() if name.startswith("AWS_")}
    more |= {"OUTLAST_PASSPHRASE": PASSPHRASE} if encrypted else {}
    script = shell.folder / "killed.py"
    script.write_text(KILLED)
    arguments = ["copy", "--from", "repo", "--to", url]
    ran = subprocess.run(
        [sys.executable, str(script), str(packs), moment, str(commit_bytes), *arguments],
        cwd=shell.folder,
        env={**shell.environment, **more},
    )
    assert ran.returncode == -signal.SIGKILL
    before = Repository.open(target, secret=secret)
    assert before.snapshots() == []
    assert not before.state.packs or commit_bytes < 10**9
    durable = chunks_by_pack(before)
    assert len(durable) >= max(packs - 4, int(moment == "after")), "as many may have been on their way"
    report = shell(*arguments, "--json", **more).json
    assert report["copied"] == made
    after = Repository.open(target, secret=secret)
    everything = chunks_by_pack(after)
    assert everything.keys() == after.state.packs.keys(), "each of them is used, and named by now"
    sent = [chunks for name, chunks in everything.items() if name not in durable]
    assert not set().union(*durable.values()) & set().union(*sent)
    assert report["chunks"] == sum(map(len, sent))
    assert_restores(shell, made[-1], "--repo", url, **more)


def chunks_by_pack(repository: Repository) -> dict[str, set[bytes]]:
    """Of all objects that are there, whether or not an entry names them."""
    found = {}
    for info in repository.store.list("packs/"):
        name = info.name.rpartition("/")[2]
        footer = repository.read_footer(PackRef(name, info.size_bytes, 0))
        found[name] = set(footer.records["id"].tolist())
    return found


FULL = textwrap.dedent(
    """
    import sys
    from outlast.cli.main import main
    from outlast.errors import StoreFull
    from outlast.store.local import LocalStore

    left, put = [1], LocalStore.put_if_absent

    def filling(store, name, parts):
        if name.startswith("log/"):
            left[0] -= 1
            if left[0] < 0:
                raise StoreFull("The disk is full.")
        put(store, name, parts)

    LocalStore.put_if_absent = filling
    sys.exit(main(sys.argv[1:]))
    """
)


def test_a_copy_that_fails_half_way_says_how_far_it_came(shell: Shell) -> None:
    shell("init")
    shell("init", "--repo", "copy")
    [first, second, third, fourth] = back_up(shell, 4)
    shell("copy", first, "--from", "repo", "--to", "copy")
    script = shell.folder / "full.py"
    script.write_text(FULL)
    arguments = ["copy", "--from", "repo", "--to", "copy", "--json"]
    ran = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=shell.folder, env=shell.environment, capture_output=True
    )
    error = json.loads(ran.stdout)["error"]
    assert (ran.returncode, error["kind"]) == (1, "store_full")
    assert f"copying to {shell.folder / 'copy'}: " in error["message"]
    assert "Of 4 snapshots 1 was copied before that, 1 was there already, 2 are left." in error["message"]
    report = shell(*arguments).json
    assert (report["skipped"], report["copied"]) == ([first, second], [third, fourth])


def test_two_processes_copy_at_once(shell: Shell) -> None:
    shell("init")
    shell("init", "--repo", "copy")
    made = back_up(shell, 4)
    argv = shell.argv("copy", "--from", "repo", "--to", "copy", "--json")
    running = [
        subprocess.Popen(argv, cwd=shell.folder, env=shell.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")
    assert listed(shell, "--repo", "copy") == made
    assert_restores(shell, made[-1], "--repo", "copy")


# -- damage in the source ---------------------------------------------------------------------------------


def test_a_damaged_chunk_is_named_and_the_rest_is_copied(shell: Shell) -> None:
    shell("init")
    shell("init", "--repo", "copy")
    [first, second] = back_up(shell, 2)
    store = LocalStore(str(shell.folder / "repo"))
    repository = Repository.open(store)
    entries = {entry.path: entry for entry in repository.entries(repository.find_snapshot(first))}
    location = repository.locate(bytes.fromhex(entries["part0.bin"].chunks[0][0]))
    name = object_name(location.pack.name)
    data = bytearray(store.get(name))
    data[location.offset + 9] ^= 1
    store.put(name, [data])
    ran = shell("copy", "--from", "repo", "--to", "copy", code=3)
    assert f"Not copied: snapshot {first[:8]} of model: pack {location.pack.name[:16]} is damaged" in ran.out
    assert "files: part0.bin\n" in ran.out
    assert "Copied 1 snapshot" in ran.out
    assert f"Left: 1 of 2 snapshots. `outlast check --data all --repo {shell.folder / 'repo'}`" in ran.out
    assert listed(shell, "--repo", "copy") == [second]
    assert_restores(shell, second, "--repo", "copy")
    report = shell("copy", "--from", "repo", "--to", "copy", "--json", code=3).json
    assert [(each["snapshot"], each["files"]) for each in report["failed"]] == [(first, ["part0.bin"])]
    assert report["skipped"] == [second]


def test_a_source_with_a_damaged_log_gives_what_it_has(shell: Shell) -> None:
    shell("init")
    shell("init", "--repo", "copy")
    [first, _, third] = back_up(shell, 3)
    (shell.folder / "repo" / "log" / f"{2:020}").chmod(0o600)
    (shell.folder / "repo" / "log" / f"{2:020}").write_bytes(b"x")
    assert "`latest` can't be told" in shell("copy", "latest", "--from", "repo", "--to", "copy", code=20).err
    assert shell("copy", first, "--from", "repo", "--to", "copy", "--json").json["copied"] == [first]
    report = shell("copy", "--from", "repo", "--to", "copy", "--json", code=3).json
    assert report["copied"] == [third]
    assert any("log entry 2" in warning for warning in report["warnings"])
    assert_restores(shell, third, "--repo", "copy")


def test_a_snapshot_that_the_target_forgot_comes_back(filled: Shell) -> None:
    filled("init", "--repo", "copy")
    filled("copy", "--from", "repo", "--to", "copy")
    [snapshot] = listed(filled, "--repo", "copy")
    Repository.open(LocalStore(str(filled.folder / "copy"))).log.append(FORGET, lambda state: {"snapshots": [snapshot]})
    report = filled("copy", "--from", "repo", "--to", "copy", "--json").json
    assert (report["copied"], report["bytes_stored"], report["bytes_read"]) == ([snapshot], 0, 0)
    assert listed(filled, "--repo", "copy") == [snapshot]
