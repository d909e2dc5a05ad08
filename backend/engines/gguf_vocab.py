"""The tokenizer inside a GGUF file, through llama.cpp: text to ids and back. Ids are checked here; llama.cpp aborts on a wrong one."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

from backend.engines.gguf_context import Model
from backend.errors import LayerscopeError
from backend.prompt_text import prompt_bytes

_MAX_TEXT_BYTES = 64 << 20


class Vocabulary:
    """The vocabulary of an open model; it dies with the model."""

    def __init__(self, model: Model) -> None:
        self._model, self._llama = model, model.llama
        self.size: int = self._llama.llama_vocab_n_tokens(self._vocab)
        self.add_bos: bool = self._llama.llama_vocab_get_add_bos(self._vocab)
        self._texts: dict[int, str] = {}  # what was asked for before: a trace names thousands of tokens
        bos = self._llama.llama_vocab_bos(self._vocab)
        self.bos_id: int | None = bos if 0 <= bos < self.size else None

    @property
    def _vocab(self) -> Any:
        return self._model.llama.llama_model_get_vocab(self._model.opened())

    def tokenize(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`; what looks like a special token is plain text. add_bos None: as the file asks."""
        raw = prompt_bytes(text)
        if len(raw) > _MAX_TEXT_BYTES:
            raise LayerscopeError(f"The prompt has {len(raw):,} bytes, the limit is {_MAX_TEXT_BYTES:,}.")
        room = len(raw) + 16
        ids = (ctypes.c_int32 * room)()
        n = self._llama.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, False)
        if n < 0:
            raise LayerscopeError(f"llama.cpp could not tokenize the prompt of {len(raw):,} bytes.")
        first = [self.bos_id] if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        return first + ids[:n]

    def texts(self, ids: list[int]) -> list[str]:
        """The text of each token alone. Bytes that are no UTF-8 on their own read <0xE2>; special tokens read as they are spelled."""
        for token in {*ids} - self._texts.keys():
            self._texts[token] = _readable(self._piece(self._checked(token)))
        return [self._texts[token] for token in ids]

    def detokenize(self, ids: list[int]) -> str:
        """The text of the ids together, special tokens left out."""
        tokens = (ctypes.c_int32 * len(ids))(*[self._checked(token) for token in ids])
        raw = _grown(lambda buffer, size: self._llama.llama_detokenize(self._vocab, tokens, len(ids), buffer, size, False, False))
        return raw.decode("utf-8", "replace")

    def attributes(self, token: int) -> int:
        """llama.cpp's flags of a token (LLAMA_TOKEN_ATTR_*)."""
        return int(self._llama.llama_vocab_get_attr(self._vocab, self._checked(token)))

    def ends(self, token: int) -> bool:
        """Whether generation stops after this token."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, self._checked(token)))

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.size:
            raise LayerscopeError(f"Token id {token} is outside the vocabulary of {self.size:,}.")
        return int(token)

    def _piece(self, token: int) -> bytes:
        piece = _grown(lambda buffer, size: self._llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, True))
        # llama.cpp renders unused tokens as nothing; their spelling is what a reader wants to see.
        return piece or self._llama.llama_vocab_get_text(self._vocab, token)


def _grown(write: Callable[[Any, int], int]) -> bytes:
    """Call `write(buffer, size)`, again with the size it asks for by a negative answer if the first buffer is too small."""
    buffer = ctypes.create_string_buffer(256)
    n = write(buffer, len(buffer))
    if n < 0:
        buffer = ctypes.create_string_buffer(-n)
        n = write(buffer, len(buffer))
    return buffer.raw[:n]


def _readable(raw: bytes) -> str:
    return re.sub("[\udc80-\udcff]", lambda m: f"<0x{ord(m[0]) - 0xDC00:02X}>", raw.decode("utf-8", "surrogateescape"))
