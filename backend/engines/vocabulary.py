"""The text of every token of a model's vocabulary, as its engine writes them, without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backend.engines import OpenOptions, engine_for


@dataclass(frozen=True)
class TokenTexts:
    """texts: of every row of the embedding; special: ids of control tokens; unused: ids of rows that no token of the tokenizer uses."""

    texts: list[str]
    special: list[int]
    unused: list[int]


def token_texts(path: Path, n_rows: int) -> TokenTexts:
    """The vocabulary of the model at `path`, whose embedding has `n_rows` rows. A row that has no token reads [id].

    Raises LayerscopeError for a file that is no model or a tokenizer that cannot be read. Opens transformers or llama_cpp.
    """
    return _of_file(path, n_rows) if engine_for(path) == "gguf" else _of_folder(path, n_rows)


def _of_folder(path: Path, n_rows: int) -> TokenTexts:
    from backend.engines.hf_tokenizer import HfTokenizer

    tokenizer = HfTokenizer(path)
    unused = [i for i in range(n_rows) if not tokenizer.holds(i)]
    return TokenTexts(tokenizer.token_texts(list(range(n_rows))), sorted(i for i in tokenizer.special_ids if i < n_rows), unused)


def _of_file(path: Path, n_rows: int) -> TokenTexts:
    from backend.engines.gguf_context import Model
    from backend.engines.gguf_vocab import Vocabulary
    from backend.files.gguf_header import model_info, read_header

    header = read_header(path)
    model_info(path, header)  # llama.cpp aborts on a crafted file: it sees none that was not checked
    if "tokenizer.ggml.tokens" not in header.metadata:
        return TokenTexts([f"[{i}]" for i in range(n_rows)], [], list(range(n_rows)))
    model = Model(header.files[0], OpenOptions(n_gpu_layers=0), vocabulary_only=True)
    try:
        vocabulary, llama = Vocabulary(model), model.llama
        n = min(vocabulary.size, n_rows)
        attributes = [vocabulary.attributes(i) for i in range(n)]
        texts = [*vocabulary.texts(list(range(n))), *(f"[{i}]" for i in range(n, n_rows))]
    finally:
        model.close()
    control = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
    unused = [*(i for i, flags in enumerate(attributes) if flags & llama.LLAMA_TOKEN_ATTR_UNUSED), *range(n, n_rows)]
    return TokenTexts(texts, [i for i, flags in enumerate(attributes) if flags & control], unused)
