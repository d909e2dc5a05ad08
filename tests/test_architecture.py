"""Who may import whom: the layers of the program, held by the syntax tree."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "llama_cpp"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def offenders(folder: str, forbidden: tuple[str, ...], top_level_only: bool = False) -> list[str]:
    bad = []
    for path in sorted((ROOT / folder).rglob("*.py")) if (ROOT / folder).is_dir() else [ROOT / folder]:
        hits = {name for name in imports(path, top_level_only) if any(name == f or name.startswith(f + ".") for f in forbidden)}
        bad += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(hits)]
    return bad


def third_party(folder: str) -> set[str]:
    tops = {name.split(".")[0] for path in (ROOT / folder).rglob("*.py") for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"backend", "components", "config", "pages", "__future__"}


def test_analysis_is_arrays_to_arrays():
    assert third_party("backend/analysis") <= {"numpy", "numba", "scipy", "sklearn", "umap"}
    allowed = ("backend.analysis", "backend.compute", "backend.model_info", "backend.reports.model_graph")
    inside = {line.split(": ")[1] for line in offenders("backend/analysis", ("backend", "components"))} - {"backend"}
    assert all(name.startswith(allowed) for name in inside), inside


def test_figures_are_arrays_to_plotly():
    assert third_party("components/figures") <= {"numpy", "plotly"}
    assert not offenders("components/figures", ("backend.engines", "backend.experiments", "backend.trace", "backend.library"))


def test_pages_never_reach_engines_or_files():
    forbidden = ("backend.engines", "backend.experiments", "h5py", "torch", "transformers", "llama_cpp", "config")
    assert not offenders("pages", forbidden)
    assert not offenders("components", forbidden)


def test_nothing_heavy_is_imported_before_an_engine_opens():
    for folder in ("backend", "components", "pages", "config", "app.py"):
        heavy = [line for line in offenders(folder, tuple(HEAVY), top_level_only=True)]
        assert not heavy, heavy


def test_documents_are_set_where_they_are_written():
    """matplotlib and reportlab take a second to load: only what prints has them, and nothing else loads that at its top."""
    writers = {"plot_style", "plot_on_page", "sensitivity_panels", "sensitivity_effects", "sensitivity_plots", "sensitivity_text", "sensitivity_report", "sensitivity_compared"}
    for folder in ("backend", "components", "pages", "config", "app.py"):
        direct = {line.split(":")[0] for line in offenders(folder, ("matplotlib", "reportlab"))}
        assert direct <= {f"backend/reports/{name}.py" for name in writers}, direct
        early = {line.split(":")[0] for line in offenders(folder, tuple(f"backend.reports.{name}" for name in writers), top_level_only=True)}
        assert early <= {f"backend/reports/{name}.py" for name in writers}, early
        assert not offenders(folder, ("matplotlib.pyplot", "matplotlib.pylab")), "figures are objects; pyplot keeps state for the whole process"


def test_nothing_imports_pages_and_few_read_the_settings():
    for folder in ("backend", "components", "config"):
        assert not offenders(folder, ("pages",))
    readers = {line.split(":")[0] for line in offenders("backend", ("config",))}
    assert readers <= {"backend/__init__.py", "backend/__main__.py", "backend/worker.py"}, readers


def test_engines_rest_on_the_vocabulary_alone():
    forbidden = ("backend.trace", "backend.tracefile", "backend.library", "backend.jobs", "backend.experiments", "components", "dash", "plotly", "h5py")
    assert not offenders("backend/engines", forbidden)


def test_no_module_reads_pickles():
    forbidden = ("pickle", "joblib", "dill", "shelve", "marshal", "torch.load")
    for folder in ("backend", "components", "pages", "config", "app.py"):
        assert not offenders(folder, forbidden)
