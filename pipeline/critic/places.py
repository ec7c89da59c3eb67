"""Where a row of a sheet says that its video is: an address, or a path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")


def _escape(found: re.Match[str]) -> str:
    return found[0].upper() if found[1] else "%25"


def canonical_url(text: str) -> str:
    """The address with everything percent-encoded that must be, once; what is encoded already stays.

    Raises ValueError for what is no address.
    """
    parts = urlsplit(text.strip())
    if not parts.hostname:
        raise ValueError("no host")
    host = parts.hostname if ":" not in parts.hostname else f"[{parts.hostname}]"
    host = host.encode("idna").decode() if not host.isascii() else host
    place = host if parts.port is None else f"{host}:{parts.port}"
    if parts.username is not None:
        raise ValueError("an address with a user name or password")
    path, query = (
        quote(_ESCAPE.sub(_escape, part), safe="/%:@!$&'()*+,;=~" + more)
        for part, more in ((parts.path, ""), (parts.query, "?"))
    )
    return urlunsplit((parts.scheme.lower(), place, path, query, ""))


@dataclass(frozen=True, slots=True)
class Place:
    uri: str
    is_remote: bool
    parts: tuple[str, ...] = ()
    """Host and folders down to the file's name; empty where it names nothing."""
    problem: str | None = None


def read_place(cell: Any, link: str | None) -> Place:
    """The place that a cell names, by its text if that is an address, otherwise by its link."""
    text = "" if cell is None else str(cell).strip()
    if link is not None and not _SCHEME.match(text):
        text = link
    if not text:
        return Place("", False, problem="the row names no video")
    if "\N{REPLACEMENT CHARACTER}" in text or "\0" in text:
        return Place(text, False, problem="the name has lost characters to a wrong encoding")
    if not _SCHEME.match(text):
        return Place(text, False, tuple(part for part in Path(text).parts if part != "/"))
    try:
        url = canonical_url(text)
    except ValueError as error:
        # A password must not go on into results and reports.
        shown = re.sub(r"//[^/]*@", "//", text)
        return Place(shown, True, problem=f"this cannot be used as an address: {error}")
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http"):
        return Place(
            url, True, problem=f"{parts.scheme}:// is not read here: give https, or a path"
        )
    # Decoded after it was split: an encoded slash must not lead elsewhere.
    names = [unquote(part) for part in parts.path.split("/") if part]
    return Place(url, True, (parts.netloc, *names))


def is_file(path: Path) -> bool:
    """Also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_plain(parts: tuple[str, ...]) -> bool:
    """Whether they lead down into a folder, and nowhere else."""
    return not any(part in ("", ".", "..") or set("/\\\0") & set(part) for part in parts)
