"""Plain bytes <-> encoded bytes of one chunk: raw, zstd, or byte planes + zstd.

Floating-point weights hardly compress as they lie: the exponent byte, which is predictable, is
drowned by mantissa bytes, which are noise. Splitting each element into planes puts the exponents
side by side, where zstd's entropy coder halves them, and leaves the noise alone (the idea of
ZipNN, arXiv 2411.05239).

**Planes of an element of w bytes (w = 2, 4, 8, little-endian)**: its low half is one plane; the
high half is split again in the same way until one byte is left. So w = 4 gives a 2-byte plane, a
1-byte plane and the 1-byte top plane. Encoded form: one byte w, then for each plane, low to high,
one byte (0 stored, 1 zstd frame) and its stored length (u32, little-endian), then the planes'
stored bytes in the same order, then the `length % w` bytes that are left over at the end.

Exponents of weights are skewed but hardly repeat. For planes of single bytes in whose samples matches
gain nothing, zstd is told to look for next to none: a third of the time of level 1, and a twelfth
smaller, because writing down a short match costs more than the entropy coder needs for its bytes.

A chunk is stored raw where the gain is below `GAIN_MIN`. Whatever a codec touched is decoded and
compared with its source before it counts as encoded (a bug in a compression library has
corrupted backups of others).
"""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from outlast.errors import Corrupt

RAW = 0
ZSTD = 1
PLANES = 2

NAMES = {RAW: "raw", ZSTD: "zstd", PLANES: "planes+zstd"}

Compression = Literal["auto", "none", "zstd"]

GAIN_MIN = 0.05
_SAMPLE_BYTES = 16 << 10
_SMALL_BYTES = 256
_LEVEL = 1
_FEW_MATCHES = zstandard.ZstdCompressionParameters(
    window_log=20, chain_log=6, hash_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
)
_PLANE_HEAD = struct.Struct("<BI")
_AT_ONCE = 32 << 10
"""elements whose planes a core's own cache holds"""
_idle: list[zstandard.ZstdDecompressor] = []
"""those that no thread uses: to make one takes as long as to decode some 10 KB"""


