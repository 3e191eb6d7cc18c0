"""The command line: `citer COMMAND`. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_bench import refuse_options
from .cli_convert import convert
from .cli_hub import push
from .cli_method import calibrate, evaluate, label, train
from .cli_serve import serve
from .cli_shared import (
    DEMO,
    DeviceMap,
    Dtype,
    Threshold,
    TrustRemoteCode,
    app,
    parse_numbers,
    plain_errors,
    resolve_model,
)

__all__ = ["app", "main", "resolve_model"]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


@app.callback()
def citer() -> None:
    """Keep typer from making a single command the whole program."""


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Another seed gives other problems.")] = 0,
    problems: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out problems to measure on.")] = 200,
    router_threshold: Threshold = None,
    json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON and nothing else.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the problems to FILE as JSON lines instead.")
    ] = None,
    split: Annotated[str, typer.Option(help="With --export: train, validation or test.")] = "test",
) -> None:
    """Watch the pair that ships solve word problems, and see what it saves."""
    if export is not None and (json or router_threshold is not None):
        raise typer.BadParameter("--export only writes the problems; leave out --json and --router-threshold.")
    if export is None and split != "test":
        raise typer.BadParameter("--split is for --export; the demo itself is about test problems.")
    with plain_errors():
        from citer_hf.demo import show

        if export is not None:
            show.export(export, seed, problems, split)
            typer.echo(f"Wrote {problems} problems to {export}.", err=True)
            return
        status = show.show(resolve_model(DEMO), seed, problems, router_threshold, json)
    raise typer.Exit(status)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A router's directory or repository id, or `demo`.")],
    router_threshold: Threshold = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 512,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a pair, and see who writes what."""
    with plain_errors():
        from citer_hf.chat import chat as run

        options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        run(resolve_model(model), router_threshold, max_new_tokens, system, options)


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A router's directory or repository id, or `demo`.")
    ] = None,
    slm: Annotated[str | None, typer.Option(metavar="X", help="Without MODEL: the SLM, a path or an id.")] = None,
    llm: Annotated[str | None, typer.Option(metavar="Y", help="Without MODEL: the LLM, a path or an id.")] = None,
    shares: Annotated[
        str | None,
        typer.Option(metavar="P,...", help="Send these shares of the tokens to the LLM. [default: 0,0.2,0.5,1]"),
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(metavar="X,...", help="Let the model's own router decide at these thresholds.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='One prompt a line, JSON lines with a "prompt", or a list.')
    ] = None,
    prompt_length: Annotated[int, typer.Option(metavar="N", help="Length of synthetic prompts, in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows that are decoded together.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens that every row gets.")] = 64,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed repetitions.")] = 3,
    warmup: Annotated[int, typer.Option(metavar="N", help="Repetitions before those.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, or auto for all there are. [default: the first accelerator, or the CPU]"
        ),
    ] = None,
    dtype: Dtype = "auto",
    cache_implementation: Annotated[str | None, typer.Option(metavar="NAME", help="As for `generate`.")] = None,
    seed: Annotated[int, typer.Option(help="Of synthetic prompts and forced shares.")] = 0,
    released_loop: Annotated[
        bool, typer.Option("--released-loop", help="Also time the loop of the method's released code.")
    ] = False,
    assisted: Annotated[bool, typer.Option(help="Time transformers' assisted generation.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the speed-up against the LLM share: .png, .svg or .pdf.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the repositories bring.")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Run nothing: project the pair on a machine, from configurations alone.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="With --simulate: h100 and others.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="With --simulate: of the memory; overrides --gpu's.")
    ] = None,
    slm_bits: Annotated[
        float | None,
        typer.Option(metavar="N", help="With --simulate: bits per weight of the SLM. [default: as its config says]"),
    ] = None,
    llm_bits: Annotated[
        float | None,
        typer.Option(metavar="N", help="With --simulate: bits per weight of the LLM. [default: as its config says]"),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(metavar="N", help="With --simulate: devices of the LLM.")] = 1,
    replicas: Annotated[int, typer.Option(metavar="N", help="With --simulate: copies of the pair.")] = 1,
) -> None:
    """Measure how fast a pair decodes, beside each model alone and the least that its decisions can cost."""
    with plain_errors():
        from citer_hf.bench.bench import BenchOptions, as_device
        from citer_hf.bench.bench import bench as run
        from citer_hf.bench.plot import check_plot, draw

        refuse_options(context, simulate)
        source = (None if model is None else resolve_model(model)), slm, llm
        if (model is None) != (slm is not None and llm is not None) or (model and (slm or llm)):
            raise ValueError("MODEL, --slm, --llm: expected a router or `demo`, or --slm and --llm without MODEL.")
        forced, routed = parse_numbers("--shares", shares), parse_numbers("--thresholds", thresholds)
        sizes: dict[str, Any] = {
            "batch_size": batch_size,
            "prompt_length": prompt_length,
            "max_new_tokens": max_new_tokens,
        }
        if simulate:
            from citer_hf.bench.simulate import simulate as project
            from citer_hf.bench.simulate import table

            slm_config, llm_config = _configs(*source)
            projections = project(
                slm_config,
                llm_config,
                gpu=gpu,
                bandwidth=bandwidth,
                slm_bits=slm_bits or 16,
                llm_bits=llm_bits or 16,
                tensor_parallel=tensor_parallel,
                replicas=replicas,
                **({"shares": forced} if forced else {}),
                **sizes,
            )
            typer.echo(dumps(projections, indent=2) if json else table(projections))
            return
        options: dict[str, Any] = {
            "shares": forced or None,
            "thresholds": routed,
            "prompts": prompts and str(prompts),
            "repeats": repeats,
            "warmup": warmup,
            "cache_implementation": cache_implementation,
            "seed": seed,
            "released_loop": released_loop,
            "assisted": assisted,
            **sizes,
        }
        # Options are checked before minutes are spent on loading.
        BenchOptions(**options)
        if plot is not None:
            check_plot(plot)
        loading: dict[str, Any] = {
            "dtype": dtype,
            "device_map": as_device(device),
            "trust_remote_code": trust_remote_code,
        }
        report = run(_bench_pair(*source, **loading), model or f"{slm} + {llm}", **options)
        typer.echo(dumps(report.as_dict(), indent=2) if json else report.table())
        if plot is not None:
            draw(report.as_dict(), plot)
    raise typer.Exit(130 if report.interrupted else 1 if report.error else 0)


def _bench_pair(model: str | None, slm: str | None, llm: str | None, **loading: Any) -> Any:
    from citer_hf import CiterForCausalLM

    if model is not None:
        return CiterForCausalLM.from_pretrained(model, **loading).eval()
    return CiterForCausalLM.from_pair(str(slm), str(llm), router="confidence", **loading).eval()


def _configs(model: str | None, slm: str | None, llm: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig

    from citer_hf import CiterConfig

    if model is not None:
        config = CiterConfig.from_pretrained(model)
        return config.slm_config, config.llm_config
    return AutoConfig.from_pretrained(slm), AutoConfig.from_pretrained(llm)


for command in (label, train, evaluate, calibrate, convert, push, serve):
    app.command()(command)


if __name__ == "__main__":
    main()
