"""The command line: `citer COMMAND`. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app", "main", "resolve_model"]

DEMO = "demo"

app = typer.Typer(
    name="citer",
    help="Two language models that decode as one: a small one for the easy tokens, a large one for the critical ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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


def threshold_option(value: float | None) -> float | None:
    """Refuse thresholds that mean nothing.

    Args:
        value: What was given.

    Raises:
        typer.BadParameter: for a negative number, an infinite one, or none at all.
    """
    if value is not None and not (0 <= value < math.inf):
        raise typer.BadParameter(f"{value} is no threshold: give a number from 0 (SLM alone) to above 1 (LLM alone).")
    return value


Threshold = Annotated[
    float | None,
    typer.Option(callback=threshold_option, help="The SLM writes a token when its score reaches this.", metavar="X"),
]


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Another seed gives other problems.")] = 0,
    problems: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out problems to measure on.")] = 200,
    router_threshold: Threshold = None,
    json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON and nothing else.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the problems to FILE as JSON lines instead.")
    ] = None,
) -> None:
    """Watch the pair that ships solve word problems, and see what it saves."""
    if export is not None and (json or router_threshold is not None):
        raise typer.BadParameter("--export only writes the problems; leave out --json and --router-threshold.")
    with plain_errors():
        from citer_hf.demo import show

        if export is not None:
            show.export(export, seed, problems)
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
    dtype: Annotated[str, typer.Option(help="Precision of both models, such as bfloat16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="Where the models go, such as auto, cpu or cuda:0.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the repository brings.")] = False,
) -> None:
    """Chat with a pair, and see who writes what."""
    with plain_errors():
        from citer_hf.chat import chat as run

        options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        run(resolve_model(model), router_threshold, max_new_tokens, system, options)


@app.command()
def bench(
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
        Path | None, typer.Option(metavar="FILE", help='One prompt a line, or JSON lines with a "prompt".')
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
    dtype: Annotated[str, typer.Option(help="Precision of both models, such as bfloat16.")] = "auto",
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
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="With --simulate: a100, h100, l40s, ...")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="With --simulate: of the memory; overrides --gpu's.")
    ] = None,
    slm_bits: Annotated[float, typer.Option(metavar="N", help="With --simulate: bits per weight of the SLM.")] = 16,
    llm_bits: Annotated[float, typer.Option(metavar="N", help="With --simulate: bits per weight of the LLM.")] = 16,
    tensor_parallel: Annotated[int, typer.Option(metavar="N", help="With --simulate: devices of the LLM.")] = 1,
    replicas: Annotated[int, typer.Option(metavar="N", help="With --simulate: copies of the pair.")] = 1,
) -> None:
    """Measure how fast a pair decodes, beside each model alone and the least that its decisions can cost."""
    with plain_errors():
        from citer_hf.bench import command, options

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


def resolve_model(name: str) -> str:
    """Return the directory or repository id that a user means.

    Args:
        name: A directory, a repository id, or `demo` for the pair that ships (`./demo` is a directory of that name).

    Raises:
        FileNotFoundError: when it is a directory that is no model, or looks like a path to nothing.
    """
    if name == DEMO:
        from citer_hf.demo import PAIR

        name = str(PAIR)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name} is no router directory: it has no config.json.")
        return str(path)
    looks_like_path = name.startswith((".", "~", "/")) or name.count("/") > 1
    if looks_like_path or path.exists():
        raise FileNotFoundError(f"{name} is neither a router directory nor a repository id.")
    return name


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that a user can do something about into one line on stderr and exit status 1."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except BrokenPipeError:
        # Whoever read the output has had enough of it, which is no error of ours.
        raise
    except (OSError, ValueError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    main()
