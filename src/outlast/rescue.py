"""Lists and restores the snapshots of an Outlast repository, when Outlast itself is gone; FORMAT.md beside it says how.

    python rescue.py REPO                     list the snapshots: id, time, name, files, bytes
    python rescue.py REPO SNAPSHOT TARGET     restore one (`latest`, an id or its start) into a new or empty folder

REPO is a folder, and nothing is written into it. If the repository is in a bucket, copy it to a folder first with any
S3 tool, for example `aws s3 sync s3://BUCKET/PREFIX FOLDER`. The passphrase of an encrypted repository comes from the
environment variable OUTLAST_PASSPHRASE, or is asked for. Damage is named on stderr, and the rest is restored; what is
left of a file that lost chunks is kept as NAME.damaged, with zeros for what is lost. Exit codes: 0 all is right,
1 something is damaged or not restored, 2 wrong usage. Needs: python -m pip install blake3 zstandard 'cryptography>=44'
"""

import getpass
import hmac
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

CHUNK_LIMIT = 32 << 20  # plain bytes of a chunk
HEADS = (b"OUTLPACK\x01\0\0\0", b"OUTLPACK\x01\0\x01\0")  # magic, version, flags of packs: plain, encrypted
TRAILER = struct.Struct("<64sIIQ32s8s8s")  # header, records, base ids, offset of the table, hash, magic, zeros
RECORD = struct.Struct("<32s32sQIIB3x")  # chunk id, hash of the stored bytes, offset, stored, plain, codec
Damaged = ValueError  # raised for what is not as it should be; JSON of another shape gives other errors of FAULTS
FAULTS = (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, struct.error)


def shown(text: object) -> str:  # safe to print
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


def blake3(data: bytes, key: bytes | None = None) -> bytes:
    from blake3 import blake3

    return (blake3(data, key=key) if key else blake3(data)).digest()


