"""The command line: `citer COMMAND`. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json as json_format
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from .options import Of, Options, expanded
from .runs import WORK, import_extra, option

if TYPE_CHECKING:
    from .model.modeling import CiterForCausalLM

INTERRUPTED = 130
# The extra that brings the libraries which a command needs beyond the package's own.
EXTRAS = {"serve": "serve", "label": "train", "train": "train", "evaluate": "train", "calibrate": "train"}

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
            with plain_errors(extra=EXTRAS.get(name)):
                one.command(name, help=inspect.getdoc(COMMANDS[name]))(expanded(COMMANDS[name], plain_errors))
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


def show_version(value: bool) -> None:
    if value:
        typer.echo(importlib.import_module(f"{__package__}").__version__)
        raise typer.Exit


@app.callback()
def citer(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run one of the commands below."""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


@contextmanager
def plain_errors(out: Path | None = None, extra: str | None = None) -> Iterator[None]:
    """Turn errors that a user can do something about into one line on stderr and exit status 1."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except BrokenPipeError:
        # The reader of the output has left, which is no error of ours.
        raise
    except KeyboardInterrupt:
        kept = f" The work so far is kept in {out}: run the same command to resume."
        typer.echo(f"Interrupted.{kept if out is not None and (Path(out) / WORK).is_dir() else ''}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and extra and not str(error.name).startswith("citer_hf"):
            message = f"{error.name} is not installed: pip install 'citer-hf[{extra}]'"
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1) from error


def say(text: str) -> None:
    from .runs import process_state

    # Once, when there are several processes.
    if process_state().is_main_process:
        typer.echo(text)


# --- Pairs ----------------------------------------------------------------------------------------------------------

KEYWORD = re.compile(r"([A-Za-z]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class PairOptions:
    """Options of every command that loads a pair."""

    model: str | None = option(None, "A router's directory or repository id, or `demo`.", "MODEL", argument=True)
    revision: str | None = option(None, "Branch, tag or commit of MODEL.", "NAME")
    slm: Sequence[str] = option(
        (), "A keyword of loading for the SLM, such as revision=v2. Without MODEL: its name or path.", "KEY=VALUE"
    )
    llm: Sequence[str] = option((), "The same for the LLM. May be repeated.", "KEY=VALUE")
    router: str | None = option(
        None, "Without MODEL: kind, directory or repository id of the router. [default: confidence]", "ROUTER"
    )
    slm_quantization: str | None = option(None, "Quantize the SLM: nf4 or int8.", "NAME")
    llm_quantization: str | None = option(None, "Quantize the LLM: nf4 or int8.", "NAME")
    dtype: str = option("auto", "Precision of both models, such as bfloat16.")
    device_map: str | None = option("auto", "Where the models go, such as auto, cpu or cuda:0.")
    trust_remote_code: bool = option(False, "Run code that the repository brings.")

    def __post_init__(self) -> None:
        given = [self.revision] if self.model is None else [*self.names, self.router]
        if (self.model is None and None in self.names) or given.count(None) < len(given):
            raise ValueError(
                "MODEL, --slm, --llm: expected MODEL (a router's directory or id, or `demo`), perhaps with --revision "
                "or --llm name_or_path=X; or without MODEL both --slm X and --llm Y, perhaps with --router."
            )

    @property
    def names(self) -> list[str | None]:
        """The names of the SLM and the LLM of a pair that is no router repository."""
        return [next((one for one in own if not KEYWORD.fullmatch(one)), None) for own in (self.slm, self.llm)]

    def keywords(self) -> Options:
        """Return the keywords of loading."""
        found: Options = {"dtype": self.dtype, "device_map": self.device_map}
        found |= {"trust_remote_code": True} if self.trust_remote_code else {}
        for role, given in (("slm", self.slm), ("llm", self.llm)):
            quantization = getattr(self, f"{role}_quantization")
            if quantization is not None:
                found[f"{role}_quantization_config"] = as_quantization(role, quantization)
            found |= {f"{role}_{pair[1]}": json_or_text(pair[2]) for pair in map(KEYWORD.fullmatch, given) if pair}
        return {key: as_dtype(value) if key.endswith("dtype") else value for key, value in found.items()}


def json_or_text(value: str) -> Any:
    try:
        return json_format.loads(value)
    except ValueError:
        return value


def as_dtype(name: Any) -> Any:
    """Return the name of a precision that models can be loaded in."""
    import torch

    if name != "auto" and getattr(torch, str(name), None) not in {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"--dtype: expected auto, float32, bfloat16 or float16, got {name!r}.")
    return name


def as_quantization(role: str, name: str) -> Any:
    """Return a configuration of bitsandbytes."""
    if name not in ("nf4", "int4", "int8"):
        raise ValueError(f"--{role}-quantization: expected nf4 or int8, got {name!r}.")
    import_extra("bitsandbytes", "bnb")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=name == "int8", load_in_4bit=name != "int8", bnb_4bit_quant_type="nf4")


def place_of(model: str) -> str:
    """Return the directory or repository id that a user means."""
    from .demo import PAIR

    return str(PAIR) if model == "demo" else model


def load_pair(options: Options) -> CiterForCausalLM:
    """Load a pair; under `accelerate launch`, each process on a device of its own."""
    from .model.modeling import CiterForCausalLM
    from .runs import process_state

    wanted, state = PairOptions(**options), process_state()
    keywords = wanted.keywords()
    if state.num_processes > 1 and wanted.device_map == "auto":
        keywords["device_map"] = {"": state.device} if state.device.type != "cpu" else "cpu"
    try:
        if wanted.model is not None:
            keywords |= {} if wanted.revision is None else {"revision": wanted.revision}
            return CiterForCausalLM.from_pretrained(place_of(wanted.model), **keywords)
        slm, llm = map(str, wanted.names)
        return CiterForCausalLM.from_pair(slm, llm, router=wanted.router or "confidence", **keywords)
    except (RuntimeError, AssertionError, TypeError) as error:
        # A device that there is not, or a keyword that a model does not know.
        raise ValueError(f"The pair cannot be loaded: {error}") from error


Pair = Annotated[Options, Of("cli.PairOptions")]
Data = Annotated[
    str, typer.Option(metavar="FILE", help="JSON lines, JSON, CSV or Parquet, or the id of a dataset on the Hub.")
]
Reading = Annotated[Options, Of("data.examples.DataOptions")]
Checker = Annotated[
    str, typer.Option(metavar="NAME", help="Which answer is right: math, choice, exact, or package.module:function.")
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="A directory that does not exist yet, or was interrupted.")]
Json = Annotated[bool, typer.Option("--json", help="Print the measurements as JSON and nothing else.")]

# --- The commands ---------------------------------------------------------------------------------------------------


@command
def demo(
    options: Annotated[Options, Of("demo.demo.DemoOptions")],
    json: Json = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the problems to FILE as JSON lines instead.")
    ] = None,
    split: Annotated[str, typer.Option(help="With --export: train, validation or test.")] = "test",
) -> None:
    """Watch the pair that ships solve word problems, and see what it saves."""
    from .demo import demo as shipped

    if export is None:
        if split != "test":
            raise ValueError("--split is for --export; the demo itself is about test problems.")
        report = shipped.demo(visible=not json, **options)
        typer.echo(json_format.dumps(report.as_dict(), indent=2) if json else report.table())
        raise typer.Exit(INTERRUPTED if report.interrupted else 0)
    if json or "router_threshold" in options:
        raise ValueError("--export only writes the problems; leave out --json and --router-threshold.")
    wanted = shipped.DemoOptions(**options)
    shipped.export(export, wanted.seed, wanted.problems, split)
    typer.echo(f"Wrote {wanted.problems} problems to {export}.", err=True)


@command
def chat(pair: Pair, options: Annotated[Options, Of("chat.ChatOptions")]) -> None:
    """Chat with a pair, and see who writes what."""
    from .chat import chat

    chat(load_pair(pair), **options)


@command
def label(
    pair: Pair, data: Data, checker: Checker, out: Out, options: Annotated[Options, Of("training.label.LabelOptions")]
) -> None:
    """Label which of the two models should write each token of reference answers."""
    from .training.label import label_preferences

    say(label_preferences(load_pair(pair), data, checker, out, **options).summary())


@command
def train(
    pair: Pair,
    labels: Annotated[Path, typer.Option(metavar="DIR", help="Made by `citer label` with the same pair.")],
    out: Out,
    options: Annotated[Options, Of("training.train.TrainOptions")],
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
    options: Annotated[Options, Of("evaluation.evaluate.EvaluateOptions")],
    baselines: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Labels: also train and measure every other method on them.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Another router of `citer train`. May be repeated.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="With --baselines: these alone. [default: all]")
    ] = None,
) -> None:
    """Measure accuracy against cost, from the SLM alone to the LLM alone: a table, results.json and a plot."""
    from .data.examples import read_examples
    from .evaluation.evaluate import evaluate, method_name
    from .training.baselines import baseline_routers, method_of, router_of

    examples, model = read_examples(data, needs=("answer",), **reading), load_pair(pair)
    routers = {method_of(str(model.name_or_path)) or method_name(model): model.router}
    if baselines is not None:
        chosen = None if methods is None else methods.split(",")
        routers = baseline_routers(model, baselines, chosen, options.get("seed", 0)) | routers
    routers |= dict(router_of(directory, model) for directory in compare or ())
    say(evaluate(model, examples, checker, routers=routers, out=out, **options).table())
    say(f"results.json, results.md and curve.png are in {out}.")


@command
def calibrate(
    pair: Pair,
    data: Data,
    reading: Reading,
    options: Annotated[Options, Of("evaluation.calibrate.CalibrateOptions")],
    checker: Annotated[
        str | None, typer.Option(metavar="NAME", help="As for `citer label`; --accuracy needs it.")
    ] = None,
) -> None:
    """Find the threshold for a budget: an LLM share, or a fraction of the LLM's accuracy."""
    from .data.examples import read_examples
    from .evaluation.calibrate import calibrate

    examples = read_examples(data, needs=("answer",), **reading)
    say(calibrate(load_pair(pair), examples, checker, **options).summary())


