"""python -m backend moe query | analyze | presets | ablate, and memory-info: routing of experts from the command line. docs/moe.md has the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from backend.commands import moe_ablate, moe_compare
from backend.errors import LayerscopeError

SCHEMA = "layerscope.moe/1"
MAX_PROMPTS, MAX_TRACES = 200, 2000
Preset = Annotated[str, typer.Option("--preset", "-p", help="A run preset (see `moe presets`), or a model's name (see `models`).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def register(app: typer.Typer, bar: Callable[[], Any], settings: Callable[[], Any], keep: Callable[[Any], None]) -> None:
    """Add the commands to the application. bar: makes a progress callback that is a context manager; settings: reads the configuration;
    keep: puts a finished trace into the library."""
    group = typer.Typer(no_args_is_help=True, help="Routing of mixture-of-experts models.")
    app.add_typer(group, name="moe")

    def traced(*arguments: Any) -> Any:
        trace = _trace(*arguments)
        keep(trace.path)
        return trace

    moe_ablate.register(group, bar, lambda name: _opened(settings(), name), SCHEMA)
    moe_compare.register(group, bar, lambda name: _opened(settings(), name), traced, SCHEMA)
    _add_query(group, bar, settings, keep)
    _add_analyze(group, bar, settings, keep)
    _add_usage(group, settings)
    _add_presets(app, group, settings)


def _add_query(group: typer.Typer, bar: Callable[[], Any], settings: Callable[[], Any], keep: Callable[[Any], None]) -> None:
    @group.command()
    def query(
        preset: Preset,
        prompt: Annotated[str, typer.Option("--prompt", help="The text to run.")],
        max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="Tokens to generate. Default: the preset's.")] = None,
        verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also every token's experts in every layer.")] = False,
        as_json: Json = False,
    ) -> None:
        """Run one prompt and print its answer and how its tokens were routed.

        Example: python -m backend moe query --preset demo-moe --prompt "The capital of France is" --verbose
        """
        from backend.reports.routing import routing_report

        with _opened(settings(), preset) as (chosen, model), bar() as progress:
            trace = _trace(model, chosen, prompt, max_new_tokens, progress)
            keep(trace.path)
        report = routing_report(trace)
        if as_json:
            typer.echo(json.dumps({"schema": SCHEMA, "preset": preset, **_head(trace), **report, "tokens": _tokens(trace)}, ensure_ascii=False))
            return
        typer.echo(describe(report, trace.info.n_experts))
        if verbose:
            typer.echo("\n" + "\n".join(_verbose_lines(trace)))


def _add_analyze(group: typer.Typer, bar: Callable[[], Any], settings: Callable[[], Any], keep: Callable[[Any], None]) -> None:
    @group.command()
    def analyze(
        preset: Preset,
        prompts: Annotated[list[str], typer.Option("--prompts", help="The prompts: --prompts A B C, or the option again for each.")],
        more: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Further prompts.", show_default=False)] = None,
        compare: Annotated[bool, typer.Option("--compare", help="Also compare every two prompts.")] = False,
        output: Annotated[Path | None, typer.Option("--output", "-o", help="A file for the JSON object. Default: stdout.")] = None,
        max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate after each prompt.")] = 0,
        full: Annotated[bool, typer.Option("--full", help="Also pairs of experts, transitions, texts, and each token's margin and entropy.")] = False,
    ) -> None:
        """Run several prompts and write the routing of each as JSON, with every two compared.

        Example: python -m backend moe analyze --preset demo-moe --prompts "7 plus 5" "The capital of France" --compare --output results.json
        """
        asked = [*prompts, *(more or ())]
        if len(asked) > MAX_PROMPTS:
            raise LayerscopeError(f"{len(asked)} prompts are asked for, and {MAX_PROMPTS} is the limit; use `batch` for more.")
        if output is not None and not output.absolute().parent.is_dir():
            raise LayerscopeError(f"There is no folder {output.absolute().parent} to write {output.name} in.")
        text = json.dumps(_analyze(settings(), preset, asked, compare, max_new_tokens, full, bar, keep), ensure_ascii=False, indent=2)
        if output is None:
            typer.echo(text)
            return
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LayerscopeError(f"{output} cannot be written: {error.strerror}.") from None
        typer.echo(f"{len(asked)} prompts written to {output}")


def _add_usage(group: typer.Typer, settings: Callable[[], Any]) -> None:
    @group.command()
    def usage(model: Annotated[str, typer.Option("--model", "-m", help="The model's name, as its traces have it.")]) -> None:
        """Read every trace of a model and print, as JSON, which experts served which category and token, in time, and how alike categories are.

        Example: python -m backend moe usage --model demo-moe
        """
        from backend.library import Library
        from backend.reports.expert_usage import find_usage, frequent_tokens, usage_report
        from backend.trace import Trace

        library = Library.from_settings(settings())
        ids = [each.id for each in library.traces(model=model, limit=MAX_TRACES) if "expert_indices" in each.sites][::-1]

        def opened() -> Any:
            for trace_id in ids:
                with Trace(library.path_of(trace_id)) as trace:
                    yield trace

        found = find_usage(opened(), frequent_tokens(opened()))
        typer.echo(json.dumps({"schema": SCHEMA, "model": model, **usage_report(found)}, ensure_ascii=False))


def _add_presets(app: typer.Typer, group: typer.Typer, settings: Callable[[], Any]) -> None:
    @group.command()
    def presets(as_json: Json = False) -> None:
        """List the run presets of config/presets.toml: add your own there."""
        from backend.run_presets import read_run_presets

        found = settings()
        on_shelf = {entry.name for entry in _shelf(found).entries() if entry.error is None}
        rows = [{**preset.to_json(), "on_this_disk": preset.model in on_shelf} for preset in read_run_presets(found.presets_file)]
        if as_json:
            typer.echo(json.dumps({"presets": rows}, ensure_ascii=False))
            return
        for row in rows:
            precision = row["quantize"] if row["quantize"] != "none" else row["dtype"]
            how = f"{precision}, {row['device']}, {row['max_new_tokens']} tokens, T {row['temperature']:g}, top-p {row['top_p']:g}"
            typer.echo(f"{row['name']:<28} {row['model']:<40} {how}{'' if row['on_this_disk'] else '   (not on this disk)'}")

    @app.command("memory-info")
    def memory_info(
        preset: Preset,
        tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a run, for the cache and the capture.", min=1, max=10_000_000)] = 2048,
        as_json: Json = False,
    ) -> None:
        """What a preset takes: parameters, precision, memory of the weights, all with cache and capture, and whether that fits here.

        Example: python -m backend memory-info --preset mixtral-8x7b-instruct-4bit
        """
        data = memory(settings(), preset, tokens)
        typer.echo(json.dumps(data, ensure_ascii=False) if as_json else _memory_text(data))


def memory(settings: Any, name: str, tokens: int) -> dict[str, Any]:
    """The JSON of memory-info; all sizes in bytes."""
    from backend.estimate import ENGINE_BYTES, activation_bytes, available_memory, kv_bytes
    from backend.run_presets import find, info_of, read_run_presets, weight_bytes
    from backend.sites import STANDARD_SITES

    shelf = _shelf(settings)
    preset = find(read_run_presets(settings.presets_file), name, shelf)
    info, here = info_of(preset, shelf)
    weights, precision = weight_bytes(preset, info)
    sites = [site for site in STANDARD_SITES if info.is_moe or not site.startswith(("router", "expert"))]
    cache, capture = kv_bytes(info, tokens), activation_bytes(info, tokens, sites)
    total = weights + cache + capture + ENGINE_BYTES[info.engine]
    free = available_memory()
    return {
        "preset": name, "model": preset.model, "on_this_disk": here, "parameters": info.n_params, "precision": precision, "device": preset.device, "tokens": tokens,
        "weight_bytes": weights, "cache_bytes": cache, "capture_bytes": capture, "total_bytes": total, "free_bytes": free,
        "recommendation": _recommendation(preset.device, total, weights, free, here),
    }  # fmt: skip


def _recommendation(device: str, total: int, weights: int, free: int, here: bool) -> str:
    from backend.estimate import in_bytes

    missing = "" if here else " The model is not on this disk yet."
    if device.startswith("cuda"):
        return f"A GPU with {in_bytes(int(total * 1.1))} of memory or more; the weights alone take {in_bytes(weights)}.{missing}"
    if total <= free:
        return f"It fits: {in_bytes(total)} of the {in_bytes(free)} that are free.{missing}"
    return f"It does not fit: {in_bytes(total)} are needed and {in_bytes(free)} are free; take a variant with fewer bits, a shorter run, or another machine.{missing}"


def _memory_text(data: dict[str, Any]) -> str:
    from backend.estimate import in_bytes

    rows = [("model", data["model"]), ("parameters", f"{data['parameters'] / 1e9:,.2f} B" if data["parameters"] >= 1e9 else f"{data['parameters'] / 1e6:,.1f} M"),
            ("precision", data["precision"]), ("weights", in_bytes(data["weight_bytes"])), (f"cache, {data['tokens']:,} tokens", in_bytes(data["cache_bytes"])),
            ("capture, one layer at a time", in_bytes(data["capture_bytes"])), ("total, with the engine", in_bytes(data["total_bytes"]))]  # fmt: skip
    return "\n".join([f"{name:<30} {value}" for name, value in rows] + ["", data["recommendation"]])


def _analyze(settings: Any, preset: str, prompts: list[str], compare: bool, n_new: int, full: bool, bar: Callable[[], Any],
             keep: Callable[[Any], None]) -> dict[str, Any]:  # fmt: skip
    from backend.reports.routing import comparison_report, routing_report

    traces = []
    with _opened(settings, preset) as (chosen, model), bar() as progress:
        for prompt in prompts:
            traces.append(_trace(model, chosen, prompt, n_new, progress))
            keep(traces[-1].path)
    pairs = [{**comparison_report(a, b), "prompts": [i, j]} for (i, a), (j, b) in combinations(enumerate(traces), 2)] if compare else []
    return {"schema": SCHEMA, "preset": preset, **_head(traces[0]), "prompts": [routing_report(trace, full) for trace in traces], "comparisons": pairs}


@contextmanager
def _opened(settings: Any, name: str) -> Any:
    """(preset, model) of a name. Raises LayerscopeError for a dense model before it is loaded."""
    from backend import open_model
    from backend.run_presets import find, info_of, read_run_presets

    shelf = _shelf(settings)
    preset = find(read_run_presets(settings.presets_file), name, shelf)
    info, here = info_of(preset, shelf)
    if not here:
        raise LayerscopeError(f"The model {preset.model!r} of the preset {name!r} is not on this disk; fetch it into the Hugging Face cache first.")
    if not info.is_moe:
        raise LayerscopeError(f"{preset.model} is dense: it has no experts and no routing.")
    options: Any = {"device": preset.device, "dtype": preset.dtype, "quantize": preset.quantize} if info.engine == "hf" else {}
    with open_model(preset.model, **options) as model:
        yield preset, model


def _trace(model: Any, preset: Any, prompt: str, n_new: int | None, progress: Any) -> Any:
    from backend.reports.routing import SITES

    n = preset.max_new_tokens if n_new is None else n_new
    sites = [site for site in SITES if site in model.engine.sites]
    return model.trace(prompt, sites=sites, max_new_tokens=n, sampling=preset.sampling, progress=progress)


def _shelf(settings: Any) -> Any:
    from backend.model_files import Shelf

    return Shelf.from_settings(settings)


def _head(trace: Any) -> dict[str, Any]:
    return {"model": trace.info.name, "n_experts": trace.info.n_experts, "k": trace.info.n_experts_used}


def _tokens(trace: Any) -> list[dict[str, Any]]:
    """Every token with its experts and weights, by layer."""
    from backend.reports.routing import routing_layers

    routings = [trace.routing(layer) for layer in routing_layers(trace)]
    return [
        {"token": text, "experts": {str(each.layer): [int(e) for e in each.indices[at]] for each in routings},
         "weights": {str(each.layer): [round(float(w), 6) for w in each.weights[at]] for each in routings if each.weights is not None}}
        for at, text in enumerate(trace.token_texts)
    ]  # fmt: skip


def describe(report: dict[str, Any], n_experts: int) -> str:
    """A report as a person reads it in a terminal."""
    lines = [f"trace {report['trace_id']}  {report['model']}", f"response  {report['response']!r}" if report["response"] else "response  none asked for", ""]
    lines.append(f"{'layer':>5} {'used':>8} {'busiest':>13} {'entropy':>8} {'of max':>7} {'Gini':>6} {'CV':>6} {'balance':>8} {'Switch':>7}  first choice kept (random)")
    for row in report["layers"]:
        kept = row["repeats"]
        switch = "-" if row["switch_loss"] is None else f"{row['switch_loss']:.3f}"
        repeat = "-" if kept["first"] is None else f"{kept['first']:.1%} ({kept['first_random']:.1%})"
        used = f"{row['n_used']}/{n_experts}"
        lines.append(f"{row['layer']:>5} {used:>8} {row['busiest']:>5} {row['busiest_share']:>7.1%} {row['entropy']:>8.3f} {row['entropy_norm']:>7.3f} {row['gini']:>6.3f} "
                     f"{row['variation']:>6.3f} {row['balance']:>8.3f} {switch:>7}  {repeat}")  # fmt: skip
    return "\n".join(lines)


def _verbose_lines(trace: Any) -> list[str]:
    lines = ["every token: layer: experts (weights)"]
    for at, token in enumerate(_tokens(trace)):
        parts = []
        for layer, experts in token["experts"].items():
            weights = token["weights"].get(layer)
            parts.append(f"{layer}: " + " ".join(f"{e}" if weights is None else f"{e} ({weights[i]:.2f})" for i, e in enumerate(experts)))
        lines.append(f"{at:>4} {token['token']!r:<16.16} {'  '.join(parts)}")
    return lines
