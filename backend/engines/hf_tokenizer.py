"""The tokenizer of a model folder: text to ids and back, and the text of every single token.

Only fast tokenizers (tokenizer.json) are read; no code of the folder's own is run. A folder without one still runs on ids.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from backend.errors import LayerscopeError
from backend.prompt_text import prompt_bytes


def first_line(error: Exception) -> str:
    """What a library said, short enough to stand in a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


class HfTokenizer:
    """A fast tokenizer, or none at all: then `tokenize` raises one sentence and tokens are shown as [id]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokenizer: Any = None
        if (folder / "tokenizer.json").is_file():
            self._tokenizer = _load(folder)

    @property
    def size(self) -> int:
        """Tokens of the vocabulary itself: words that were added later may lie beyond an embedding that was never enlarged for them."""
        return self._tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) if self._tokenizer else 0

    @property
    def bos_id(self) -> int | None:
        return self._tokenizer.bos_token_id if self._tokenizer else None

    @property
    def eos_id(self) -> int | None:
        return self._tokenizer.eos_token_id if self._tokenizer else None

    @cached_property
    def adds_bos(self) -> bool:
        return self._tokenizer is not None and self.bos_id is not None and self.tokenize("a")[:1] == [self.bos_id]

    def tokenize(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`; what looks like a special token in it is plain text. add_bos None: what the tokenizer does by itself."""
        if self._tokenizer is None:
            raise LayerscopeError(f"{self.folder.name} has no tokenizer.json, so it takes token ids only, not text.")
        prompt_bytes(text)
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_bos is None, split_special_tokens=True)["input_ids"]
        if add_bos:
            if self.bos_id is None:
                raise LayerscopeError(f"The tokenizer of {self.folder.name} has no beginning-of-sequence token to add.")
            ids = [self.bos_id, *ids]
        return ids

    def token_texts(self, ids: list[int]) -> list[str]:
        """Each token's own text; bytes that are no UTF-8 alone as <0xE2>, special tokens as they are written."""
        return [self._text(i) for i in ids]

    def detokenize(self, ids: list[int]) -> str:
        """The text of all ids together, special tokens left out."""
        if self._tokenizer is None:
            return "".join(self.token_texts(ids))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def holds(self, token_id: int) -> bool:
        """Whether the tokenizer has a token of this id: an embedding is often padded with rows that no token uses."""
        return self._tokenizer is not None and self._tokenizer.convert_ids_to_tokens(token_id) is not None

    @property
    def special_ids(self) -> set[int]:
        return {int(i) for i, token in self._tokenizer.added_tokens_decoder.items() if token.special} if self._tokenizer else set()

    def _text(self, token_id: int) -> str:
        token = self._tokenizer.convert_ids_to_tokens(token_id) if self._tokenizer else None
        if token is None:
            return f"[{token_id}]"
        if token_id in self._added:
            return self._added[token_id]
        if self._decoder_kinds & {"ByteLevel"}:
            return _printable(bytes(_BYTE_OF[c] for c in token)) if all(c in _BYTE_OF for c in token) else token
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        if byte:
            return _printable(bytes([int(byte[1], 16)]))
        return token.replace("\u2581", " ")

    @cached_property
    def _added(self) -> dict[int, str]:
        """Tokens that stand outside the vocabulary's own spelling: special tokens, and words added later."""
        return {int(i): str(token.content) for i, token in self._tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _decoder_kinds(self) -> set[str]:
        """The types in the decoder's chain: ByteLevel spells bytes as GPT-2 does, the others as SentencePiece does."""
        decoder = self._tokenizer.backend_tokenizer.decoder
        if decoder is None:
            return set()
        state = json.loads(decoder.__getstate__())
        return {part["type"] for part in (state, *state.get("decoders", ()))}


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise LayerscopeError(f"The tokenizer of {folder.name} cannot be read: {first_line(error)}.") from error
    if not tokenizer.is_fast:
        raise LayerscopeError(f"The tokenizer of {folder.name} is no fast tokenizer, and Layerscope reads only those.")
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, inverted (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), ord("\u00ff") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


_BYTE_OF = _byte_alphabet()


def _printable(data: bytes) -> str:
    """UTF-8 where it is, and <0xE2> for every byte that is not."""
    text = data.decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
