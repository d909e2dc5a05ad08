"""The shelf: which models there are, what their headers say, and from a name to a file that may be opened.

Models come from three places: presets (config/presets.toml), the configured folders, and the Hugging Face cache as far as it is
on this disk. Listing reads headers alone, through the two bounded readers; nothing here imports torch or llama_cpp.

A name that arrives from the browser is `confined`: what it leads to, symbolic links followed, must lie inside those places.
The command line and the Python API may name any path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.engines import engine_for
from backend.errors import LayerscopeError
from backend.files.file_stamps import Stamp, stamps
from backend.files.gguf_split import one_a_model, parts_of, whole_name
from backend.model_info import ModelInfo
from backend.settings import Settings

PRESETS_FILE = Path(__file__).resolve().parent.parent / "config" / "presets.toml"

# Folders deeper than this below a models folder are not searched.
MAX_DEPTH = 6
MAX_ENTRIES = 2000

PRESET, FOLDER, HUB = "preset", "models folder", "Hugging Face cache"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Prompt:
    """An example prompt."""

    label: str
    text: str


@dataclass(frozen=True)
class Preset:
    """One row of presets.toml: a model offered by name."""

    name: str
    description: str = ""
    path: Path | None = None
    hub: str = ""
    variant_of: str = ""  # a GGUF made from that preset on first use
    quantization: str = ""
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class ModelEntry:
    """One model on the shelf. Exactly one of `info` and `error` is set."""

    name: str
    kind: str  # "gguf" or "hf"
    path: Path
    origin: str  # "preset", "models folder" or "Hugging Face cache"
    info: ModelInfo | None = None
    error: str | None = None  # one sentence: why it cannot be opened
    n_bytes: int = 0  # size of the weights on disk
    description: str = ""
    prompts: tuple[Prompt, ...] = ()
    made_on_first_use: bool = False  # its file does not exist yet; `Shelf.ready` makes it

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": str(self.path)}


def read_presets(path: Path = PRESETS_FILE) -> tuple[Preset, ...]:
    """The presets of a TOML file; relative paths count from the folder above the file's own. Raises LayerscopeError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        prompts = {name: tuple(Prompt(**row) for row in rows) for name, rows in data.get("prompts", {}).items()}
        presets = []
        for row in data.get("preset", []):
            place = path.parent.parent / row["path"] if "path" in row else None
            presets.append(Preset(**{**row, "path": place, "prompts": prompts.get(row.get("prompts", ""), ())}))
    except OSError as error:
        raise LayerscopeError(f"The presets {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, TypeError, KeyError) as error:
        raise LayerscopeError(f"The presets {path} are damaged: {error}.") from None
    names = [preset.name for preset in presets]
    for preset in presets:
        if names.count(preset.name) > 1 or (preset.variant_of and preset.variant_of not in names):
            raise LayerscopeError(f"The presets {path} name {preset.name!r} twice, or as a variant of {preset.variant_of!r}, which is not there.")
    return tuple(presets)


class Describer:
    """`describe` with a memory: a header is read again only when the file changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], ModelInfo | str] = {}

    def __call__(self, path: Path) -> ModelInfo:
        key = str(path), fingerprint(path)
        if key not in self._known:
            try:
                self._known[key] = describe(path)
            except LayerscopeError as error:
                self._known[key] = str(error)
        known = self._known[key]
        if isinstance(known, str):
            raise LayerscopeError(known)
        return known


def describe(path: Path) -> ModelInfo:
    """What the headers of a model file or folder say. Raises LayerscopeError with one sentence saying why it cannot be opened."""
    if "\0" in str(path):
        raise LayerscopeError("A model's path cannot hold a NUL character.")
    try:
        if path.is_dir():
            from backend.files import hf_config

            return hf_config.model_info(path)
        if not path.exists() and path.is_symlink():
            raise LayerscopeError(f"{path.name} is a symbolic link that leads nowhere.")
        if not path.exists():
            raise LayerscopeError(f"There is no model file or folder at {path}.")
        if path.suffix.lower() in _PICKLES:
            raise LayerscopeError(f"{path.name} holds pickled weights, which can run code when read; convert them to safetensors or GGUF.")
        if path.suffix.lower() == ".safetensors":
            raise LayerscopeError(f"{path.name} is a single weights file; name the folder that holds it and its config.json.")
        if path.suffix.lower() != ".gguf" or not path.is_file():
            raise LayerscopeError(f"{path.name} is no model: Layerscope opens .gguf files and folders with config.json and safetensors.")
        from backend.files import gguf_header

        return gguf_header.model_info(path, gguf_header.read_header(path))
    except OSError as error:
        raise LayerscopeError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from None


def fingerprint(path: Path) -> Stamp:
    """Changes whenever the model may have changed: stamps of its file, of every part, or of each file in its folder that is read."""
    return stamps(_files(path))


def _files(path: Path) -> tuple[Path, ...]:
    """The files that a model is read from."""
    try:
        return (path, *sorted([*path.glob("*.json"), *path.glob("*.safetensors")])) if path.is_dir() else parts_of(path)
    except OSError:
        return (path,)  # a folder that cannot be listed: its own stamp tells when that changes


def identity(path: Path) -> str:
    """A name for the bytes at `path` as far as size and time tell them apart: what was computed from a model is kept under it."""
    return hashlib.sha256(repr((os.path.realpath(path), *fingerprint(path))).encode("utf-8", "surrogateescape")).hexdigest()


class Shelf:
    """The models within reach. Safe to use from several threads; cheap to list again."""

    def __init__(self, models_dirs: Iterable[Path], variants_dir: Path, hf_cache: Path | None = None, presets: tuple[Preset, ...] | None = None) -> None:
        """`variants_dir` is where GGUF variants of presets are made, and is searched like `models_dirs`; `hf_cache` None leaves that out."""
        self.presets = read_presets() if presets is None else presets
        self.models_dirs = tuple(Path(folder) for folder in models_dirs)
        self.variants_dir, self.hf_cache = Path(variants_dir), hf_cache
        self._describe = Describer()

    @classmethod
    def from_settings(cls, settings: Settings) -> Shelf:
        return cls(settings.models_dirs, settings.variants_dir, settings.hf_cache if settings.use_hf_cache else None, read_presets(settings.presets_file))

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that confined paths must lie in."""
        presets = tuple(preset.path for preset in self.presets if preset.path)
        return (*self.models_dirs, self.variants_dir, *presets, *((self.hf_cache,) if self.hf_cache else ()))

    # -- listing -------------------------------------------------------------------------------------------------------------

    def entries(self) -> list[ModelEntry]:
        """Everything on the shelf: presets first, then the models folders, then the Hugging Face cache. Names are unique."""
        entries: dict[str, ModelEntry] = {}
        taken: set[str] = set()
        for entry in (*self._presets(), *self._folders(), *self._hub()):
            place = os.path.realpath(entry.path)
            if place in taken and entry.origin != PRESET:
                continue  # a folder found twice, or the file of a preset
            taken.add(place)
            name = entry.name if entry.name not in entries else f"{entry.path.parent.name}/{entry.path.name}"
            if name not in entries and len(entries) < MAX_ENTRIES:
                entries[name] = dataclasses.replace(entry, name=name, info=entry.info and dataclasses.replace(entry.info, name=name))
        return list(entries.values())

    def _presets(self) -> Iterator[ModelEntry]:
        for preset in self.presets:
            entry = self._variant(preset) if preset.variant_of else self._preset(preset)
            if entry is not None:
                yield dataclasses.replace(entry, name=preset.name, origin=PRESET, description=preset.description, prompts=preset.prompts)

    def _preset(self, preset: Preset) -> ModelEntry | None:
        path = preset.path or _snapshot(self.hf_cache, preset.hub)
        return self._entry(preset.name, path, PRESET) if path else None

    def _variant(self, preset: Preset) -> ModelEntry | None:
        """A GGUF variant: as its file says, or, before it is made, as its source folder lets expect."""
        path = self.variants_dir / f"{preset.name}.gguf"
        if path.exists():
            return self._entry(preset.name, path, PRESET)
        base = next(each for each in self.presets if each.name == preset.variant_of)
        source = self._preset(base)
        if source is None or source.info is None:
            return dataclasses.replace(source, kind="gguf", path=path) if source else None
        bits = _BITS_PER_WEIGHT.get(preset.quantization, 16.0)
        info = dataclasses.replace(source.info, source=str(path), engine="gguf", architecture="llama", quantization=preset.quantization,
                                   n_bytes=int(source.info.n_params * bits / 8), weight_types={})  # fmt: skip
        return ModelEntry(preset.name, "gguf", path, PRESET, info, None, info.n_bytes, made_on_first_use=True)

    def _folders(self) -> Iterator[ModelEntry]:
        for folder in (*self.models_dirs, self.variants_dir):
            for path in one_a_model(_find_models(folder)):
                yield self._entry(path.relative_to(folder).with_name(whole_name(path)).as_posix(), path, FOLDER)

    def _hub(self) -> Iterator[ModelEntry]:
        for repository in sorted(self.hf_cache.glob("models--*")) if self.hf_cache else ():
            name = repository.name.removeprefix("models--").replace("--", "/")
            path = _snapshot(self.hf_cache, name)
            if path is None:
                continue
            if _holds_one_of(path, ("config.json",)) and any(path.glob("*.safetensors")):
                yield self._entry(name, path, HUB)
            for file in one_a_model(_find_models(path)):
                if file.suffix.lower() == ".gguf":  # large models lie one folder deeper, in parts
                    yield self._entry(f"{name}/{file.relative_to(path).with_name(whole_name(file)).as_posix()}", file, HUB)

    def _entry(self, name: str, path: Path, origin: str) -> ModelEntry:
        kind = engine_for(path)
        try:
            self._confine(path)
            info = self._describe(path)
        except LayerscopeError as error:
            return ModelEntry(name, kind, path, origin, error=str(error))
        return ModelEntry(name, kind, path, origin, info, None, info.n_bytes)

    # -- from a name to a model ------------------------------------------------------------------------------------------------

    def resolve(self, source: str, confined: bool = True) -> ModelEntry:
        """The model that `source` names: a name on the shelf, or a path. Makes nothing; see `ready`.

        Raises LayerscopeError if there is no such model, it cannot be opened, or it is confined and lies elsewhere.
        """
        if not source or "\0" in source or len(source) > 4096:
            raise LayerscopeError(f"{source[:80]!r} is no model's name.")
        found = next((entry for entry in self.entries() if entry.name == source), None)
        if found is None:
            path = Path(os.path.abspath(os.path.expanduser(source)))
            if confined:
                self._confine(path)
            if not path.exists():
                raise LayerscopeError(f"There is no model {source[:200]!r}: it is neither a name on the shelf nor a path.")
            places = {os.path.realpath(part) for part in parts_of(path)}
            known = next((entry for entry in self.entries() if os.path.realpath(entry.path) in places), None)
            info = self._describe(path)
            found = known or ModelEntry(Path(whole_name(path)).stem if path.is_file() else path.name, info.engine, path, FOLDER, info, None, info.n_bytes)
        if found.error:
            raise LayerscopeError(found.error)
        return found

    def ready(self, entry: ModelEntry) -> Path:
        """The file or folder to open, made first if it is a variant whose file is missing or older than its source.

        For the worker and the command line: making a variant runs llama.cpp's quantizer.
        """
        preset = next((each for each in self.presets if each.name == entry.name and each.variant_of), None)
        if preset is None:
            return entry.path
        from backend.files.demo import ensure_demo_variants

        base = next(each for each in self.presets if each.name == preset.variant_of)
        assert base.path is not None, f"preset {base.name} has variants and therefore a path"
        self.variants_dir.mkdir(parents=True, exist_ok=True)
        return ensure_demo_variants(base.path.parent, self.variants_dir, [preset.name])[preset.name]

    def path_for(self, source: str) -> Path:
        """The file or folder that any name or path on this machine leads to, made first where need be. Not for the web process."""
        return self.ready(self.resolve(source, confined=False))

    def _confine(self, path: Path) -> None:
        """Raise LayerscopeError unless `path`, and every weights or config file of it, really lies under the roots."""
        roots = [os.path.realpath(root) for root in self.roots]
        for file in _files(path):
            real = os.path.realpath(file)
            if not any(real == root or real.startswith(root + os.sep) for root in roots):
                raise LayerscopeError(f"{path.name[:200]!r} lies outside the configured model folders; add its folder to LAYERSCOPE_MODELS_DIRS to use it.")


# Measured file sizes of llama.cpp's quantizer, rounded up, for an estimate before the file exists.
_BITS_PER_WEIGHT = {"F32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q4_K_M": 6.0}


def _find_models(folder: Path, depth: int = 0) -> Iterator[Path]:
    """GGUF files and folders with a config.json or an adapter's below `folder`, in order of name. Linked folders are not followed."""
    try:
        children = sorted(folder.iterdir())
    except OSError:
        return  # a models folder need not exist, and one that cannot be read holds nothing for us
    for child in children:
        if child.name.startswith("."):
            continue
        if child.suffix.lower() == ".gguf" and not child.is_dir():
            yield child
        elif child.is_dir() and _holds_one_of(child, ("config.json", "adapter_config.json")):
            yield child
        elif child.is_dir() and not child.is_symlink() and depth < MAX_DEPTH:
            yield from _find_models(child, depth + 1)


def _holds_one_of(folder: Path, names: Iterable[str]) -> bool:
    """False too for a folder that may not be looked into: it is passed over, and hides no other."""
    try:
        return any((folder / name).exists() for name in names)
    except OSError:
        return False


def _snapshot(hf_cache: Path | None, hub_id: str) -> Path | None:
    """The newest snapshot of a hub repository in the cache: what refs/main names, else the youngest folder."""
    if hf_cache is None or not hub_id or ".." in hub_id:
        return None
    repository = hf_cache / f"models--{hub_id.replace('/', '--')}"
    main = repository / "refs" / "main"
    if main.is_file() and main.stat().st_size <= 64:
        named = repository / "snapshots" / main.read_text(encoding="ascii", errors="replace").strip()
        if named.is_dir() and named.parent == repository / "snapshots":
            return named
    snapshots = sorted((repository / "snapshots").glob("*/"), key=lambda path: path.stat().st_mtime)
    return snapshots[-1] if snapshots else None
