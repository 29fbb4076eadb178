"""The rescue program, which knows only the format page, reads what the real command line writes, without Outlast."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shell import PASSPHRASE, Shell
from trees import describe

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src" / "outlast" / "rescue.py"
GOLDEN = HERE.parent / "formats" / "v1"
GUARDED = """
import runpy, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BANNED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Guard())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Rescue:
    """Runs a copy of the program outside the tree, isolated, where `import outlast` fails."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "elsewhere" / "rescue.py"
        self.program.parent.mkdir()
        shutil.copy(SOURCE, self.program)

    def __call__(self, *arguments: Path | str, code: int = 0, banned: str = "outlast", passphrase: str = "") -> str:
        guard = GUARDED.replace("BANNED", repr(banned.split()))
        environment = {name: text for name, text in os.environ.items() if not name.startswith(("OUTLAST_", "PYTHON"))}
        ran = subprocess.run(
            [sys.executable, "-I", "-c", guard, str(self.program), *map(str, arguments)],
            env=environment | ({"OUTLAST_PASSPHRASE": passphrase} if passphrase else {}),
            cwd=self.program.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
        text = ran.stdout.decode() + ran.stderr.decode()
        assert ran.returncode == code, text
        assert "Traceback" not in text
        return text


@pytest.fixture
def rescue(tmp_path: Path) -> Rescue:
    return Rescue(tmp_path)


def make_tree(root: Path) -> None:
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty folder").mkdir(mode=0o750)
    (root / "deep" / "er" / "note.txt").write_text("a line\n" * 5000)
    (root / "nothing").touch()
    (root / "noise.bin").write_bytes(np.random.default_rng(1).bytes(5_000_000))
    (root / "many").mkdir()
    for number in range(200):
        (root / "many" / f"{number}.txt").write_text(f"{number}\n" * number)
    for kind in ("f2", "f4", "f8"):
        values = np.random.default_rng(2).normal(size=100_003).astype(kind)
        np.save(root / f"{kind}.npy", values)
    for name in (b"odd \xff\xfe", b"new\nline", b"50% off %41", "\u00fcml\u00e4ut".encode()):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(b"content of " + name)
    for name, runs, size in (
        ("sparse", [(0, b"start"), (1 << 20, b"middle" * 999)], 4 << 20),
        ("sparse.small", [(0, b"x" * 4096), (20480, b"y" * 4096)], 40960),
        ("sparse.void", [], 1 << 20),
    ):
        with open(root / name, "wb") as file:
            for offset, data in runs:
                file.seek(offset)
                file.write(data)
            file.truncate(size)
    os.link(root / "noise.bin", root / "deep" / "noise again")
    os.symlink("deep/er/note.txt", root / "link")
    os.symlink(b"/nowhere/\xff%", os.path.join(os.fsencode(root), b"dangling"))
    os.mkfifo(root / "pipe", 0o640)
    os.chmod(root / "nothing", 0o400)
    os.chmod(root / "deep" / "er", 0o555)
    os.utime(root / "nothing", ns=(0, -1_000_000_001))
    os.utime(root / "link", ns=(1, 1_234_567_890_123_456_789), follow_symlinks=False)
    os.utime(root / "deep", ns=(1, 1_500_000_000_000_000_001))


def facts(root: Path) -> tuple[object, object, object]:
    """What `describe` says, the mtimes of symlinks, and which names are one file."""
    names = {path: found[:4] for path, found in describe(str(root)).items()}
    status = {path: os.lstat(os.path.join(os.fsencode(root), path)) for path in names}
    links = {path: each.st_mtime_ns for path, each in status.items() if stat.S_ISLNK(each.st_mode)}
    same: dict[int, set[bytes]] = {}
    for path, each in status.items():
        same.setdefault(each.st_ino, set()).add(path)
    return names, links, {frozenset(paths) for paths in same.values()}


def make_repository(tmp_path: Path, encrypted: bool) -> tuple[Shell, str]:
    make_tree(tmp_path / "tree")
    shell = Shell(tmp_path)
    passphrase = PASSPHRASE if encrypted else ""
    shell.environment |= {"OUTLAST_PASSPHRASE": passphrase} if encrypted else {}
    shell("init", *(["--encrypt"] if encrypted else []))
    shell("backup", "tree")
    return shell, passphrase


def pack_with(repository: Path, content: bytes) -> tuple[Path, int]:
    """The pack that holds these bytes as they are, and where."""
    for path in sorted(repository.glob("packs/*/*")):
        at = path.read_bytes().find(content)
        if at >= 0:
            return path, at
    raise AssertionError("no pack has it")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.mark.parametrize("form", ["plain", "encrypted"])
def test_it_reads_the_golden_repositories(form: str, tmp_path: Path, rescue: Rescue) -> None:
    passphrase = PASSPHRASE if form == "encrypted" else ""
    listed = rescue(GOLDEN / form, passphrase=passphrase).splitlines()
    golden, second = listed
    assert "  golden  9  558414" in golden
    assert "  second  1  48000" in second
    rescue(GOLDEN / form, golden.split()[0][:12], tmp_path / "back", passphrase=passphrase)
    found = {
        os.fsencode(path.relative_to(tmp_path / "back")).hex(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "back").rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    assert found == json.loads((GOLDEN / "contents.json").read_text())


@pytest.mark.parametrize("encrypted", [False, True])
def test_it_restores_what_the_command_line_restores(encrypted: bool, tmp_path: Path, rescue: Rescue) -> None:
    shell, passphrase = make_repository(tmp_path, encrypted)
    before = facts(tmp_path / "tree")
    os.unlink(tmp_path / "tree" / "noise.bin")
    shell("backup", "tree")
    oldest, newest = (item["id"] for item in shell("snapshots", "--json").json)
    repository = shutil.move(tmp_path / "repo", tmp_path / "away")
    for derived in ("index", "state", "tmp"):
        shutil.rmtree(tmp_path / "away" / derived, ignore_errors=True)
    text = rescue(repository, oldest, tmp_path / "one", passphrase=passphrase)
    assert "restored, every chunk verified" in text
    assert facts(tmp_path / "one") == before
    rescue(repository, "latest", tmp_path / "two", passphrase=passphrase)
    assert facts(tmp_path / "two") == facts(tmp_path / "tree")
    assert (tmp_path / "one" / "sparse").stat().st_blocks * 512 < 1 << 20
    assert [line.split()[0] for line in rescue(repository, passphrase=passphrase).splitlines()] == [oldest, newest]


def test_a_damaged_chunk_costs_its_file_alone(tmp_path: Path, rescue: Rescue) -> None:
    make_repository(tmp_path, encrypted=False)
    wanted = (tmp_path / "tree" / "noise.bin").read_bytes()
    flip(*pack_with(tmp_path / "repo", wanted[:100]))
    text = rescue(tmp_path / "repo", "latest", tmp_path / "back", code=1)
    lost = {line.split(": ")[0].removeprefix("LOST ") for line in text.splitlines() if line.startswith("LOST ")}
    assert lost == {"noise.bin", "deep/noise again"}
    found, expected = facts(tmp_path / "back")[0], facts(tmp_path / "tree")[0]
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    rest = {path for path in expected if os.fsdecode(path) not in lost}
    (damaged,) = found.keys() - rest
    assert {path: found[path] for path in rest} == {path: expected[path] for path in rest}
    left = (tmp_path / "back" / os.fsdecode(damaged)).read_bytes()
    assert damaged.endswith(b".damaged")
    assert len(left) == len(wanted)
    assert left[-100:] == wanted[-100:]
    assert left[:100] == bytes(100)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_pack_cut_short_is_named_and_the_rest_restored(encrypted: bool, tmp_path: Path, rescue: Rescue) -> None:
    shell, passphrase = make_repository(tmp_path, encrypted)
    largest = max((tmp_path / "repo").glob("packs/*/*"), key=lambda path: path.stat().st_size)
    (tmp_path / "tree" / "late.bin").write_bytes(np.random.default_rng(9).bytes(300_000))
    shell("backup", "tree")
    largest.chmod(0o600)
    os.truncate(largest, largest.stat().st_size - 1)
    text = rescue(tmp_path / "repo", "latest", tmp_path / "back", code=1, passphrase=passphrase)
    assert f"{largest.name}: it is cut short" in text
    assert "LOST noise.bin: " in text
    assert "LOST a part of the manifest" not in text
    assert (tmp_path / "back" / "late.bin").read_bytes() == (tmp_path / "tree" / "late.bin").read_bytes()


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_broken_log_is_named_and_what_is_left_used(encrypted: bool, tmp_path: Path, rescue: Rescue) -> None:
    shell, passphrase = make_repository(tmp_path, encrypted)
    shell("backup", "tree")
    entries = sorted((tmp_path / "repo" / "log").iterdir())
    flip(entries[0], 200)
    text = rescue(tmp_path / "repo", passphrase=passphrase, code=1)
    assert f"log/{entries[0].name}: " in text
    assert f"log/{entries[1].name}: the chain is broken" in text
    os.unlink(entries[0])
    text = rescue(tmp_path / "repo", "latest", tmp_path / "back", passphrase=passphrase, code=1)
    assert "the chain is broken" in text
    assert "LOST" not in text
    assert facts(tmp_path / "back") == facts(tmp_path / "tree")


def test_wrong_uses_and_wrong_passphrases_are_told(tmp_path: Path, rescue: Rescue) -> None:
    assert "python rescue.py REPO" in rescue(code=2)
    assert "python rescue.py REPO" in rescue(tmp_path / "nowhere", code=2)
    assert "SNAPSHOT must name one" in rescue(GOLDEN / "plain", "ffff", tmp_path / "back", code=2)
    assert "TARGET must not exist or be empty" in rescue(GOLDEN / "plain", "latest", tmp_path, code=2)
    assert "this passphrase is wrong" in rescue(GOLDEN / "encrypted", passphrase="wrong", code=1)
    assert "pip install blake3" in rescue(GOLDEN / "plain", banned="outlast blake3", code=1)


def test_plain_repositories_need_no_cryptography(tmp_path: Path, rescue: Rescue) -> None:
    told = rescue(GOLDEN / "plain", "latest", tmp_path / "back", banned="outlast cryptography")
    assert "every chunk verified" in told
    assert any((tmp_path / "back").iterdir())


def test_it_stays_one_short_file_that_stands_alone() -> None:
    text = SOURCE.read_text()
    assert len(text.splitlines()) < 380
    allowed = set(sys.stdlib_module_names) - {"pickle", "marshal", "shelve"} | {"blake3", "zstandard", "cryptography"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {name.name.split(".")[0] for name in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert (node.module or "").split(".")[0] in allowed
