"""Hashes, keys and authenticated encryption. Pure: nonces, salts and keys are arguments.

Primitives: BLAKE3 (keyed for chunk ids of encrypted repositories, so that names don't confirm
known content), AES-256-GCM (NIST SP 800-38D), HKDF-SHA256 (RFC 5869), Argon2id (RFC 9106).

**Nonces never repeat under a key**: every pack and every sealed object has a random 32-byte salt
and a key of its own derived from it. Inside a pack the nonce is the payload's offset, and payloads
don't overlap; a sealed object is one message.

**Nothing can be swapped**: the associated data of every message binds the repository, the kind of
object, and its name or chunk id, codec and lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import blake3
import msgspec

from outlast.errors import Corrupt, WrongKey

ID_BYTES = 32
KEY_BYTES = 32
SALT_BYTES = 32
TAG_BYTES = 16

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_OBJECT_HEAD = struct.Struct("<8sHHI32s")
_OBJECT_MAGIC = b"OUTLSEAL"
SEALED_BYTES_MIN = _OBJECT_HEAD.size + TAG_BYTES
_CHUNK_AAD = struct.Struct("<16s16s32sBIQ")

ARGON2_MEMORY_KIB = 64 << 10
ARGON2_ITERATIONS = 3
ARGON2_LANES = 4
_ARGON2_MEMORY_KIB_MAX = 1 << 20
_ARGON2_WORK_MAX = 64
_ARGON2_TOTAL_KIB_MAX = 4 << 20
"""memory written in all: some seconds for a slot, so that a store can't make opening take hours"""


class Keys(msgspec.Struct):
    """What the key slots of one passphrase open: the data keys by epoch and the key of the chunk ids.

    All parts of an open repository share one of these, so that a key that comes by a rotation is
    known to all of them at once.
    """

    repository: bytes
    id_key: bytes
    epochs: dict[int, bytes]
    anchor: str = ""
    """BLAKE3 of the object `format` in hex: a store that serves another one is found out"""
    epoch: int = 1
    """The epoch that new packs and objects are sealed under: what the log says, not the highest that is held,
    for a rotation that hasn't reached the log may never happen"""
    reload: Callable[[], dict[int, bytes]] | None = None
    """reads the slots again, for the data keys that came since"""
    passphrase: bytes = b""
    """what opened the slots"""

    @property
    def chunking_seed(self) -> int:
        """63 secret bits, so that the lengths of chunks, which the store sees, don't betray known content."""
        return int.from_bytes(blake3.blake3(b"outlast chunking 1", key=self.id_key).digest(8), "big") >> 1

    def data_key(self, epoch: int) -> bytes:
        if epoch not in self.epochs and self.reload is not None:
            self.epochs.update(self.reload())
        if epoch not in self.epochs:
            raise WrongKey(
                f"what this passphrase opens does not hold data key epoch {epoch}: it is from before a rotation of "
                "the keys. Nothing was changed.",
                hint="Whoever has a newer passphrase runs `outlast key add`, and enters this one as the new one.",
            )
        return self.epochs[epoch]

    def use(self, epoch: int) -> None:
        """Seal under this epoch from now on; the log says so. `WrongKey` when the slots don't hold it either."""
        if epoch <= self.epoch:
            return
        self.data_key(epoch)
        self.epoch = epoch

    def __repr__(self) -> str:
        return f"Keys(repository={self.repository.hex()}, epoch={self.epoch})"  # the rest is secret


class KeySlot(msgspec.Struct, frozen=True):
    """The object `keys/<id>`: `Keys` wrapped by a passphrase."""

    version: int
    created: str
    kdf: str
    memory_kib: int
    iterations: int
    lanes: int
    salt: str
    wrapped: str
    label: str = ""


def digest(data: bytes | memoryview) -> bytes:
    """BLAKE3, 32 bytes."""
    return blake3.blake3(data).digest()


