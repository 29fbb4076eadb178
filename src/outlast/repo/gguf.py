"""Where the tensors lie in a GGUF file, versions 2 and 3, little-endian. Pure.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. After a 24-byte head come key-value
pairs, which only have to be stepped over, then one description per tensor, then, aligned, the data.
"""

from __future__ import annotations

from struct import Struct, unpack_from

from outlast.repo.layout import Malformed, Tensor, Window, element_count

MAGIC = b"GGUF"

# Type number -> name, elements of a block, bytes of a block. The names of plain types are those of
# safetensors too. 31-33 and 36-38 are interleavings that old files still hold.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 31: ("Q4_0_4_4", 32, 18),
    32: ("Q4_0_4_8", 32, 18), 33: ("Q4_0_8_8", 32, 18), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    36: ("IQ4_NL_4_4", 32, 18), 37: ("IQ4_NL_4_8", 32, 18), 38: ("IQ4_NL_8_8", 32, 18),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

# Metadata value types of a fixed width (u8 i8 u16 i16 u32 i32 f32 bool, u64 i64 f64), in bytes.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9

_HEAD_BYTES = 24
_PAIR_BYTES_MIN = 8 + 4 + 1
_TENSOR_BYTES_MIN = 8 + 4 + 4 + 8
_METADATA_BYTES_MAX = 256 << 20
_STEPS_MAX = 8_000_000  # strings and arrays stepped over; a vocabulary has 300,000
_NAME_BYTES_MAX = 4096
_ALL_NAMES_BYTES_MAX = 16 << 20
_DIMENSIONS_MAX = 8
_TENSORS_MAX = 1 << 17
_READ_BYTES = 256 << 10
_LENGTH = Struct("<Q")


class _Cursor:
    """Reads the head of the file forwards; every step is bounded by the file and by `_METADATA_BYTES_MAX`."""

    def __init__(self, window: Window) -> None:
        self.at = _HEAD_BYTES
        self._window = window
        self._end = min(window.size, _METADATA_BYTES_MAX)
        self._steps = 0
        self._names_left = _ALL_NAMES_BYTES_MAX

    def take(self, length: int) -> bytes:
        self.skip(length)
        return self._window.get(self.at - length, length, ahead=_READ_BYTES)

    def skip(self, length: int) -> None:
        self.at += length
        if self.at > self._end:
            raise Malformed("the description reaches past the end")

    def number(self, form: str, length: int) -> int:
        value: int = unpack_from(form, self.take(length))[0]
        return value

    def text(self) -> bytes:
        length = self.number("<Q", 8)
        self._names_left -= length
        if length > _NAME_BYTES_MAX or self._names_left < 0:
            raise Malformed("a name longer than any tool writes")
        return self.take(length)

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in _VALUE_BYTES:
            self.skip(_VALUE_BYTES[kind])
        elif kind == _STRING:
            self.skip(self.number("<Q", 8))
        elif kind == _ARRAY and depth < 4:
            self._skip_array(depth)
        else:
            raise Malformed("an unknown kind of metadata")

    def _skip_array(self, depth: int) -> None:
        kind, count = unpack_from("<IQ", self.take(12))
        if kind in _VALUE_BYTES:
            self.skip(_VALUE_BYTES[kind] * count)
            return
        self._steps += count
        if self._steps > _STEPS_MAX:
            raise Malformed("more metadata than any tool writes")
        if kind == _STRING:
            self._skip_strings(count)
        else:
            for _ in range(count):
                self.skip_value(kind, depth + 1)

    def _skip_strings(self, count: int) -> None:
        while count:
            piece = self._window.get(self.at, min(_READ_BYTES, self._end - self.at))
            at = 0
            while count and at + 8 <= len(piece):
                at += 8 + _LENGTH.unpack_from(piece, at)[0]
                count -= 1
            if at == 0:
                raise Malformed("the description reaches past the end")
            self.skip(at)


def tensors(window: Window) -> list[Tensor]:
    """The tensors in the order of the file, shapes with the slowest dimension first; raises `Malformed`."""
    magic, version, tensor_count, pair_count = unpack_from("<4sIQQ", window.get(0, _HEAD_BYTES, ahead=_READ_BYTES))
    # A big-endian file shows its version in the upper half of the word, so it ends here as well.
    if magic != MAGIC or version not in (2, 3):
        raise Malformed("not a little-endian GGUF file of version 2 or 3")
    left = window.size - _HEAD_BYTES
    if pair_count * _PAIR_BYTES_MIN + tensor_count * _TENSOR_BYTES_MIN > left or tensor_count > _TENSORS_MAX:
        raise Malformed("more descriptions than the file can hold")
    cursor = _Cursor(window)
    alignment = 32
    for _ in range(pair_count):
        key = cursor.text()
        kind = cursor.number("<I", 4)
        if key == b"general.alignment" and kind == _UINT32:
            alignment = cursor.number("<I", 4)
        else:
            cursor.skip_value(kind)
    if alignment == 0 or alignment & (alignment - 1):
        raise Malformed("the alignment is no power of two")
    described = [_description(cursor, window.size) for _ in range(tensor_count)]
    if len({each[0] for each in described}) != tensor_count:
        raise Malformed("two tensors of one name")
    data_start = -(-cursor.at // alignment) * alignment
    found = []
    for name, dtype, shape, offset, length in described:
        if offset % alignment or data_start + offset + length > window.size:
            raise Malformed("a tensor lies outside the file")
        found.append(Tensor(name, dtype, shape, data_start + offset, length))
    return found


def _description(cursor: _Cursor, size: int) -> tuple[str, str, tuple[int, ...], int, int]:
    name = cursor.text().decode("utf-8", "replace")
    dimensions = cursor.number("<I", 4)
    if dimensions > _DIMENSIONS_MAX:
        raise Malformed("more dimensions than ggml knows")
    shape: tuple[int, ...] = unpack_from(f"<{dimensions}Q", cursor.take(8 * dimensions))
    kind, offset = unpack_from("<IQ", cursor.take(12))
    if kind not in _TYPES:
        raise Malformed("an unknown tensor type")
    dtype, block_items, block_bytes = _TYPES[kind]
    count = element_count(shape, size * 256)
    if block_items > 1 and (not shape or shape[0] % block_items):
        raise Malformed("a row is no whole number of blocks")
    return name, dtype, tuple(reversed(shape)), offset, count // block_items * block_bytes
