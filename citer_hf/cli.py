"""The command line: `citer COMMAND`. What takes long to import is imported by the command that needs it."""

import inspect
import json as json_format
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from transformers.utils import logging

from . import __version__
from .model.compat import is_out_of_memory
from .options import Options, expanded
from .pairs import PairOptions, TwoModels, known_keywords, load_pair, models_of
from .runs import WORK, import_extra, process_state

INTERRUPTED = 130
# The extra that brings the libraries which a command needs beyond the package's own.
EXTRAS = {
    "serve": "serve",
    "playground": "playground",
    "label": "train",
    "train": "train",
    "evaluate": "train",
    "calibrate": "train",
    "check": "train",
}

# --- The program ----------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 10_000},
}
COMMANDS: dict[str, Callable[..., None]] = {}


class Commands(typer.core.TyperGroup):
    """The commands, whose options are imported when they are called."""

    def resolve_command(self, *arguments: Any) -> Any:
        name, found, rest = super().resolve_command(*arguments)
        if name in COMMANDS:
            one = typer.Typer(**PLAIN)
            around = partial(plain_errors, extra=EXTRAS.get(name))
            with around():
                one.command(name, help=inspect.getdoc(COMMANDS[name]))(expanded(COMMANDS[name], around))
            found = typer.main.get_command(one)
        return name, found, rest


