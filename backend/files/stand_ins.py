"""What lies in a model's place when a download went wrong: a Git LFS pointer, a web page, a server's error, or nothing."""

from __future__ import annotations

SHOWN_BYTES = 256  # of a file, to be looked at


def stand_in(first: bytes) -> str | None:
    """In words to follow "it is", what a binary file that begins with these bytes is instead; None if it is none of the usual ones."""
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not first:
        return "empty"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, a note of where the file is; fetch the file itself (git lfs pull)"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page; the download gave a page instead of the file"
    if text.startswith((b'{"', b"{'", b'{ "')):
        return "JSON text, such as a server's error; the download gave that instead of the file"
    return None
