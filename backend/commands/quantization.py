"""python -m backend quant: what quantization did to a model. python -m backend quantize: make a quantized variant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from backend.errors import LayerscopeError

_LARGEST = 12  # tensors and places that the text form lists


def register(app: typer.Typer, bar: Callable[[], Any]) -> None:
    """Add the commands to the application. bar: makes a progress callback that is a context manager."""

    @app.command()
    def quant(
        model: Annotated[str, typer.Option("--model", "-m", help="The quantized model: a preset (see `models`), a .gguf file, or a folder of safetensors.")],
        reference: Annotated[str, typer.Option("--reference", "-r", help="The same model unquantized: an F16 or F32 .gguf file, or a folder of safetensors.")],
        prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="The text to run; repeat for more.")] = None,
        prompts_file: Annotated[Path | None, typer.Option(help="A text file with one prompt a line; empty lines are left out.")] = None,
        sites: Annotated[list[str] | None, typer.Option("--sites", "-s", help="Sites to compare, repeated or separated by commas. Default: all.")] = None,
        device: Annotated[str, typer.Option(help="HF: auto, cpu, cuda, ...")] = "auto",
        output: Annotated[Path | None, typer.Option("--output", "-o", help="Write everything that was found to this JSON file.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object on stdout.")] = False,
    ) -> None:
        """Show what quantization did to a model: to its weights, to its activations layer by layer, and to its predictions.

        Example: python -m backend quant --model demo-dense-q4_k_m --reference demo-dense-f16 --prompt "The capital of France is"
        """
        from backend import compare_quantization

        prompts = [*(prompt or ()), *(_lines(prompts_file) if prompts_file else ())]
        if not prompts:
            raise LayerscopeError("There is no prompt; give one with --prompt, or several with --prompts-file.")
        if output is not None and not output.parent.is_dir():
            raise LayerscopeError(f"There is no folder {output.parent} to write {output.name} in.")
        names = [name.strip() for value in sites or () for name in value.split(",") if name.strip()]
        with bar() as progress:
            report = compare_quantization(model, reference, prompts, sites=names or None, device=device, progress=progress)
        if output is not None:
            _write(output, json.dumps(report.to_json(), ensure_ascii=False))
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False) if as_json else describe(report))

    @app.command()
    def quantize(
        model: Annotated[str, typer.Option("--model", "-m", help="The unquantized model: an F32, F16 or BF16 .gguf file, a folder of safetensors, or a preset.")],
        type: Annotated[str, typer.Option("--type", "-t", help="llama.cpp's name of the quantization: Q8_0, Q6_K, Q4_K_M, Q2_K, ...")],
        output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write; it must not exist. Default: beside the model.")] = None,
        imatrix: Annotated[Path | None, typer.Option(help="An importance matrix of llama-imatrix (GGUF), which types of fewer than 3 bits need.")] = None,
    ) -> None:
        """Make a quantized variant of a model with llama.cpp's own quantizer.

        Example: python -m backend quantize --model demo-dense --type Q2_K --output demo-dense-q2_k.gguf
        """
        from backend import quantize as run
        from backend.estimate import in_bytes

        path = run(model, type, output, imatrix)
        typer.echo(f"{path}  {in_bytes(path.stat().st_size)}")


def describe(report: Any) -> str:
    """A report as a person reads it in a terminal: the sentence, the weights and places that moved most, the predictions."""
    from backend.reports.quantization_report import percent

    lines = [report.sentence(), "", f"{'tensor':<36} {'stored as':<10} {'off':>8} {'SQNR, dB':>9} {'max error':>10} {'cosine':>10}"]
    worst = sorted(report.weights, key=lambda row: -row["relative_rmse"])
    for row in worst[:_LARGEST]:
        off = percent(row["relative_rmse"])
        lines.append(f"{row['name']:<36} {row['dtype']:<10} {off:>8} {row['sqnr_db']:>9.2f} {row['max_error']:>10.3g} {row['cosine']:>10.6f}")
    if len(worst) > _LARGEST:
        lines.append(f"{len(worst) - _LARGEST} tensors with smaller errors are in the JSON form")
    lines += ["", f"{'residual stream':<36} {'relative L2':>12} {'1 - cosine':>12} {'1 - CKA':>12}"]
    for at, (site, layer) in enumerate(report.places):
        if site in ("embed", "resid_post", "ln_final_out"):
            name = site if layer is None else f"{site}, layer {layer}"
            lines.append(f"{name:<36} {percent(report.relative_l2[at]):>12} {1 - report.cosine[at]:>12.2e} {1 - report.cka[at]:>12.2e}")
    found = report.predictions
    lines += ["", f"KL {found['kl_mean']:.4g} nats (median {found['kl_median']:.3g}, largest {found['kl_max']:.3g}) over {found['n_positions']:,} positions"]
    lines += [f"the best next token is the same at {percent(found['top1_agreement'])} of them"]
    lines += [f"log-probability of the token that really follows: {found['next_logprob_change']:+.4f} nats on average"]
    return "\n".join(lines)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LayerscopeError(f"The prompts file {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    import os

    from backend.durable import publish

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        publish(part, path)
    except OSError as error:
        raise LayerscopeError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)
