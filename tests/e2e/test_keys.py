"""Several passphrases for one repository, and keys that are changed in place: from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from shell import Shell

FIRST = {"OUTLAST_PASSPHRASE": "the first of all"}
SECOND = {"OUTLAST_PASSPHRASE": "a second one"}


@pytest.fixture
def vault(shell: Shell) -> Shell:
    """An encrypted repository with one snapshot."""
    (shell.folder / "data").mkdir()
    (shell.folder / "data" / "file").write_bytes(b"weights" * 1000)
    shell("init", "--encrypt", **FIRST)
    shell("backup", "data", **FIRST)
    return shell


def slots(shell: Shell) -> list[str]:
    return sorted(path.name for path in (shell.folder / "repo" / "keys").iterdir())


def restores(shell: Shell, passphrase: dict[str, str], to: str, snapshots: int) -> None:
    checked = shell("check", "--data", "all", "--json", **passphrase).json
    assert (checked["ok"], checked["snapshots"]) == (True, snapshots)
    shell("restore", "latest", "--to", to, **passphrase)
    want = {path.name: path.read_bytes() for path in (shell.folder / "data").iterdir()}
    assert {path.name: path.read_bytes() for path in (shell.folder / to).iterdir()} == want


def test_another_passphrase_opens_everything_until_it_is_removed(vault: Shell) -> None:
    added = vault("key", "add", "--label", "the night shift", OUTLAST_NEW_PASSPHRASE="a second one", **FIRST)
    assert "Added the key" in added.out
    restores(vault, SECOND, "by second", 1)
    listed = vault("key", "list", "--json", **SECOND).json
    assert listed["epoch"] == 1
    own, other = sorted(listed["keys"], key=lambda key: not key["opened"])
    assert (own["label"], own["epoch"], own["opened"]) == ("the night shift", 1, True)
    assert (other["label"], other["epoch"], other["opened"]) == ("", 1, False)
    text = vault("key", "list", **SECOND).out
    assert "the night shift  your passphrase" in text

    assert f"Removed the key {own['id'][:8]}" in vault("key", "remove", own["id"][:8], **FIRST).out
    vault("snapshots", code=12, **SECOND)
    restores(vault, FIRST, "by first", 1)
    assert slots(vault) == [other["id"]]


def test_the_last_key_is_not_removed(vault: Shell) -> None:
    [only] = slots(vault)
    ran = vault("key", "remove", only[:8], code=21, **FIRST)
    assert "no other key" in ran.err and "outlast key add" in ran.err
    assert slots(vault) == [only]
    restores(vault, FIRST, "back", 1)


def test_a_damaged_key_counts_for_nothing_and_can_be_removed(vault: Shell) -> None:
    [only] = slots(vault)
    (vault.folder / "repo" / "keys" / ("0" * 32)).write_text("rubbish")
    assert "damaged" in vault("key", "list", **FIRST).out
    vault("key", "remove", only, code=21, **FIRST)
    vault("key", "remove", "0000", **FIRST)
    assert slots(vault) == [only]


def test_removing_the_key_in_use_says_what_that_means(vault: Shell) -> None:
    [first] = slots(vault)
    vault("key", "add", OUTLAST_NEW_PASSPHRASE="a second one", **FIRST)
    ran = vault("key", "remove", first, "--json", **FIRST)
    assert ran.json["removed"] == first
    assert "opens the repository no more" in ran.json["warnings"][0]
    vault("snapshots", code=12, **FIRST)
    restores(vault, SECOND, "back", 1)


def test_rotation_seals_all_new_data_with_a_new_key(vault: Shell) -> None:
    [before] = slots(vault)
    report = vault("key", "rotate", "--json", **FIRST).json
    assert (report["epoch"], report["replaced"], report["left_behind"]) == (2, [before], [])
    assert slots(vault) == [report["key"]]
    restores(vault, FIRST, "old", 1)
    packs = set((vault.folder / "repo" / "packs").rglob("*/*"))
    (vault.folder / "data" / "new").write_bytes(b"more" * 1000)
    vault("backup", "data", **FIRST)
    restores(vault, FIRST, "new", 2)
    fresh = set((vault.folder / "repo" / "packs").rglob("*/*")) - packs
    assert fresh and {epoch(path) for path in fresh} == {2}
    assert {epoch(path) for path in packs} == {1}
    [listed] = vault("key", "list", "--json", **FIRST).json["keys"]
    assert (listed["epoch"], listed["notes"]) == (2, ["your passphrase"])


def test_a_rotation_says_what_is_protected_and_what_is_not(vault: Shell) -> None:
    text = vault("key", "rotate", **FIRST).out
    assert "Everything stored from now on is sealed with data key 2." in text
    assert "What was stored before stays sealed with the older data keys" in text
    assert "`outlast prune --max-unused 0%` seals with data key 2" in text
    (old,) = (vault.folder / "repo" / "packs").rglob("*/*")
    vault("prune", "--max-unused", "0%", "--grace", "0", **FIRST)
    assert epoch(old) == 1, "needed whole, so it stays as it is"
    (vault.folder / "data" / "file").unlink()
    (vault.folder / "data" / "other").write_bytes(b"a small one")
    vault("backup", "data", **FIRST)
    vault("forget", "--keep-last", "1", **FIRST)
    vault("prune", "--max-unused", "0%", "--grace", "0", "--max-delete", "100%", **FIRST)
    left = [path for path in (vault.folder / "repo" / "packs").rglob("*/*") if path.is_file()]
    assert left and {epoch(path) for path in left} == {2}


def epoch(pack: Path) -> int:
    return int.from_bytes(pack.read_bytes()[12:16], "little")


def test_a_passphrase_from_before_a_rotation_is_told_so(vault: Shell) -> None:
    """A passphrase from before it is told what happened, and never that anything is damaged."""
    vault("key", "add", OUTLAST_NEW_PASSPHRASE="a second one", **FIRST)
    vault("key", "rotate", **FIRST)
    vault("backup", "data", **FIRST)
    for command in (["snapshots"], ["check"], ["backup", "data"], ["key", "list"]):
        ran = vault(*command, code=12, **SECOND)
        assert "from before a rotation" in ran.err and "outlast key add" in ran.err
        assert "corrupt" not in ran.err.lower() and "damaged" not in ran.err


def test_those_left_behind_are_named_and_come_back_by_being_added_again(vault: Shell) -> None:
    second = vault("key", "add", "--label", "bob", "--json", OUTLAST_NEW_PASSPHRASE="a second one", **FIRST)
    old = second.json["key"]
    rotated = vault("key", "rotate", **FIRST)
    assert f"{old[:8]} (bob)" in rotated.err and "outlast key add" in rotated.err
    assert "from before a rotation" in vault("key", "list", **FIRST).out
    [own] = set(slots(vault)) - {old}
    vault("key", "remove", own, code=21, **FIRST)  # what is left could not read what is stored from now on
    again = vault("key", "add", "--json", OUTLAST_NEW_PASSPHRASE="a second one", **FIRST).json
    assert again["replaced"] == [old]
    assert sorted(slots(vault)) == sorted([own, again["key"]])
    restores(vault, SECOND, "back", 1)
    vault("key", "remove", own, **SECOND)


def test_what_makes_no_sense_is_refused_with_nothing_changed(vault: Shell) -> None:
    before = slots(vault)
    new = {"OUTLAST_NEW_PASSPHRASE": "new"}
    assert "already" in vault("key", "add", code=21, OUTLAST_NEW_PASSPHRASE="the first of all", **FIRST).err
    assert "empty" in vault("key", "add", code=2, OUTLAST_NEW_PASSPHRASE="", **FIRST).err
    assert "OUTLAST_NEW_PASSPHRASE" in vault("key", "add", code=12, **FIRST).err
    assert "200 characters" in vault("key", "add", "--label", "x" * 201, code=2, **new, **FIRST).err
    both = ["--new-passphrase-file", "a", "--new-passphrase-command", "b"]
    assert "both given" in vault("key", "add", *both, code=2, **FIRST).err
    assert "no key" in vault("key", "remove", "ffff", code=1, **FIRST).err
    assert "too short" in vault("key", "remove", before[0][:3], code=2, **FIRST).err
    assert slots(vault) == before
    vault("key", "rotate", code=12)
    vault("key", "remove", before[0], code=12, OUTLAST_PASSPHRASE="wrong", **new)


def test_a_repository_in_the_clear_has_no_keys(filled: Shell) -> None:
    for command in (["list"], ["add"], ["remove", "abcd"], ["rotate"]):
        ran = filled("key", *command, code=21, OUTLAST_NEW_PASSPHRASE="new")
        assert "is not encrypted" in ran.err
    assert not (filled.folder / "repo" / "keys").exists()


def test_the_new_passphrase_comes_from_a_file_or_a_command(vault: Shell) -> None:
    (vault.folder / "secret").write_text("from a file\n")
    vault("key", "add", "--new-passphrase-file", "secret", **FIRST)
    vault("key", "add", "--new-passphrase-command", "echo from a command", **FIRST)
    for passphrase in ("from a file", "from a command"):
        assert len(vault("snapshots", "--json", OUTLAST_PASSPHRASE=passphrase).json) == 1