def chunk_id(plain: bytes | memoryview, keys: Keys | None) -> bytes:
    """The id of a chunk: BLAKE3 of its plain bytes, keyed in an encrypted repository."""
    if keys is None:
        return blake3.blake3(plain).digest()
    return blake3.blake3(plain, key=keys.id_key).digest()


def new_keys(repository: bytes, key_material: bytes, anchor: str = "") -> Keys:
    """Keys of a new repository from 64 random bytes."""
    return Keys(repository, key_material[:KEY_BYTES], {1: key_material[KEY_BYTES : 2 * KEY_BYTES]}, anchor)


def wrap_keys(keys: Keys, passphrase: bytes, salt: bytes, created: str, label: str = "") -> KeySlot:
    """Make a slot. `salt`: 32 random bytes, also the reason why the all-zero nonce is safe."""
    slot = KeySlot(
        version=1,
        created=created,
        kdf="argon2id",
        memory_kib=ARGON2_MEMORY_KIB,
        iterations=ARGON2_ITERATIONS,
        lanes=ARGON2_LANES,
        salt=salt.hex(),
        wrapped="",
        label=label,
    )
    bundle = msgspec.json.encode(
        {
            "repository": keys.repository.hex(),
            "id_key": keys.id_key.hex(),
            "epochs": {str(epoch): key.hex() for epoch, key in keys.epochs.items()},
            "format": keys.anchor,
        }
    )
    wrapped = _aes(_passphrase_key(slot, passphrase)).encrypt(bytes(12), bundle, b"outlast key 1")
    return msgspec.structs.replace(slot, wrapped=wrapped.hex())


def unwrap_keys(slot: KeySlot, passphrase: bytes) -> Keys | None:
    """Open a slot, or None when this passphrase doesn't."""
    from cryptography.exceptions import InvalidTag

    try:
        wrapped = bytes.fromhex(slot.wrapped)
        bundle = _aes(_passphrase_key(slot, passphrase)).decrypt(bytes(12), wrapped, b"outlast key 1")
    except (InvalidTag, ValueError):
        return None
    try:
        fields = msgspec.json.decode(bundle, type=_Bundle)
        epochs = {int(epoch): bytes.fromhex(key) for epoch, key in fields.epochs.items()}
        id_key = bytes.fromhex(fields.id_key)
        if not epochs or any(len(key) != KEY_BYTES for key in (id_key, *epochs.values())):
            raise ValueError("the keys have a wrong length")
        return Keys(bytes.fromhex(fields.repository), id_key, epochs, fields.format)
    except (msgspec.DecodeError, ValueError) as exc:
        raise Corrupt(f"a key slot opens, but what it holds can't be read: {exc}.") from exc


class _Bundle(msgspec.Struct):
    repository: str
    id_key: str
    epochs: dict[str, str]
    format: str


def _passphrase_key(slot: KeySlot, passphrase: bytes) -> bytes:
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    if (
        slot.version != 1
        or slot.kdf != "argon2id"
        or not 8 <= slot.memory_kib <= _ARGON2_MEMORY_KIB_MAX
        or not 1 <= slot.iterations <= _ARGON2_WORK_MAX
        or slot.memory_kib * slot.iterations > _ARGON2_TOTAL_KIB_MAX
        or not 1 <= slot.lanes <= _ARGON2_WORK_MAX
    ):
        raise ValueError("key derivation parameters are out of bounds")
    return Argon2id(
        salt=bytes.fromhex(slot.salt),
        length=KEY_BYTES,
        iterations=slot.iterations,
        lanes=slot.lanes,
        memory_cost=slot.memory_kib,
    ).derive(passphrase)


