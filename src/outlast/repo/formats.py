"""Where the tensors lie in a .safetensors, torch zip, GGUF or .npy file. Pure; no pickle is executed.

Formats are told by content, never by name. Whatever is unknown, or contradicts itself anywhere, is
opaque: the answer is None, not an error, because a backup keeps any bytes. The caller's reader may be
remote, so readers ask for few and larger pieces; it may raise its own errors, which pass through.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec

from outlast.errors import InvalidInput
from outlast.repo import gguf, strided, torchfile
from outlast.repo.layout import (
    DTYPE_BITS,
    Malformed,
    ReadAt,
    Span,
    Tensor,
    Window,
    element_count,
    item_bytes,
    merge_spans,
)

__all__ = ["ReadAt", "Span", "Tensor", "detect", "safetensors_header", "spans", "tensor_bytes", "tensors"]

_PIECE_BYTES = 8 << 20
_HEAD_BYTES = 16 << 10

# The reference implementation's limit on a safetensors header, and what of it is parsed here: enough
# for 200,000 tensors. A description has four colons and a few commas; metadata may have some too.
_SAFETENSORS_HEADER_BYTES_MAX = 100_000_000
_SAFETENSORS_PARSED_BYTES_MAX = 24 << 20
_SAFETENSORS_COLONS_MAX = 1 << 19
_SAFETENSORS_COMMAS_MAX = 1 << 20
_NOT_IN_SAFETENSORS = {"C32", "C128"}

_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER_BYTES_MAX = 64 << 10
# No operators and no calls, so that parsing stays shallow; field names with other characters are opaque.
_NPY_HEADER = re.compile(rb"\s*\{[\s\w'\"<>|=,:()\[\].]*\}\s*")
_NPY_DTYPE = re.compile(r"([<>|=])([biufcmMSUV])(\d{1,6})")
_NPY_NAMES = {"b1": "BOOL", "c8": "C64", "c16": "C128"} | {
    f"{kind}{width}": f"{name}{width * 8}"
    for kind, name, widths in (("i", "I", (1, 2, 4, 8)), ("u", "U", (1, 2, 4, 8)), ("f", "F", (2, 4, 8)))
    for width in widths
}


def detect(read: ReadAt, size: int) -> str | None:
    """ "safetensors", "torch" (the zip container), "gguf", "npy", or None when it is none of them.

    A file that is recognised may still turn out malformed for `spans` and `tensors`.
    """
    window = Window(read, size)
    try:
        kind = _detect(window)
        return None if kind == "torch" and not torchfile.recognises(window) else kind
    except Malformed:
        return None


def spans(read: ReadAt, size: int) -> list[Span] | None:
    """The bytes of each tensor (of each storage, in a torch file): sorted, disjoint and inside the file.

    None: the file is of no known format, or malformed.
    """
    window = Window(read, size)
    try:
        kind = _detect(window)
        if kind == "torch":
            return merge_spans(torchfile.spans(window), size)
        if kind == "npy":
            return merge_spans([_npy(window)[0]], size)
        if kind is None:
            return None
        found = _safetensors(window) if kind == "safetensors" else gguf.tensors(window)
        return merge_spans((Span(each.offset, each.length, item_bytes(each.dtype)) for each in found), size)
    except Malformed:
        return None


def tensors(read: ReadAt, size: int) -> list[Tensor] | None:
    """Every tensor with its name, in the order of the file; tied tensors appear under each of their names.

    In a torch file a name is the path through dicts and lists, joined with "."; see `torchfile`.
    None: the file is of no known format, or malformed.
    """
    window = Window(read, size)
    try:
        kind = _detect(window)
        if kind == "torch":
            return torchfile.tensors(window)
        if kind == "npy":
            array = _npy(window)[1]
            return [array] if array else None
        if kind is None:
            return None
        found = _safetensors(window) if kind == "safetensors" else gguf.tensors(window)
        merge_spans((Span(each.offset, each.length, 0) for each in found), size)
        return found
    except Malformed:
        return None


def tensor_bytes(read: ReadAt, tensor: Tensor) -> Iterator[bytes]:
    """The elements in row-major order, end to end, in pieces of at most 8 MiB.

    Elements that lie apart (views, Fortran order) are gathered, with at most 64 MiB in memory.
    """
    if tensor.strides is not None:
        yield from strided.gather(read, tensor, _PIECE_BYTES)
        return
    for start in range(0, tensor.length, _PIECE_BYTES):
        yield read(tensor.offset + start, min(_PIECE_BYTES, tensor.length - start))


def safetensors_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """The start of a safetensors file, up to the first tensor's first byte (8-byte aligned).

    `tensors` are (name, dtype, shape, length in bytes), laid end to end in this order.
    Raises `InvalidInput` for what such a file can't hold.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, length in tensors:
        where = f"Tensor {name[:200]!r} can't be written to a safetensors file"
        if dtype not in DTYPE_BITS or dtype in _NOT_IN_SAFETENSORS:
            raise InvalidInput(
                f"{where}: the format has no type {dtype}; nothing was written.",
                hint="Restore the whole file instead, or choose other tensors.",
            )
        if name in header or name == "__metadata__":
            raise InvalidInput(f"{where}: the name is taken; nothing was written.", hint="Choose one of them.")
        if length != _stored_bytes(dtype, shape, length):
            raise InvalidInput(f"{where}: {length} bytes don't fit shape {shape} of {dtype}; nothing was written.")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    if len(text) > _SAFETENSORS_HEADER_BYTES_MAX:
        raise InvalidInput(
            f"{len(tensors)} tensors need a header of {len(text)} bytes, more than safetensors allows; "
            "nothing was written.",
            hint="Choose fewer tensors.",
        )
    return len(text).to_bytes(8, "little") + text