@dataclass(frozen=True)
class BenchPairOptions(PairOptions):
    """The same, but for the default device: the first accelerator, or the CPU."""

    device_map: str | None = option(None, "cpu, cuda, cuda:1, or auto for all. [default: the first]", flag="--device")


@command
def bench(
    context: typer.Context,
    pair: Annotated[Options, Of("cli.BenchPairOptions")],
    options: Annotated[Options, Of("bench.bench.BenchOptions")],
    simulation: Annotated[Options, Of("bench.simulate.SimulateOptions", checked=False)],
    json: Json = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the speed-up against the LLM share: .png, .svg or .pdf.")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Run nothing: project the pair on a machine, from configurations alone.")
    ] = False,
) -> None:
    """Measure how fast a pair decodes, beside each model alone and the least that its decisions can cost."""
    from .bench import bench as benches
    from .bench import plot as plots
    from .bench import simulate as projections

    own = {field.name for field in dataclasses.fields(projections.SimulateOptions)}
    measured = {field.name for field in dataclasses.fields(benches.BenchOptions)}
    for name in sorted({"dtype", "device_map", "plot", *measured} - own if simulate else own - measured):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag, way = name.replace("_map", "").replace("_", "-"), "with" if simulate else "without"
            raise ValueError(f"--{flag}: it has no effect {way} --simulate. Leave it out.")
    wanted = PairOptions(**pair)
    if simulate:
        from transformers import AutoConfig

        names = wanted.names if wanted.model is None else [place_of(wanted.model)]
        configs = [AutoConfig.from_pretrained(name) for name in names]
        configs = configs if wanted.model is None else [configs[0].slm_config, configs[0].llm_config]
        found = projections.simulate(*configs, **simulation)
        typer.echo(json_format.dumps(found, indent=2) if json else projections.table(found))
        return
    if plot is not None:
        plots.check_plot(plot)
    pair["device_map"] = benches.as_device(pair.get("device_map"))
    report = benches.bench(load_pair(pair), wanted.model or " + ".join(map(str, wanted.names)), **options)
    typer.echo(json_format.dumps(report.as_dict(), indent=2) if json else report.table())
    if plot is not None:
        plots.draw(report.as_dict(), plot)
    if report.error is not None:
        raise ValueError(report.error)
    raise typer.Exit(INTERRUPTED if report.interrupted else 0)