def decrypt(key: bytes, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(nonce, sealed, associated)
    except InvalidTag:
        raise Damaged("its seal is broken") from None


def unzstd(data: bytes, plain: int) -> bytes:
    import zstandard

    try:
        if zstandard.frame_content_size(data) != plain:  # it is what `decompress` allocates
            raise Damaged("a zstd frame has a wrong size")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Damaged(f"zstd: {error}") from None


def unplane(data: bytes, plain: int) -> bytes:  # byte planes
    width = data[0]
    parts = {2: (1, 1), 4: (2, 1, 1), 8: (4, 2, 1, 1)}[width]
    count, result = plain // width, bytearray(plain // width * width)
    at, first = 1 + 5 * len(parts), 0
    for number, part in enumerate(parts):
        form, stored = struct.unpack_from("<BI", data, 1 + 5 * number)
        plane = data[at : at + stored]
        plane = unzstd(plane, count * part) if form == 1 else plane
        if form > 1 or len(plane) != count * part:
            raise Damaged("a byte plane has a wrong form or size")
        for k in range(part):
            result[first + k :: width] = plane[k::part]
        at, first = at + stored, first + part
    return bytes(result) + data[at:]


def add(total: bytes, folded: bytes, width: int) -> bytes:  # all elements at once, as digits of long numbers
    every = (1 << 8 * width) - 1
    ones = int.from_bytes((1).to_bytes(width, "little") * (len(total) // width), "little")
    top = ones << (8 * width - 1)
    low = (ones * every) ^ top
    one, two = int.from_bytes(total, "little"), int.from_bytes(folded, "little")
    two = ((two >> 1) & low) ^ ((two & ones) * every)
    return (((one & low) + (two & low)) ^ ((one ^ two) & top)).to_bytes(len(total), "little")


def parse(data: bytes) -> dict[str, Any]:
    if data[-76:] != b',"hash":"' + blake3(data[:-76]).hex().encode() + b'"}\n':
        raise Damaged("its hash is wrong")
    return dict(json.loads(data))


class Repository:
    def __init__(self, root: Path) -> None:
        self.root, self.problems, self.id = root, 0, b""
        self.id_key: bytes | None = None  # None: not encrypted
        self.epochs: dict[int, bytes] = {}
        self.places: dict[bytes, list[tuple[Path, bytes, bytes]]] = {}  # chunk id -> pack, its header, record

    def complain(self, message: str) -> None:
        self.problems += 1
        print(message, file=sys.stderr)

    def read_format(self) -> bytes:
        """Read `format` and the keys. Gives the hash of `format`, empty if there is none."""
        form, digest, slots = None, b"", sorted(self.root.glob("keys/" + "?" * 32))
        try:
            digest = blake3(data := (self.root / "format").read_bytes())
            form = parse(data)
        except FAULTS as error:
            self.complain(f"format: {shown(error)}; going on without it")
        if form and (form["magic"] != "outlast repository" or form["version"] != 1 or set(form["features"]) - {"sums"}):
            sys.exit("`format` is of a version or has a feature that this program does not know")
        if form["encryption"] if form else slots:
            keys = self.unlock(slots)
            if form and (form["id"], digest.hex()) != (keys["repository"], keys["format"]):
                sys.exit("`format` is not the one that the keys were made for")
            self.id, self.id_key = bytes.fromhex(keys["repository"]), bytes.fromhex(keys["id_key"])
            self.epochs = {int(epoch): bytes.fromhex(key) for epoch, key in keys["epochs"].items()}
        return digest

    def unlock(self, slots: list[Path]) -> dict[str, Any]:
        from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

        passphrase = os.environ.get("OUTLAST_PASSPHRASE") or getpass.getpass("Passphrase: ")
        found, closed = [], []
        for path in slots:
            try:
                slot = parse(path.read_bytes())
                memory, rounds, lanes, salt = (slot[key] for key in ("memory_kib", "iterations", "lanes", "salt"))
                if slot["kdf"] != "argon2id" or memory > 1 << 20 or rounds > 64 or lanes > 64:
                    raise Damaged("its parameters are unknown or out of bounds")
                kdf = Argon2id(salt=bytes.fromhex(salt), length=32, iterations=rounds, lanes=lanes, memory_cost=memory)
                key = kdf.derive(passphrase.encode("utf-8", "surrogateescape"))
                found.append(json.loads(decrypt(key, bytes(12), bytes.fromhex(slot["wrapped"]), b"outlast key 1")))
            except FAULTS as error:
                closed.append(f"keys/{path.name} does not open: {shown(error)}")
        epochs = {epoch: key for keys in found for epoch, key in keys["epochs"].items()}
        return dict(found[0], epochs=epochs) if found else sys.exit("\n".join(["this passphrase is wrong", *closed]))

    def derive(self, head: bytes, info: bytes) -> bytes:
        epoch, salt = struct.unpack("<12xI32s", head[:48])  # of a pack's header or a sealed object's head
        if epoch not in self.epochs:
            raise Damaged(f"there is no key of epoch {epoch}")
        return hmac.digest(hmac.digest(salt, self.epochs[epoch], "sha256"), info + b"\x01", "sha256")  # HKDF

    def unseal(self, name: str, data: bytes) -> bytes:
        head = data[:48]
        if head[:12] != b"OUTLSEAL\x01\0\0\0":
            raise Damaged("it is not a sealed object")
        return decrypt(self.derive(head, b"outlast object 1"), bytes(12), data[48:], head + self.id + name.encode())

    def snapshots(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}  # by id
        hashes = {0: self.read_format()}  # of the entries that are not damaged; `format` stands before the first
        for path in filter(Path.is_file, sorted(self.root.glob("log/" + "[0-9]" * 20))):
            name, seq = f"log/{path.name}", int(path.name)
            try:
                data = path.read_bytes()
                entry = parse(data if self.id_key is None else self.unseal(name, data))
                hashes[seq] = blake3(data)
                if entry["seq"] != seq or entry["prev_hash"] != hashes.get(seq - 1, b"").hex():
                    self.complain(f"{name}: the chain is broken: what is before it is missing, damaged or replaced")
                if entry["kind"] == "snapshot":
                    found[str(entry["body"]["snapshot"]["id"])] = dict(entry["body"]["snapshot"])
                for forgotten in entry["body"]["snapshots"] if entry["kind"] == "forget" else []:
                    found.pop(forgotten, None)
            except FAULTS as error:
                self.complain(f"{name}: {shown(error)}; what it says is lost")
        return found

    def find_packs(self) -> None:
        for path in filter(Path.is_file, sorted(self.root.glob("packs/??/" + "?" * 64))):
            try:
                self.add_pack(path)
            except FAULTS as error:
                self.complain(f"{shown(path)}: {shown(error)}")

    def add_pack(self, path: Path) -> None:
        """Read a pack's footer. As every chunk is checked when it is read, a damaged one may serve, too."""
        with path.open("rb") as file:
            end = file.seek(max(0, path.stat().st_size - TRAILER.size))
            trailer = file.read()
            header, records, bases, at, digest, magic, zeros = TRAILER.unpack(trailer.rjust(TRAILER.size))
            table_bytes = records * RECORD.size
            if magic != b"OUTLFOOT" or bases or at + table_bytes != end:
                raise Damaged("it is cut short, or its footer is damaged or of another version: its chunks are lost")
            file.seek(at)
            table = file.read(table_bytes)
            file.seek(0)
            front = file.read(len(header))
        if blake3(table + front + trailer[64:80]) == digest:
            header = front  # if the two copies differ, this is the right one
        for record in (table[start : start + RECORD.size] for start in range(0, table_bytes, RECORD.size)):
            self.places.setdefault(record[:32], []).append((path, header, record))
        if zeros != bytes(8) or not path.name == digest.hex() == blake3(table + header + trailer[64:80]).hex():
            raise Damaged("its footer is damaged: using what can be read of it")

    def read_chunk(self, chunk: str, length: int) -> bytes:
        problem = "it is in no pack"
        for path, header, record in self.places.get(bytes.fromhex(chunk), []):
            try:
                return self.read_place(path, header, record, length)
            except FAULTS as error:
                problem = f"{shown(error)} (in {shown(path)})"
        raise Damaged(f"chunk {chunk} is lost: {problem}")

    def read(self, chunk: str, length: int, width: int, parts: list[str]) -> bytes:
        try:
            return self.read_chunk(chunk, length)
        except FAULTS:
            if width not in (2, 4, 8) or length % width:
                raise  # it is no sum of others
        total = self.read_chunk(parts[0], length)
        for part in parts[1:]:
            total = add(total, self.read_chunk(part, length), width)
        if blake3(total, self.id_key).hex() != chunk:
            raise Damaged(f"chunk {chunk} is not the sum of its parts")
        return total

    def read_place(self, path: Path, header: bytes, record: bytes, length: int) -> bytes:
        chunk, digest, offset, stored, plain, codec = RECORD.unpack(record)
        if header[:12] not in HEADS or plain != length or plain > CHUNK_LIMIT or stored > 2 * CHUNK_LIMIT or codec > 2:
            raise Damaged("its length, its codec or the version of the pack is odd")
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(stored)
        if blake3(data) != digest:
            raise Damaged("its stored bytes are damaged")
        if header[:12] == HEADS[1]:
            associated = b"outlast chunk 1\0" + self.id + chunk + struct.pack("<BIQ", codec, plain, stored - 16)
            data = decrypt(self.derive(header, b"outlast pack 1"), offset.to_bytes(12, "big"), data, associated)
        data = data if codec == 0 else unzstd(data, plain) if codec == 1 else unplane(data, plain)
        if len(data) != plain or blake3(data, self.id_key) != chunk:
            raise Damaged("its plain bytes are not what its id says")
        return data


class Restore:
    def __init__(self, repository: Repository, target: bytes) -> None:
        self.repository, self.target, self.gap = repository, target, False  # gap: a part of the manifest is lost
        self.folders: dict[bytes, dict[str, Any]] = {target: {}}  # made so far: path -> entry, empty when it is lost

    def run(self, manifest: list[Any]) -> None:
        for line in self.lines(manifest):
            path = str(line[:100])
            try:
                entry = json.loads(line)
                path = str(entry["path"])
                self.restore(self.place(path), entry)
            except FAULTS as error:
                self.repository.complain(f"LOST {shown(path)}: {shown(error)}")
        for full, entry in reversed(self.folders.items()):
            if entry:
                self.set_metadata(full, entry)

    def lines(self, manifest: list[Any]) -> Iterator[bytes]:
        start = b""
        for chunk, length in manifest:
            try:
                data = self.repository.read_chunk(chunk, length)
            except FAULTS as error:
                self.repository.complain(f"LOST a part of the manifest, with files that can't be named: {shown(error)}")
                self.gap, data = True, b" ... "  # so the line that was cut here is odd, and named as lost
            *lines, start = (start + data).split(b"\n")
            yield from lines
        yield from [start] if start else []

    def place(self, text: str) -> bytes:
        """Where a path of the manifest is in the target. It is never trusted: it must lie in folders made here."""
        path = unquote_to_bytes(text)
        parts = path.split(b"/") if path != b"." else []
        if b"\0" in path or any(part in (b"", b".", b"..") for part in parts):
            raise Damaged("such a path is refused")
        for parent in (os.path.join(self.target, *parts[:depth]) for depth in range(1, len(parts))):
            if parent not in self.folders and not self.gap:
                raise Damaged("it lies in no folder of the snapshot")
            if parent not in self.folders:
                os.mkdir(parent)
                self.folders[parent] = {}
        return os.path.join(self.target, *parts)

    def restore(self, full: bytes, entry: dict[str, Any]) -> None:
        kind = entry["type"]
        if kind == "dir":
            if full != self.target:
                os.mkdir(full)
            self.folders[full] = entry
        elif kind == "file":
            self.write_file(full, entry)
        elif kind == "symlink":
            os.symlink(unquote_to_bytes(entry["target"]), full)
        elif kind == "fifo":
            os.mkfifo(full)
        elif kind == "hardlink":
            os.link(self.place(entry["target"]), full, follow_symlinks=False)
        else:
            raise Damaged(f"there is no content ({kind}): {entry.get('reason')}")
        if kind in ("file", "symlink", "fifo"):
            self.set_metadata(full, entry)

    def write_file(self, full: bytes, entry: dict[str, Any]) -> None:
        with open(full, "xb") as file:
            try:
                self.fill(file, entry)
            except FAULTS:
                os.rename(full, os.path.join(os.path.dirname(full), os.path.basename(full)[:240] + b".damaged"))
                raise

    def fill(self, file: BinaryIO, entry: dict[str, Any]) -> None:
        at, size, chunks, problem = 0, entry.get("size", 0), entry.get("chunks", []), None
        holes = [*entry.get("holes", []), (size, 0)][::-1]  # the next one is the last; the end is one, too
        fits = sum(length for _, length in [*chunks, *holes]) == size
        sums = {chunks[number][0]: how for number, *how in entry.get("sums", [])}
        for chunk, length in chunks:
            try:
                data = self.repository.read(chunk, length, *sums.get(chunk, (0, [])))
            except FAULTS as error:
                problem, data = problem or error, bytes(min(length, CHUNK_LIMIT))
            while data:
                while holes[-1][0] == at < size:
                    at += holes.pop()[1]
                file.seek(at)
                count = file.write(data[: max(0, holes[-1][0] - at)])
                at, data = at + count, data[count:] if count else b""  # without room, `at` is wrong below
        file.truncate(size)
        if problem or not fits or at + sum(length for _, length in holes) != size:
            raise problem or Damaged("its holes and chunks don't fit its size")

    def set_metadata(self, full: bytes, entry: dict[str, Any]) -> None:
        try:
            if os.geteuid() == 0:
                os.chown(full, entry.get("uid", 0), entry.get("gid", 0), follow_symlinks=False)
            if entry["type"] != "symlink":
                os.chmod(full, entry.get("mode", 0) & 0o7777)
            os.utime(full, ns=(entry.get("mtime_ns", 0),) * 2, follow_symlinks=False)
        except FAULTS as error:
            self.repository.complain(f"{shown(full)}: restored without its owner, mode and time: {shown(error)}")


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 3) or not os.path.isdir(arguments[0]):
        print(__doc__, file=sys.stderr)
        return 2
    repository = Repository(Path(arguments[0]))
    snapshots = repository.snapshots()
    if len(arguments) == 1:
        for key, record in snapshots.items():
            print(key, *(shown(record.get(field, 0)) for field in ("time", "name", "files", "bytes")), sep="  ")
        return min(repository.problems, 1)
    wanted, target = arguments[1:]
    by_time = sorted(snapshots, key=lambda key: str(snapshots[key]["time"]))
    found = by_time[-1:] if wanted == "latest" else [key for key in by_time if key.startswith(wanted)]
    if len(found) != 1 or (os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target))):
        print("SNAPSHOT must name one snapshot, and TARGET must not exist or be empty", file=sys.stderr)
        return 2
    os.umask(0o077)
    os.makedirs(target, exist_ok=True)
    repository.find_packs()
    Restore(repository, os.fsencode(target)).run(snapshots[found[0]]["manifest"])
    print(f"{repository.problems} problems, see above" if repository.problems else "restored, every chunk verified")
    return min(repository.problems, 1)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (EOFError, ImportError) as missing:
        sys.exit(f"{missing}; set OUTLAST_PASSPHRASE, or pip install blake3 zstandard 'cryptography>=44'")
