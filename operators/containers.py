"""The container of a file by its first bytes, and whether the file is whole by its structure.

ISO base media (mp4, mov) in boxes, Matroska and WebM in EBML elements, AVI in RIFF chunks: these
tell their own length. Files are untrusted: nothing is read but headers, and what a header claims is
held against the size of the file before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from winnow.operators.errors import MediaError

_BOXES_AT_START = frozenset(
    {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"wide", b"free", b"skip"}
)
_BOXES_OF_BOXES = frozenset(
    {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf"}
)
_MOST_BOXES = 1_000_000
_MOST_INDEX_ENTRIES = 50_000_000
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


def family_of(file: BinaryIO) -> str | None:
    """The container by its first bytes, for the containers that tell their own length."""
    file.seek(0)
    head = file.read(64)
    if head[4:8] in _BOXES_AT_START:
        return "mp4" if head[4:8] == b"ftyp" and head[8:12] != b"qt  " else "mov"
    if head[:4] == _EBML.to_bytes(4, "big"):
        return "webm" if b"webm" in head else "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return None


def check_whole(family: str | None, file: BinaryIO, size: int) -> None:
    """Raise MediaError (truncated, corrupt) where the file's own structure goes beyond its end.

    Checked before FFmpeg sees the file: it would make an index of whatever length a header claims.
    """
    if family in ("mp4", "mov"):
        _check_boxes(file, size)
    elif family in ("matroska", "webm"):
        _check_segment(file, size)
    elif family == "avi":
        _check_riff(file, size)


def _truncated(declared: int, size: int) -> MediaError:
    return MediaError("truncated", f"the file has {size} bytes, its structure needs {declared}")


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start of content, end) of the boxes of ISO 14496-12 in a range of a file."""
    while start + 8 <= end:
        file.seek(start)
        header = file.read(16)
        length, content = int.from_bytes(header[:4], "big"), start + 8
        if length == 1:
            length, content = int.from_bytes(header[8:16], "big"), start + 16
        elif length == 0:
            length = end - start
        if start + length < content:
            return
        yield header[4:8], content, start + length
        start += length


def _check_boxes(file: BinaryIO, size: int) -> None:
    count = samples = edits = 0
    described = False
    stack = [_boxes(file, 0, size)]
    while stack:
        box = next(stack[-1], None)
        if box is None:
            stack.pop()
            continue
        kind, content, end = box
        count += 1
        described |= kind == b"moov"
        # Only what belongs to the film: some writers leave rubbish behind it.
        if end > size and kind in (b"ftyp", b"moov", b"moof", b"mdat"):
            raise _truncated(end, size)
        if kind in _BOXES_OF_BOXES and len(stack) < 8:
            stack.append(_boxes(file, content, min(end, size)))
        elif kind in (b"stsz", b"trun"):
            samples += _samples(file, content, kind, size)
        elif kind == b"elst":
            file.seek(content + 4)
            edits += int.from_bytes(file.read(4), "big")
        # FFmpeg makes an index entry for every sample of every edit.
        if count > _MOST_BOXES or samples * max(1, edits) > _MOST_INDEX_ENTRIES:
            raise MediaError("corrupt", "the index is larger than that of any video")
    if not described:
        raise MediaError("truncated", "the file ends before its index (no moov box)")


def _samples(file: BinaryIO, content: int, kind: bytes, size: int) -> int:
    """How many samples an stsz or trun box announces; no file holds more of them than bytes."""
    file.seek(content + 4)
    first, second = (int.from_bytes(file.read(4), "big") for _ in range(2))
    samples, each = (second, max(1, first)) if kind == b"stsz" else (first, 1)
    if samples * each > size:
        raise _truncated(samples * each, size)
    return samples


def _check_segment(file: BinaryIO, size: int) -> None:
    """Matroska: an EBML header, then the segment, whose length is all ones while it is written."""
    position = 0
    for _ in range(8):
        file.seek(position)
        head = file.read(12)
        identity, after = _ebml_number(head, 0, marked=True)
        length, content = _ebml_number(head, after, marked=False)
        if identity is None or length is None:
            break
        unknown = length == 2 ** (7 * (content - after)) - 1
        if not unknown and position + content + length > size:
            raise _truncated(position + content + length, size)
        if identity == _SEGMENT:
            return
        position += content + length
    raise MediaError("truncated", "the file ends before its content (no segment)")


def _ebml_number(data: bytes, start: int, *, marked: bool) -> tuple[int | None, int]:
    """A number of variable length (RFC 8794, 4) and where it ends; `marked`: with marker bit."""
    if start >= len(data) or data[start] == 0:
        return None, start
    length = 9 - data[start].bit_length()
    raw = data[start : start + length]
    if len(raw) < length:
        return None, start
    number = int.from_bytes(raw, "big")
    return (number if marked else number - (1 << 7 * length)), start + length


def _check_riff(file: BinaryIO, size: int) -> None:
    """AVI: one RIFF chunk, more for files above a gigabyte; a length of 0 was never filled in."""
    position = 0
    while position + 12 <= size:
        file.seek(position)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length == 0:
            return
        if position + 8 + length > size:
            raise _truncated(position + 8 + length, size)
        position += 8 + length + length % 2