app = typer.Typer(
    name="citer",
    cls=Commands,
    help="Two language models that decode as one: a small one for the easy tokens, a large one for the critical ones.",
    no_args_is_help=True,
    **PLAIN,
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command of `citer`."""
    COMMANDS[function.__name__] = function
    app.command(function.__name__, short_help=inspect.getdoc(function))(lambda: None)
    return function


def flag(metavar: str | None, help: str, *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help)


@app.callback(invoke_without_command=True)
def citer(version: Annotated[bool, flag(None, "Print the version.", "--version")] = False) -> None:
    """Run one of the commands below."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


@contextmanager
def plain_errors(out: Path | None = None, extra: str | None = None) -> Iterator[None]:
    """Turn errors that a user can do something about into one line on stderr and exit status 1."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except BrokenPipeError:
        # The reader of the output has left, which is no error of ours.
        raise
    except KeyboardInterrupt:
        kept = f" The work so far is kept in {out}: run the same command to resume."
        typer.echo(f"Interrupted.{kept if out is not None and (out / WORK).is_dir() else ''}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and extra and not str(error.name).startswith("citer_hf"):
            message = f"{error.name} is not installed: pip install 'citer-hf[{extra}]'"
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1) from error


def say(text: str) -> None:
    # Once, when there are several processes.
    if process_state().is_main_process:
        typer.echo(text)


Pair = Annotated[Options, "pairs.PairOptions"]
Data = Annotated[str, flag("FILE", "JSON lines, JSON, CSV or Parquet, or the id of a dataset on the Hub.")]
Reading = Annotated[Options, "data.examples.DataOptions"]
Checker = Annotated[str, flag("NAME", "Which answer is right: math, choice, exact, or package.module:function.")]
Out = Annotated[Path, flag("DIR", "A directory that does not exist yet, or was interrupted.")]
OnRay = Annotated[bool, flag(None, "Divide the work among the machines of a Ray cluster.", "--ray")]
Json = Annotated[bool, flag(None, "Print the measurements as JSON and nothing else.", "--json")]

# --- The commands ---------------------------------------------------------------------------------------------------


@command
def demo(
    options: Annotated[Options, "demo.demo.DemoOptions"],
    json: Json = False,
    export: Annotated[Path | None, flag("FILE", "Only write the problems to FILE, as JSON lines.")] = None,
) -> None:
    """Watch the pair that ships solve word problems, and see what it saves."""
    from .demo import demo as shipped

    if export is not None:
        shipped.export(export, **options)
        typer.echo(f"Wrote {export}.", err=True)
        return
    report = shipped.demo(visible=not json, **options)
    typer.echo(json_format.dumps(report, indent=2) if json else shipped.table(report))
    raise typer.Exit(0 if report["complete"] else INTERRUPTED)


@command
def chat(pair: Pair, options: Annotated[Options, "chat.ChatOptions"]) -> None:
    """Chat with a pair, and see who writes what."""
    from .chat import chat

    chat(load_pair(pair), **options)


@command
def playground(pair: Pair, options: Annotated[Options, "playground.PlaygroundOptions"]) -> None:
    """Open a page for the browser: a chat, both models and the pair side by side, and the router's curve."""
    from .playground import playground

    playground(load_pair(pair), **options)


@command
def check(
    models: Annotated[Options, "pairs.TwoModels"],
    data: Data,
    reading: Reading,
    options: Annotated[Options, "evaluation.check.CheckOptions"],
    checker: Annotated[str | None, flag("NAME", "As for `citer evaluate`, where the data has answers.")] = None,
    json: Json = False,
) -> None:
    """Find out whether two models pay as a pair, before any training: costs, speed, and one sentence of advice."""
    from .data.examples import read_examples
    from .evaluation import check as checks

    wanted, needs = TwoModels(**models), ("answer",) if checker else ()
    keywords, examples = wanted.keywords(), read_examples(data, needs=needs, **reading)
    with known_keywords(wanted):
        slm, llm = models_of(wanted, keywords)
        report = checks.check(slm, llm, examples, checker, **keywords, **options)
    typer.echo(json_format.dumps(report, indent=2) if json else checks.table(report))
    raise typer.Exit(0 if report["pair"]["fits"] else 1)


@command
def label(
    pair: Pair,
    data: Data,
    checker: Checker,
    out: Out,
    options: Annotated[Options, "training.label.LabelOptions"],
    ray: OnRay = False,
) -> None:
    """Label which of the two models should write each token of reference answers."""
    from .training.label import label_preferences

    labels = label_preferences(load_pair(pair), data, checker, out, ray=ray and partial(load_pair, pair), **options)
    say(f"The labels are in {out}: {len(labels.case)} tokens of {len(labels.questions)} answers.")


@command
def train(
    pair: Pair,
    labels: Annotated[str, flag("LABELS", "Of `citer label` with the same pair: directory, or id on the Hub.")],
    out: Out,
    options: Annotated[Options, "training.train.TrainOptions"],
) -> None:
    """Train a router on labels, and save it as a router repository."""
    from .training.train import summary, train

    say(summary(train(load_pair(pair), labels, out, **options), out))


@command
def evaluate(
    pair: Pair,
    data: Data,
    checker: Checker,
    out: Out,
    reading: Reading,
    options: Annotated[Options, "evaluation.evaluate.EvaluateOptions"],
    baselines: Annotated[str | None, flag("LABELS", "Train and measure every other method on these labels.")] = None,
    compare: Annotated[list[Path] | None, flag("DIR", "Another router of `citer train`. May be repeated.")] = None,
    methods: Annotated[str | None, flag("NAME,...", "Of the other methods, these alone; some need no labels.")] = None,
    ray: OnRay = False,
) -> None:
    """Measure accuracy against cost, from the SLM alone to the LLM alone: a table, results.json and a plot."""
    from .data.examples import read_examples
    from .evaluation.evaluate import evaluate, method_name
    from .training.train import baseline_routers, method_of, router_of

    examples, model = read_examples(data, needs=("answer",), **reading), load_pair(pair)
    routers = {method_of(str(model.name_or_path)) or method_name(model): model.router}
    if baselines is not None or methods is not None:
        chosen = None if methods is None else methods.split(",")
        routers = baseline_routers(model, baselines, chosen, options.get("seed", 0)) | routers
    routers |= dict(router_of(directory, model) for directory in compare or ())
    load = ray and partial(load_pair, pair)
    say(evaluate(model, examples, checker, routers=routers, out=out, ray=load, **options).table())
    say(f"results.json, results.md and curve.png are in {out}.")


@command
def calibrate(
    pair: Pair,
    data: Data,
    reading: Reading,
    options: Annotated[Options, "evaluation.calibrate.CalibrateOptions"],
    checker: Annotated[str | None, flag("NAME", "As for `citer label`; only --llm-share needs none.")] = None,
    out: Annotated[Path | None, flag("DIR", "Save the pair with what was found; DIR does not exist yet.")] = None,
) -> None:
    """Find threshold and veto for a budget: a part of the LLM's accuracy, a speed, or an LLM share."""
    from .data.examples import read_examples
    from .evaluation.calibrate import calibrate

    examples = read_examples(data, needs=("answer",) if checker else (), **reading)
    say(calibrate(load_pair(pair), examples, checker, out, **options).summary())


@command
def bench(
    pair: Pair,
    options: Annotated[Options, "bench.bench.BenchOptions"],
    json: Json = False,
    simulate: Annotated[bool, flag(None, "Run nothing: project the speed on a machine.", "--simulate")] = False,
) -> None:
    """Measure how fast a pair decodes, beside each model alone and the least that its decisions can cost."""
    from .bench import bench as benches
    from .bench import simulate as projections

    wanted = PairOptions(**pair)
    if simulate:
        found = projections.simulate(*wanted.configs(), **options)
        typer.echo(json_format.dumps(found, indent=2) if json else projections.table(found))
        return
    if options.keys() & {"gpu", "bandwidth"}:
        raise ValueError("--gpu, --bandwidth: they have no effect without --simulate. Add it, or leave them out.")
    report = benches.bench(load_pair(pair), wanted.model or " + ".join(map(str, wanted.names)), **options)
    typer.echo(json_format.dumps(report, indent=2) if json else benches.table(report))
    if report["error"] is not None:
        raise ValueError(report["error"])
    raise typer.Exit(INTERRUPTED if report["interrupted"] else 0)


@command
def serve(
    pair: Pair,
    options: Annotated[Options, "serving.ServeOptions"],
    playground: Annotated[
        bool, flag(None, "Add the page of `citer playground`, at /playground.", "--playground")
    ] = False,
) -> None:
    """Serve a pair to OpenAI clients: chat completions and completions, with `router_threshold` in each request."""
    from .serving.server import serve

    mount: Any = None
    if playground:
        import_extra("gradio", "playground")
        from .playground import mount
    wanted = PairOptions(**pair)
    serve(lambda: load_pair(pair), wanted.model or str(wanted.names[1]).rpartition("#")[2], mount, **options)


@command
def convert(
    file: Annotated[Path, typer.Argument(help="A router of CITER's (.pth) or R2R's (.pt) released code.")],
    slm: Annotated[str, flag("X", "The SLM that it was trained with, a path or an id.")],
    llm: Annotated[str, flag("Y", "The LLM, a path or an id.")],
    out: Annotated[Path, flag("DIR", "A directory that does not exist yet, or is empty.")],
    router_threshold: Annotated[float | None, flag("X", "Its threshold. [default: the file's, or 0.5]")] = None,
) -> None:
    """Turn a router of CITER's or R2R's released code into a router repository."""
    from .importers import convert

    threshold = convert(file, slm, llm, out, router_threshold).config.router_threshold
    typer.echo(f"Router saved in {out}, with the threshold {threshold:.6g}. `citer calibrate` finds one for a budget.")


@command
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Of a router, or with --dataset of labels.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to on the Hub, such as user/my-router.")],
    options: Annotated[Options, "hub.PushOptions"],
) -> None:
    """Upload a router or labels to the Hub, with a card made from what is in the directory."""
    from .hub import push

    typer.echo(push(directory, repo_id, **options))


if __name__ == "__main__":
    main()