def _detect(window: Window) -> str | None:
    if window.size < 8:
        return None
    head = window.get(0, min(window.size, 16), ahead=_HEAD_BYTES)
    if head.startswith(gguf.MAGIC):
        return "gguf"
    if head.startswith(_NPY_MAGIC):
        return "npy"
    if head.startswith(torchfile.MAGIC):
        return "torch"
    header_bytes = int.from_bytes(head[:8], "little")
    plausible = 2 <= header_bytes <= min(_SAFETENSORS_HEADER_BYTES_MAX, window.size - 8)
    return "safetensors" if plausible and head[8:9] == b"{" else None


class _Described(msgspec.Struct):
    """What a safetensors header says about one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_header_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_described_decoder = msgspec.json.Decoder(_Described)


def _safetensors(window: Window) -> list[Tensor]:
    # https://github.com/huggingface/safetensors: length of the header, header in JSON, data.
    header_bytes = int.from_bytes(window.get(0, 8, ahead=_HEAD_BYTES), "little")
    if header_bytes > _SAFETENSORS_PARSED_BYTES_MAX:
        raise Malformed("a header longer than any model needs")
    text = window.get(8, header_bytes)
    data_start = 8 + header_bytes
    # Counted before anything is built from it: a hostile header is mostly tiny entries. Every entry of a
    # JSON object has a colon and every element of a list but one a comma, however its text is escaped.
    if text.count(b":") > _SAFETENSORS_COLONS_MAX or text.count(b",") > _SAFETENSORS_COMMAS_MAX:
        raise Malformed("more tensors than any model has")
    found = []
    try:
        for name, raw in _header_decoder.decode(text).items():
            if name == "__metadata__":
                continue
            described = _described_decoder.decode(raw)
            begin, end = described.data_offsets
            if not 0 <= begin <= end <= window.size - data_start:
                raise Malformed("a tensor outside the file")
            length = end - begin
            if length != _stored_bytes(described.dtype, described.shape, length):
                raise Malformed("shape and length disagree")
            found.append(Tensor(name, described.dtype, tuple(described.shape), data_start + begin, length))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Malformed("the header is no such JSON") from exc
    found.sort(key=lambda each: each.offset)
    return found


def _stored_bytes(dtype: str, shape: Sequence[int], length: int) -> int:
    """What a tensor of at most `length` bytes takes, or -1; a type of the future is believed."""
    try:
        count = element_count(shape, length * 8)
    except Malformed:
        return -1
    bits = count * DTYPE_BITS.get(dtype, 0)
    if dtype not in DTYPE_BITS:
        return length
    return bits // 8 if bits % 8 == 0 else -1


def _npy(window: Window) -> tuple[Span, Tensor | None]:
    """The array of a .npy file (numpy.lib.format); no tensor for element types that other formats lack."""
    magic = window.get(0, 12, ahead=_HEAD_BYTES)
    wide = magic[6] != 1
    if magic[6] not in (1, 2, 3):
        raise Malformed("an unknown version")
    start = 12 if wide else 10
    header_bytes = int.from_bytes(magic[8:start], "little")
    if header_bytes > _NPY_HEADER_BYTES_MAX:
        raise Malformed("a header longer than any tool writes")
    text = window.get(start, header_bytes)
    start += header_bytes
    if not _NPY_HEADER.fullmatch(text):
        raise Malformed("the header is no plain dictionary")
    try:
        header = ast.literal_eval(text.decode("ascii").strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as exc:
        raise Malformed("the header is no plain dictionary") from exc
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise Malformed("the header lacks a field")
    descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    parts = _NPY_DTYPE.fullmatch(descr) if isinstance(descr, str) else None
    if parts is None or not isinstance(fortran, bool):
        raise Malformed("the elements are objects or records")
    if not isinstance(shape, tuple) or any(type(each) is not int for each in shape):
        raise Malformed("the shape is no tuple of numbers")
    order, kind, digits = parts.groups()
    width = int(digits) * (4 if kind == "U" else 1)
    if width == 0:
        raise Malformed("elements without bytes")
    count = element_count(shape, (window.size - start) // width)
    dtype = _NPY_NAMES.get(kind + digits, "")
    span_item = item_bytes(dtype) if dtype else width if width in (1, 2, 4, 8) and kind in "mM" else 0
    span = Span(start, count * width, span_item)
    if not dtype or (order == ">" and width > 1):
        return span, None
    strides = _column_strides(shape) if fortran and count and sum(each > 1 for each in shape) > 1 else None
    return span, Tensor("array", dtype, shape, start, count * width, strides)


def _column_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for dimension in shape:
        strides.append(step)
        step *= dimension
    return tuple(strides)
