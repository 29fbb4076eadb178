"""What is sealed opens only with the right key, under its own name, in its own repository."""

from __future__ import annotations

import msgspec
import pytest

from outlast.errors import Corrupt, WrongKey
from outlast.repo import codec, pack, seal
from outlast.repo.pack import EncodedChunk

SALT = bytes(range(32))
KEYS = seal.new_keys(b"r" * 16, bytes(range(64)))
OTHER_REPOSITORY = seal.new_keys(b"q" * 16, bytes(range(64)))


@pytest.fixture(scope="module")
def slot() -> seal.KeySlot:
    return seal.wrap_keys(KEYS, b"correct horse", b"s" * 32, "2025-01-01T00:00:00Z")


def test_a_slot_opens_with_its_passphrase_only(slot: seal.KeySlot) -> None:
    assert seal.unwrap_keys(slot, b"correct horse") == KEYS
    assert seal.unwrap_keys(slot, b"wrong horse") is None
    assert seal.unwrap_keys(slot, b"") is None
    assert seal.unwrap_keys(msgspec.structs.replace(slot, wrapped=slot.wrapped[:-2]), b"correct horse") is None


@pytest.mark.parametrize(
    "change",
    [
        {"memory_kib": 2**40},
        {"memory_kib": 0},
        {"iterations": 10**9},
        {"iterations": 0},
        {"lanes": 10**6},
        {"lanes": 0},
        {"version": 2},
        {"kdf": "md5"},
        {"salt": "zz"},
        {"wrapped": "not hex"},
    ],
)
def test_a_hostile_slot_neither_opens_nor_costs_memory(slot: seal.KeySlot, change: dict[str, object]) -> None:
    assert seal.unwrap_keys(msgspec.structs.replace(slot, **change), b"correct horse") is None


def test_the_slot_shows_no_key(slot: seal.KeySlot) -> None:
    text = msgspec.json.encode(slot)
    assert KEYS.id_key.hex().encode() not in text
    assert KEYS.epochs[1].hex().encode() not in text


def sealed_chunk(plain: bytes = b"weights" * 10, offset: int = 64) -> tuple[bytes, bytes]:
    chunk = seal.chunk_id(plain, KEYS)
    return chunk, bytes(seal.ChunkSealer(KEYS, 1, SALT).seal(plain, chunk, codec.RAW, len(plain), offset))


def test_a_chunk_opens_as_what_it_was_sealed() -> None:
    chunk, stored = sealed_chunk()
    assert bytes(seal.ChunkSealer(KEYS, 1, SALT).open(stored, chunk, codec.RAW, 70, 64)) == b"weights" * 10
    assert b"weights" not in stored


def test_a_chunk_opens_as_nothing_else() -> None:
    chunk, stored = sealed_chunk()
    sealer = seal.ChunkSealer(KEYS, 1, SALT)
    other_id = seal.chunk_id(b"other", KEYS)
    flipped = bytes([stored[0] ^ 1]) + stored[1:]
    attempts = [
        (sealer, stored, other_id, codec.RAW, 70, 64),
        (sealer, stored, chunk, codec.ZSTD, 70, 64),
        (sealer, stored, chunk, codec.RAW, 71, 64),
        (sealer, stored, chunk, codec.RAW, 70, 4096),
        (sealer, flipped, chunk, codec.RAW, 70, 64),
        (sealer, stored[:-1], chunk, codec.RAW, 70, 64),
        (sealer, stored[:3], chunk, codec.RAW, 70, 64),
        (sealer, b"", chunk, codec.RAW, 70, 64),
        (seal.ChunkSealer(KEYS, 1, b"s" * 32), stored, chunk, codec.RAW, 70, 64),
        (seal.ChunkSealer(OTHER_REPOSITORY, 1, SALT), stored, chunk, codec.RAW, 70, 64),
    ]
    for opener, *arguments in attempts:
        with pytest.raises(Corrupt):
            opener.open(*arguments)


def test_an_epoch_that_the_key_does_not_hold_is_named() -> None:
    with pytest.raises(WrongKey, match="epoch 7"):
        seal.ChunkSealer(KEYS, 7, SALT)


def test_nonces_never_repeat_within_a_pack() -> None:
    """Empty chunks too: the tag gives each a place, and so a nonce, of its own."""
    plains = [b"", b"a", b"", b"b" * 70000, b""]
    chunks = [EncodedChunk(seal.chunk_id(plain, KEYS), codec.RAW, len(plain), plain) for plain in plains]
    footer = pack.build(chunks, KEYS, SALT).footer
    offsets = footer.records["offset"].tolist()
    assert len(set(offsets)) == len(plains)


def test_equal_packs_get_different_keys_by_their_salt() -> None:
    chunk = seal.chunk_id(b"x" * 100, KEYS)
    stored = {bytes(seal.ChunkSealer(KEYS, 1, bytes([n]) * 32).seal(b"x" * 100, chunk, 0, 100, 64)) for n in range(4)}
    assert len(stored) == 4


def test_chunk_ids_do_not_confirm_known_content() -> None:
    known = b"a published model"
    other = seal.new_keys(b"r" * 16, bytes(64))
    assert len({seal.chunk_id(known, KEYS), seal.chunk_id(known, other), seal.chunk_id(known, None)}) == 3


def test_an_object_opens_under_its_own_name_only() -> None:
    sealed = seal.seal_object(KEYS, "log/1", b"entry", SALT)
    assert seal.open_object(KEYS, "log/1", sealed) == b"entry"
    with pytest.raises(Corrupt):
        seal.open_object(KEYS, "log/2", sealed)
    with pytest.raises(Corrupt):
        seal.open_object(OTHER_REPOSITORY, "log/1", sealed)
    for at in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[at] ^= 1
        with pytest.raises(Corrupt):
            seal.open_object(KEYS, "log/1", bytes(damaged))
    for length in range(len(sealed)):
        with pytest.raises(Corrupt):
            seal.open_object(KEYS, "log/1", sealed[:length])


def test_an_object_in_the_clear_is_not_taken_for_a_sealed_one() -> None:
    with pytest.raises(Corrupt, match="not a sealed object"):
        seal.open_object(KEYS, "log/1", b'{"seq":1,"kind":"snapshot","body":{}}' * 10)
