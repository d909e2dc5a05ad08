"""python -m backend sensitivity: rank a model's weights, perturb the best against controls, and write the folder of docs/sensitivity.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from backend.commands import sensitivity_compare
from backend.errors import LayerscopeError
from backend.experiments.sensitivity import METRICS, PERTURBATIONS, Spec

_D = Spec("")
_FORMATS = ("png", "pdf", "svg")
_METRICS_HELP, _PERTURB_HELP = (", ".join(names) for names in (METRICS, PERTURBATIONS))
_PART_OF = {"stability_analysis": "stability"}  # figure -> its part of the statistics, where that has another name; one that nobody asked for is not missed
_LARGEST = 10  # top weights that the text form lists


def register(app: typer.Typer, bar: Callable[[], Any]) -> None:
    """Add the commands to the application. bar: makes a progress callback that is a context manager."""
    group = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
    app.add_typer(group, name="sensitivity")
    _add_run(group, bar)
    sensitivity_compare.register(group)


def _add_run(group: typer.Typer, bar: Callable[[], Any]) -> None:
    @group.callback()
    def sensitivity(
        context: typer.Context,
        model: Annotated[str, typer.Option("--model", "-m", help="A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id.")] = "",
        out_dir: Annotated[Path | None, typer.Option("--out-dir", "-o", help="The new folder of the run; it must not exist or be empty.")] = None,
        metric: Annotated[str, typer.Option(help=f"What ranks the weights: {_METRICS_HELP}.")] = _D.metric,
        topk: Annotated[int, typer.Option("--topk", "-k", help="Weights that are kept: of the model, or of each layer.")] = _D.topk,
        mode: Annotated[str, typer.Option(help="global, or per_layer.")] = _D.mode,
        perturb: Annotated[str, typer.Option(help=f"What is done to them: {_PERTURB_HELP}.")] = _D.perturb,
        perturb_scale: Annotated[float, typer.Option(help="The factor of scale; of gaussian, in standard deviations of the tensor.")] = _D.perturb_scale,
        bit: Annotated[int | None, typer.Option(help="Of bit_flip: the bit of the stored code, 0 the least significant. Default: the most significant.")] = None,
        controls: Annotated[str, typer.Option(help="random_k, bottom_k, or both, separated by commas; none for neither.")] = ",".join(_D.controls),
        seeds: Annotated[str, typer.Option(help="Of the random controls and of what else is drawn, separated by commas.")] = ",".join(map(str, _D.seeds)),
        stability_check: Annotated[bool, typer.Option("--stability-check", help="Also rank with other seeds, other halves of the text and other metrics.")] = False,
        prune: Annotated[str, typer.Option(help="Sparsities of a pruning study, for example 0.1,0.3,0.5.")] = "",
        flow: Annotated[bool, typer.Option("--gradient-flow", help="Also the norm of the gradient by layer and component (HF).")] = False,
        super_weights: Annotated[bool, typer.Option("--super-weights", help="Also search for single weights that the model cannot do without.")] = False,
        layers: Annotated[str | None, typer.Option("--layers", "-l", help='Layers, for example "0,3-5". Default: all.')] = None,
        components: Annotated[str | None, typer.Option(help="Components, for example attn.W_O,mlp.W_out. Default: all matrices of attention, MLPs and experts.")] = None,
        text: Annotated[str, typer.Option("--text", "-t", help="A UTF-8 text file. Default: the demo models' evaluation text.")] = "",
        max_samples: Annotated[int, typer.Option(help="Windows of text.")] = _D.max_samples,
        max_length: Annotated[int, typer.Option(help="Tokens of a window; at most the model's context.")] = _D.max_length,
        probes: Annotated[int, typer.Option(help="Of hutchinson.")] = _D.probes,
        device: Annotated[str, typer.Option(help="HF: auto, cpu, cuda, ... GGUF: cpu keeps all layers off the GPU.")] = _D.device,
        plots: Annotated[bool, typer.Option("--save-plots", help="Also draw the figures into the folder.")] = False,
        formats: Annotated[str, typer.Option(help="Of the figures: png, pdf, svg.")] = "png",
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    ) -> None:
        """Rank a model's weights, perturb the best in place against controls, and write manifest.json, top_weights.csv and sensitivity_stats.json.

        Nothing of the model is changed on disk. docs/sensitivity.md describes the files.

        Example: python -m backend sensitivity --model demo-dense --metric grad_x_weight --topk 100 --perturb sign_flip --max-length 256 --out-dir runs/demo
        """
        if context.invoked_subcommand is not None:
            return
        if not model or out_dir is None:
            raise LayerscopeError(f"Name {'a model with --model' if not model else 'a new folder with --out-dir'}; --help lists the options.")
        from backend.sites import parse_layers

        chosen_formats = _formats(formats) if plots else ()
        spec = Spec(model, metric, topk, mode, perturb, perturb_scale, bit, _names(controls), _numbers("seed", seeds, int), stability_check,
                    _numbers("sparsity", prune, float), flow, super_weights, parse_layers(layers), _names(components) or None if components else None,
                    text, max_samples, max_length, probes, device)  # fmt: skip
        found, drawn, left_out = _run(spec, out_dir, bar, chosen_formats)
        if as_json:
            typer.echo(json.dumps({"folder": str(out_dir), "manifest": found.manifest, "stats": found.stats, "plots": drawn}, ensure_ascii=False))
            return
        typer.echo(describe(found, drawn, left_out))


def _run(spec: Spec, out_dir: Path, bar: Callable[[], Any], formats: tuple[str, ...]) -> tuple[Any, list[str], list[str]]:
    """The run, the figures drawn, and sentences about those that were not."""
    from backend import open_model
    from backend.experiments.sensitivity.checks import check_out_dir, check_spec
    from backend.experiments.sensitivity.protocol import run

    check_spec(spec)
    check_out_dir(out_dir)
    with open_model(spec.model, device=spec.device, n_gpu_layers=0 if spec.device == "cpu" else "auto", editable_weights=True) as opened, bar() as progress:
        found = run(opened.engine, spec, out_dir, command=["python", "-m", "backend", *sys.argv[1:]], progress=progress)
        if not formats:
            return found, [], []
        from backend.reports.sensitivity_plots import left_out, save_plots

        progress("drawing", 0, 1)
        paths = save_plots(found, out_dir, formats)
        missing = [f"{name} is not drawn: {why}." for name, why in left_out(found).items() if found.stats.get(_PART_OF.get(name, name), 0) is not None]
        return found, [path.name for path in paths], missing


def _names(text: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    return () if names == ("none",) else names


def _numbers(what: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise LayerscopeError(f"The {what} list {text[:60]!r} is not numbers separated by commas.") from None


def _formats(text: str) -> tuple[str, ...]:
    names = _names(text)
    if not names or (wrong := [name for name in names if name not in _FORMATS]):
        raise LayerscopeError(f"There is no figure format {wrong[0] if names else text!r}; formats are {', '.join(_FORMATS)}.")
    return names


def describe(run: Any, drawn: Sequence[str] = (), left_out: Sequence[str] = ()) -> str:
    """A run as a person reads it in a terminal."""
    manifest, stats = run.manifest, run.stats
    model, text = manifest["model"], manifest["text"]
    lines = [f"run {run.id}  {model['name']} ({model['engine']}, {model['quantization']})", f"folder  {run.folder}",
             f"text  {text['name']}, {text['n_windows']:,} windows of {text['window']:,} tokens", "",
             f"{stats['metric']}, {stats['mode']}: the {min(_LARGEST, len(run.top))} highest scores of {len(run.top):,} weights"]  # fmt: skip
    best = sorted(run.top, key=lambda row: -(row["score"] or 0.0))[:_LARGEST]
    lines += [f"  {row['name']:<32} {_place(row):<16} {row['value']:>12.5g}  score {row['score']:.4g}" for row in best]
    for part, make in (("perturbation", _perturbation), ("stability", _stability), ("pruning", _pruning), ("super_weights", _super_weights)):
        if stats.get(part):
            lines += ["", *make(stats[part])]
    lines += ["", *manifest["notes"]] if manifest["notes"] else []
    lines += ["", f"seconds  {', '.join(f'{stage} {value:.1f}' for stage, value in manifest['seconds'].items())}"]
    lines += [f"figures  {', '.join(drawn)}"] if drawn else []
    return "\n".join([*lines, *left_out])


def _place(row: dict[str, Any]) -> str:
    expert = "" if row["expert"] is None else f"expert {row['expert']} "
    return f"{expert}[{row['row']}, {row['column']}]"


def _perturbation(part: dict[str, Any]) -> list[str]:
    how = {"scale": f" by {part['scale']:g}", "gaussian": f" of {part['scale']:g} standard deviations"}.get(part["op"], "")
    lines = [f"{part['op']}{how}: perplexity {_number(part['baseline']['perplexity'])} before {_interval(part['baseline']['ci'])}",
             f"  {'weights':<12} {'seed':>5} {'n':>8} {'perplexity':>12} {'ratio':>10}  {'95 %':<22} {'changed':>8} {'unrepresented':>14} {'others':>8}"]  # fmt: skip
    for row in part["runs"]:
        seed = "" if row["seed"] is None else str(row["seed"])
        lines.append(f"  {row['selection']:<12} {seed:>5} {row['n']:>8,} {_number(row['perplexity']):>12} {_number(row['ratio']):>10}  {_interval(row['ci']):<22} "
                     f"{row['changed']:>8,} {row['not_representable']:>14,} {row['n_others']:>8,}")  # fmt: skip
    return lines


def _stability(part: dict[str, Any]) -> list[str]:
    ks = [str(k) for k in part["ks"]]
    lines = [f"  {'stability':<36} " + " ".join(f"{'Jaccard ' + k:>14}" for k in ks) + f" {'Spearman':>9}"]
    for pair in part["pairs"]:
        name = f"{pair['kind']} {pair['a']} | {pair['b']}"
        lines.append(f"  {name:<36} " + " ".join(f"{_number(pair['jaccard'][k]):>14}" for k in ks) + f" {_number(pair['spearman']):>9}")
    return lines


def _pruning(part: dict[str, Any]) -> list[str]:
    lines = [f"pruned by {part['metric']} within each {part['within']}", f"  {'sparsity':>8} {'zeros':>8} {'perplexity':>12} {'ratio':>10}  {'95 %':<22} divergence by layer"]
    for row in part["rows"]:
        far = " ".join(_number(value) for value in row["divergence"][:12]) + (" ..." if len(row["divergence"]) > 12 else "")
        lines.append(f"  {row['sparsity']:>8.1%} {row['zeros']:>8.1%} {_number(row['perplexity']):>12} {_number(row['ratio']):>10}  {_interval(row['ci']):<22} {far}")
    return lines


def _super_weights(part: dict[str, Any]) -> list[str]:
    lines = [f"super weights: {len(part['candidates'])} candidates"]
    for row in part["candidates"][:_LARGEST]:
        lines.append(f"  {row['name']:<32} {_place(row):<16} {_number(row['value']):>12}  ratio when zeroed {_number(row['ratio'])}  {row['status']}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _interval(ci: list[float] | None) -> str:
    return "" if ci is None else f"[{_number(ci[0])}, {_number(ci[1])}]"
