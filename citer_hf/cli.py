"""The command line: `citer COMMAND`. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from .bench.devices import DEVICES
from .cli_bench import refuse_options
from .cli_convert import convert
from .cli_hub import push
from .cli_method import calibrate, evaluate, label, train
from .cli_serve import serve
from .cli_shared import DeviceMap, Dtype, Threshold, TrustRemoteCode, app, plain_errors, resolve_model

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
        from .demo import demo as command

        if export is not None:
            command.export(export, seed, problems, split)  # type: ignore[arg-type]
            typer.echo(f"Wrote {problems} problems to {export}.", err=True)
            return
        options = {"seed": seed, "problems": problems, "router_threshold": router_threshold}
        report = command.demo(visible=not json, **options)
        typer.echo(dumps(report.as_dict(), indent=2) if json else report.table())
    raise typer.Exit(130 if report.interrupted else 0)


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
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help=f"With --simulate: {', '.join(DEVICES)}.")] = None,
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
        from citer_hf.bench import command, options

        refuse_options(context, simulate)
        forced = options.parse_numbers("--shares", shares)
        routed = options.parse_numbers("--thresholds", thresholds)
        wanted = options.BenchOptions(
            shares=forced or (() if routed else options.DEFAULT_SHARES),
            thresholds=routed,
            prompts=prompts,
            prompt_length=prompt_length,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            warmup=warmup,
            cache_implementation=cache_implementation,
            seed=seed,
            released_loop=released_loop,
            assisted=assisted,
        )
        source = command.Source(
            model=None if model is None else resolve_model(model),
            slm=slm,
            llm=llm,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            label=model,
        )
        if simulate:
            from citer_hf.bench import projections

            if gpu is None and bandwidth is None:
                raise ValueError("--simulate: give the machine, as --gpu h100 or as --bandwidth 2039 (GB/s).")
            with projections.named_as_options(router=source.model is not None):
                found = projections.simulate_command(
                    source.model or str(slm),
                    None if source.model else llm,
                    device=gpu,
                    bandwidth_gb_s=bandwidth,
                    slm_bits=slm_bits,
                    llm_bits=llm_bits,
                    shares=wanted.shares,
                    batch_sizes=(batch_size,),
                    context=prompt_length + max_new_tokens,
                    tensor_parallel=tensor_parallel,
                    replicas=replicas,
                )
            typer.echo(projections.to_json(found) if json else projections.table(found))
            return
        status = command.bench_command(source, wanted, json, plot)
    raise typer.Exit(status)


for command in (label, train, evaluate, calibrate, convert, push, serve):
    app.command()(command)


if __name__ == "__main__":
    main()