class ChunkSealer:
    """Seals and opens the chunks of one pack."""

    def __init__(self, keys: Keys, epoch: int, salt: bytes) -> None:
        self._repository = keys.repository
        self._aes = _aes(_derive(keys.data_key(epoch), salt, b"outlast pack 1"))

    def seal(self, encoded: bytes | memoryview, chunk: bytes, codec: int, plain_bytes: int, offset: int) -> bytearray:
        sealed = bytearray(len(encoded) + TAG_BYTES)
        self._aes.encrypt_into(_nonce(offset), encoded, self._aad(chunk, codec, plain_bytes, len(encoded)), sealed)
        return sealed

    def open(self, stored: bytes | memoryview, chunk: bytes, codec: int, plain_bytes: int, offset: int) -> memoryview:
        """Raises `Corrupt` when the bytes, or what the footer says of them, were changed."""
        from cryptography.exceptions import InvalidTag

        encoded_bytes = len(stored) - TAG_BYTES
        if encoded_bytes < 0:
            raise Corrupt(f"chunk {chunk.hex()[:16]} is shorter than its authentication tag.")
        encoded = bytearray(encoded_bytes)
        try:
            self._aes.decrypt_into(_nonce(offset), stored, self._aad(chunk, codec, plain_bytes, encoded_bytes), encoded)
        except InvalidTag as exc:
            raise Corrupt(f"chunk {chunk.hex()[:16]} fails its authentication.") from exc
        return memoryview(encoded)

    def _aad(self, chunk: bytes, codec: int, plain_bytes: int, encoded_bytes: int) -> bytes:
        return _CHUNK_AAD.pack(b"outlast chunk 1\0", self._repository, chunk, codec, plain_bytes, encoded_bytes)


def seal_object(keys: Keys, name: str, plain: bytes, salt: bytes) -> bytes:
    """A whole object (log entry, state) as one message: head, then AES-256-GCM of `plain`."""
    epoch = keys.epoch
    head = _OBJECT_HEAD.pack(_OBJECT_MAGIC, 1, 0, epoch, salt)
    aes = _aes(_derive(keys.data_key(epoch), salt, b"outlast object 1"))
    return head + aes.encrypt(bytes(12), plain, head + keys.repository + name.encode())


def open_object(keys: Keys, name: str, sealed: bytes) -> bytes:
    """Undo `seal_object`; `Corrupt` when it isn't the object that was written under this name."""
    from cryptography.exceptions import InvalidTag

    if len(sealed) < _OBJECT_HEAD.size + TAG_BYTES or sealed[:8] != _OBJECT_MAGIC:
        raise Corrupt(f"{name} is not a sealed object, though the repository is encrypted.")
    head = sealed[: _OBJECT_HEAD.size]
    _, version, _, epoch, salt = _OBJECT_HEAD.unpack(head)
    if version != 1 or epoch not in keys.epochs:
        raise Corrupt(f"{name} is sealed with version {version}, key epoch {epoch}, which this key does not know.")
    aes = _aes(_derive(keys.data_key(epoch), salt, b"outlast object 1"))
    try:
        return aes.decrypt(bytes(12), sealed[_OBJECT_HEAD.size :], head + keys.repository + name.encode())
    except InvalidTag as exc:
        raise Corrupt(f"{name} fails its authentication.") from exc


def looks_sealed(head: bytes) -> bool:
    """Whether the first `SEALED_BYTES_MIN` bytes are those of a sealed object, as far as can be told without keys."""
    magic, version, zero, _, _ = _OBJECT_HEAD.unpack_from(head)
    return (magic, version, zero) == (_OBJECT_MAGIC, 1, 0)


def sealed_epoch(sealed: bytes) -> int:
    """The epoch that an object, which `open_object` opened, is sealed under."""
    return int(_OBJECT_HEAD.unpack_from(sealed)[3])


def _nonce(offset: int) -> bytes:
    return offset.to_bytes(12, "big")


def _aes(key: bytes) -> AESGCM:
    # Imported here: unencrypted repositories never pay for OpenSSL's start-up.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=purpose).derive(key)
