"""The text that a run measures perplexity on, cut into windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.engines import Engine
from backend.errors import LayerscopeError
from backend.estimate import in_bytes

BUNDLED = Path(__file__).resolve().parents[3] / "models" / "evaluation.txt"
MAX_TEXT_BYTES = 64 << 20
MAX_WINDOWS = 10_000
MIN_WINDOW, MAX_WINDOW = 8, 1 << 17  # tokens
_PIECE = 1 << 16  # characters that are tokenized together, cut at the next line's end
_BREAK = "\f"  # a form feed separates documents, which end and begin as the model knows it


@dataclass(frozen=True)
class Text:
    """windows: token ids, all of the same length, each beginning with the model's start token where it asks for one."""

    name: str
    sha256: str
    windows: list[list[int]]
    notes: list[str]

    @property
    def window(self) -> int:
        return len(self.windows[0])

    def to_json(self) -> dict[str, Any]:
        """`text` of a run's manifest."""
        n_tokens = sum(map(len, self.windows))
        return {"name": self.name, "sha256": self.sha256, "n_windows": len(self.windows), "n_tokens": n_tokens, "window": self.window}


def read_text(engine: Engine, path: str = "", max_samples: int = 50, max_length: int = 512) -> Text:
    """The first `max_samples` windows of a UTF-8 file (empty: the text that comes with Layerscope), of `max_length` tokens or the model's context.

    Text runs on from window to window; at a form feed stand the model's end and start tokens, as where documents are packed for training. What is left
    at the end and fills none is left out, so that every window weighs the same.
    Raises LayerscopeError for a file that is no text or too large, and for a text shorter than one window.
    """
    for what, value, low, high in (("windows", max_samples, 1, MAX_WINDOWS), ("tokens of a window", max_length, MIN_WINDOW, MAX_WINDOW)):
        if not low <= value <= high:
            raise LayerscopeError(f"The number of {what} is {value:,}; it must be between {low:,} and {high:,}.")
    file = Path(path) if path else BUNDLED
    data = _read(file)
    size, info = min(max_length, engine.n_ctx), engine.info
    start = [info.bos_id] if info.add_bos and info.bos_id is not None else []
    between = ([info.eos_id] if info.eos_id is not None else []) + start
    body, ids = size - len(start), list[int]()
    for number, document in enumerate(_decoded(data, file.name).split(_BREAK)):
        ids += between if number else []
        for piece in _pieces(document):
            ids += engine.tokenize(piece, add_bos=False)
            if len(ids) >= max_samples * body:
                break
    windows = [start + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)][:max_samples]
    if not windows:
        raise LayerscopeError(f"{file.name} has {len(ids):,} tokens, a text shorter than one window of {size:,}; give a longer text, or a smaller maximal length.")
    notes = [] if size == max_length else [f"A window has {size:,} tokens, the model's context, and not the {max_length:,} that were asked for."]
    if len(windows) < max_samples:
        left = len(ids) - len(windows) * body
        notes.append(f"The text fills {len(windows):,} of the {max_samples:,} windows that were asked for; its last {left:,} tokens fill none and are left out.")
    return Text(file.name if path else "bundled", hashlib.sha256(data).hexdigest(), windows, notes)


def _read(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise LayerscopeError(f"There is no text file {file}.")
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise LayerscopeError(f"{file.name} has {in_bytes(file.stat().st_size)}, and the limit of a text is {in_bytes(MAX_TEXT_BYTES)}.")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise LayerscopeError(f"The text {str(file)[:200]!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _decoded(data: bytes, name: str) -> str:
    if b"\0" in data:
        raise LayerscopeError(f"{name} is no text: byte {data.index(0):,} is 0.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LayerscopeError(f"{name} is not UTF-8 text: byte {error.start:,} cannot be read.") from None


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end
