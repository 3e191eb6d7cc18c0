"""The command line: `citer COMMAND`. What takes long to import is imported by the command that needs it."""

import inspect
import json as json_format
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import typer.core
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import logging

from . import __version__
from .model.compat import is_out_of_memory
from .model.modeling import CiterForCausalLM
from .model.references import ROLES, base_config, split_keywords
from .options import Options, expanded
from .runs import WORK, import_extra, is_address, option, process_state
from .scale.remote import remote_llm

INTERRUPTED = 130
# The extra that brings the libraries which a command needs beyond the package's own.
EXTRAS = {
    "serve": "serve",
    "playground": "playground",
    "label": "train",
    "train": "train",
    "evaluate": "train",
    "calibrate": "train",
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


# --- Pairs ----------------------------------------------------------------------------------------------------------

KEYWORD = re.compile(r"([A-Za-z]\w*)=(.*)", re.DOTALL)
QUANTIZATIONS: dict[str, Any] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
# What accelerate plans by itself.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class PairOptions:
    """Options of every command that loads a pair."""

    model: str | None = option(None, "A router's directory or repository id, or `demo`.", "MODEL", argument=True)
    revision: str | None = option(None, "Branch, tag or commit of MODEL.", "NAME")
    slm: Sequence[str] = option(
        (), "A keyword of loading for the SLM, such as revision=v2. Without MODEL: its name or path.", "KEY=VALUE"
    )
    llm: Sequence[str] = option(
        (), "The same for the LLM; or http://HOST:PORT/v1#NAME, a vLLM or SGLang server that has it.", "KEY=VALUE"
    )
    router: str | None = option(
        None, "Without MODEL: kind, directory or repository id of the router. [default: confidence]", "ROUTER"
    )
    slm_quantization: str | None = option(None, "Quantize the SLM: nf4 or int8.", "NAME")
    llm_quantization: str | None = option(None, "Quantize the LLM: nf4 or int8.", "NAME")
    dtype: str = option("auto", "Precision of both models, such as bfloat16.")
    device_map: str = option("auto", "Where the models go, such as auto, cpu or cuda:0.", flag="--device-map --device")
    trust_remote_code: bool = option(False, "Run code that the repository brings.")

    def __post_init__(self) -> None:
        named = [None if is_address(name) else name for name in self.names]
        given = [self.revision] if self.model is None else [*named, self.router]
        if (self.model is None and None in self.names) or given.count(None) < len(given):
            raise ValueError(
                "MODEL, --slm, --llm: expected MODEL (a router's directory or id, or `demo`), perhaps with --revision "
                "or --llm name_or_path=X; or without MODEL both --slm X and --llm Y, perhaps with --router. An LLM "
                "on a server is --llm http://host:8000/v1#NAME in either case."
            )

    @property
    def names(self) -> list[Any]:
        """The names of the SLM and the LLM of a pair that is no router repository."""
        return [next((one for one in own if not KEYWORD.fullmatch(one)), None) for own in (self.slm, self.llm)]

    def keywords(self) -> Options:
        found: Options = {"dtype": self.dtype, "device_map": self.device_map}
        found |= {"trust_remote_code": True} if self.trust_remote_code else {}
        found |= {"revision": self.revision} if self.revision is not None else {}
        for role in ROLES:
            if (name := getattr(self, f"{role}_quantization")) is not None:
                if name not in QUANTIZATIONS:
                    raise ValueError(f"--{role}-quantization: expected {' or '.join(QUANTIZATIONS)}, got {name!r}.")
                import_extra("bitsandbytes", "bnb")
                found[f"{role}_quantization_config"] = BitsAndBytesConfig(**QUANTIZATIONS[name])
            given = filter(None, map(KEYWORD.fullmatch, getattr(self, role)))
            found |= {f"{role}_{key}": json_or_text(value) for key, value in (pair.groups() for pair in given)}
        for key in ("device_map", "slm_device_map", "llm_device_map"):
            check_device(found.get(key))
        return found

    def configs(self) -> list[PreTrainedConfig]:
        """Return the configurations of both models, without loading the models."""
        keywords, pair, found = self.keywords(), None, []
        if self.model is not None:
            where = {key: keywords.pop(key) for key in ("revision", "trust_remote_code") if key in keywords}
            pair = AutoConfig.from_pretrained(place_of(self.model), **where)
        of_both = split_keywords(keywords)
        for role, name in zip(ROLES, self.names, strict=True):
            if is_address(name):  # nothing is asked of a server
                of_both[role] = {"name_or_path": keywords.get("llm_config") or str(name).partition("#")[2]}
            own, reference = of_both[role], getattr(pair, f"{role}_reference", None) or {}
            own = own if "name_or_path" in own else {"name_or_path": name, **reference, **own}
            is_saved = pair is not None and (own["name_or_path"] is None or not getattr(self, role))
            found.append(getattr(pair, f"{role}_config") if is_saved else base_config(role, own["name_or_path"], own))
        return found


def json_or_text(value: str) -> Any:
    try:
        return json_format.loads(value)
    except ValueError:
        return value


def check_device(name: Any) -> None:
    """Raise an error when torch cannot use a device."""
    try:
        if isinstance(name, str) and name not in DEVICE_MAPS:
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device-map: expected auto or a device, got {name!r}. {error}") from error


def place_of(model: str) -> str:
    """Return the directory or repository id that a user means."""
    from .demo import DEMO_PAIR

    return str(DEMO_PAIR) if model == "demo" else model


def load_pair(options: Options) -> CiterForCausalLM:
    """Load a pair; under `accelerate launch`, each process on a device of its own."""
    wanted, state = PairOptions(**options), process_state()
    keywords = wanted.keywords()
    if state.num_processes > 1 and wanted.device_map == "auto":
        keywords["device_map"] = {"": state.device} if state.device.type != "cpu" else "cpu"
    slm, llm = wanted.names
    try:
        if not is_address(llm) and keywords.keys() & {"llm_config", "llm_logprobs", "llm_timeout"}:
            raise ValueError(
                "--llm config, logprobs, timeout: they need an LLM on a server, --llm http://HOST/v1#NAME."
            )
        llm = remote_llm(llm, keywords)
        if wanted.model is not None:
            keywords |= {} if llm is None else {"llm_name_or_path": llm}
            return CiterForCausalLM.from_pretrained(place_of(wanted.model), **keywords)
        return CiterForCausalLM.from_pair(slm, llm, router=wanted.router or "confidence", **keywords)
    except TypeError as error:
        if not any(map(KEYWORD.fullmatch, (*wanted.slm, *wanted.llm))):
            raise
        # A keyword that a model does not know.
        raise ValueError(str(error)) from error


Pair = Annotated[Options, "cli.PairOptions"]
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
    checker: Annotated[str | None, flag("NAME", "As for `citer label`; --accuracy needs it.")] = None,
) -> None:
    """Find the threshold for a budget: an LLM share, or a fraction of the LLM's accuracy."""
    from .data.examples import read_examples
    from .evaluation.calibrate import calibrate

    examples = read_examples(data, needs=("answer",), **reading)
    say(calibrate(load_pair(pair), examples, checker, **options).summary())


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