@command
def serve(pair: Pair, options: Annotated[Options, Of("serving.ServeOptions")]) -> None:
    """Serve a pair to OpenAI clients: chat completions and completions, with `router_threshold` in each request."""
    for library in ("fastapi", "uvicorn", "pydantic", "prometheus_client"):
        import_extra(library, "serve")
    from .serving.server import serve

    wanted = PairOptions(**pair)
    serve(lambda: load_pair(pair), wanted.model or str(wanted.names[1]), **options)


@command
def convert(
    file: Annotated[Path, typer.Argument(help="A router of CITER's (.pth) or R2R's (.pt) released code.")],
    slm: Annotated[str, typer.Option(metavar="X", help="The SLM that it was trained with, a path or an id.")],
    llm: Annotated[str, typer.Option(metavar="Y", help="The LLM, a path or an id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A directory that does not exist yet, or is empty.")],
    options: Annotated[Options, Of("importers.ConvertOptions")],
) -> None:
    """Turn a router of CITER's or R2R's released code into a router repository."""
    from .importers import convert

    config = convert(file, slm, llm, out, **options).config
    typer.echo(
        f"Router saved in {out}: kind {config.router['type']}, for a hidden size of {config.router['hidden_size']}. "
        f"It starts with the threshold {config.router_threshold:.6g}; `citer calibrate` finds the one for your budget."
    )


@command
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A router's directory.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to on the Hub, such as user/my-router.")],
    options: Annotated[Options, Of("hub.PushOptions")],
) -> None:
    """Upload a router to the Hub, with a model card made from what is in its directory."""
    from .hub import push

    typer.echo(push(directory, repo_id, **options))


if __name__ == "__main__":
    main()