class Encoder:
    """Chooses and applies codecs. It keeps its zstd contexts, which cost more to make than a small
    chunk costs to compress, and its buffers, for fresh memory costs as much as the work done in it;
    so it is for one thread."""

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
        self._few_matches = zstandard.ZstdCompressor(compression_params=_FEW_MATCHES)
        self._decompressor = zstandard.ZstdDecompressor()
        self._split = self._joined = np.empty(0, np.uint8)

    def encode(self, plain: bytes | memoryview, item_bytes: int) -> tuple[int, bytes | memoryview]:
        """(codec, encoded bytes). `item_bytes` is the width of the elements that the chunk holds,
        0 when it is not an array."""
        if self._compression == "none" or len(plain) < _SMALL_BYTES:
            return RAW, plain
        if self._compression == "auto" and item_bytes in (2, 4, 8):
            planes = self._encode_planes(plain, item_bytes)
            return (RAW, plain) if planes is None else (PLANES, planes)
        compressor = self._fitting(plain)
        if compressor is None:
            return RAW, plain
        packed = compressor.compress(plain)
        if len(packed) > len(plain) * (1 - GAIN_MIN):
            return RAW, plain
        if self._decompressor.decompress(packed, max_output_size=len(plain)) != plain:
            return RAW, plain
        return ZSTD, packed

    def _fitting(self, plain: bytes | memoryview, width: int = 0) -> zstandard.ZstdCompressor | None:
        """The compressor that does best on samples; None when they hardly compress at all, for noise
        is told apart at a fraction of the cost. `width`: of the elements of a plane."""
        length = len(plain)
        if length <= 4 * _SAMPLE_BYTES:
            return self._compressor
        starts = (0, (length - _SAMPLE_BYTES) // 2, length - _SAMPLE_BYTES)
        samples = [plain[start : start + _SAMPLE_BYTES] for start in starts]
        candidates = (self._few_matches, self._compressor) if width == 1 else (self._compressor,)
        sizes = [sum(len(each.compress(sample)) for sample in samples) for each in candidates]
        if min(sizes) >= len(starts) * _SAMPLE_BYTES * (1 - GAIN_MIN / 2):
            return None
        return candidates[sizes.index(min(sizes))]

    def _encode_planes(self, plain: bytes | memoryview, item_bytes: int) -> bytes | None:
        """The plane form, or None where it saves too little."""
        length = len(plain)
        whole = length - length % item_bytes
        if len(self._split) < length:
            self._split, self._joined = np.empty(length, np.uint8), np.empty(length, np.uint8)
        source = np.frombuffer(plain, np.uint8)
        heads: list[bytes] = []
        planes: list[bytes | memoryview] = []
        stored = at = 0
        for view in _plane_views(source[:whole], item_bytes):
            flat = self._split[at : at + view.nbytes]
            flat.view(view.dtype)[:] = view
            at += view.nbytes
            plane = flat.data
            compressor = self._fitting(plane, view.itemsize)
            packed = compressor.compress(plane) if compressor else None
            if packed is not None and len(packed) <= len(plane) * (1 - GAIN_MIN):
                heads.append(_PLANE_HEAD.pack(1, len(packed)))
                planes.append(packed)
            else:
                heads.append(_PLANE_HEAD.pack(0, len(plane)))
                planes.append(plane)
            stored += len(planes[-1])
        if stored > length * (1 - GAIN_MIN):
            return None
        encoded = b"".join([bytes([item_bytes]), *heads, *planes, plain[whole:]])
        joined = self._joined[:length]
        _decode_planes(memoryview(encoded), joined)
        return encoded if np.array_equal(_wide(joined), _wide(source)) else None


def _wide(data: NDArray[np.uint8]) -> NDArray[np.unsignedinteger]:
    """The same bytes in as few elements as can be, which compare faster."""
    return data.view("<u8") if len(data) % 8 == 0 else data


def decode(codec: int, encoded: bytes | memoryview, plain_bytes: int) -> bytes | memoryview:
    """Undo `encode`. Never allocates more than `plain_bytes` and a constant; raises `Corrupt`."""
    try:
        if codec == RAW:
            plain: bytes | memoryview = encoded
        elif codec == ZSTD:
            plain = _decompress(encoded, plain_bytes)
        elif codec == PLANES:
            whole = np.empty(plain_bytes, np.uint8)
            _decode_planes(memoryview(encoded), whole)
            plain = whole.data
        else:
            raise Corrupt(f"codec {codec} is not known to this version.")
    except (zstandard.ZstdError, struct.error, ValueError) as exc:
        raise Corrupt(f"a {NAMES.get(codec, '?')} chunk does not decode: {exc}.") from exc
    if len(plain) != plain_bytes:
        raise Corrupt(f"a chunk decodes to {len(plain)} bytes instead of {plain_bytes}.")
    return plain


def _decompress(packed: bytes | memoryview, plain_bytes: int) -> bytes:
    if zstandard.frame_content_size(packed) != plain_bytes:
        raise Corrupt("a zstd frame does not hold as many bytes as it should.")
    try:
        decompressor = _idle.pop()
    except IndexError:
        decompressor = zstandard.ZstdDecompressor()
    try:
        return decompressor.decompress(packed, max_output_size=plain_bytes)
    finally:
        _idle.append(decompressor)


def _plane_widths(item_bytes: int) -> list[int]:
    widths = []
    while item_bytes > 1:
        item_bytes //= 2
        widths.append(item_bytes)
    return [*widths, 1]


def _plane_views(elements: NDArray[np.uint8], item_bytes: int) -> list[NDArray[np.unsignedinteger]]:
    """The planes of little-endian elements as strided views, low half first."""
    views: list[NDArray[np.unsignedinteger]] = []
    start = 0
    for width in _plane_widths(item_bytes):
        views.append(elements.view(f"<u{width}")[start // width :: item_bytes // width])
        start += width
    return views


def _decode_planes(encoded: memoryview, plain: NDArray[np.uint8]) -> None:
    """Decode into `plain`, which has the length that the chunk should have."""
    item_bytes = encoded[0] if len(encoded) else 0
    if item_bytes not in (2, 4, 8):
        raise Corrupt(f"a plane chunk names an element width of {item_bytes} bytes.")
    widths = _plane_widths(item_bytes)
    whole = len(plain) - len(plain) % item_bytes
    at = 1 + len(widths) * _PLANE_HEAD.size
    planes: list[NDArray[np.unsignedinteger]] = []
    for index, width in enumerate(widths):
        form, stored_bytes = _PLANE_HEAD.unpack_from(encoded, 1 + index * _PLANE_HEAD.size)
        stored = encoded[at : at + stored_bytes]
        plane = _decompress(stored, whole // item_bytes * width) if form == 1 else stored
        planes.append(np.frombuffer(plane, f"<u{width}"))
        at += stored_bytes
    if item_bytes == 2:
        _join_bytes(planes[0], planes[1], plain[:whole].view("<u2"))
    else:
        for view, values in zip(_plane_views(plain[:whole], item_bytes), planes, strict=True):
            view[:] = values
    plain[whole:] = np.frombuffer(encoded[at:], np.uint8)


def _join_bytes(
    low: NDArray[np.unsignedinteger], high: NDArray[np.unsignedinteger], to: NDArray[np.unsignedinteger]
) -> None:
    """Twice as fast as two copies with a stride."""
    for start in range(0, max(len(low), len(high), len(to)), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        joined = to[part]
        joined[:] = high[part]
        np.left_shift(joined, 8, out=joined)
        np.bitwise_or(joined, low[part], out=joined)
