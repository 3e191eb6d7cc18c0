"""The commands of the method: `citer label`, `train`, `evaluate` and `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_shared import DeviceMap, Dtype, Threshold, TrustRemoteCode, plain_errors, resolve_model

__all__ = ["calibrate", "evaluate", "label", "train"]

Model = Annotated[str, typer.Argument(help="A router's directory or repository id, or `demo`.")]
Data = Annotated[
    str, typer.Option(metavar="FILE", help="JSON lines, JSON, CSV or Parquet, or the id of a dataset on the Hub.")
]
CheckerName = Annotated[
    str, typer.Option(metavar="NAME", help="Which answer is right: math, choice, exact, or package.module:function.")
]
Columns = Annotated[
    list[str] | None, typer.Option("--map", metavar="FIELD=COLUMN", help="The column of a field. May be repeated.")
]
Split = Annotated[str | None, typer.Option(help="Which split of the data.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use the first N examples only.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="A directory that does not exist yet, or was interrupted.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
BatchTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in a batch, padding included.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]

BATCH_TOKENS = 1 << 14


def label(
    model: Model,
    data: Data,
    checker: CheckerName,
    out: Out,
    columns: Columns = None,
    split: Split = None,
    limit: Limit = None,
    router_threshold: Threshold = None,
    rollouts: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Roll-outs at most, where the router is least sure.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    batch_tokens: BatchTokens = BATCH_TOKENS,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Label which of the two models should write each token of reference answers."""
    with plain_errors(), resumable(out):
        from citer_hf.training.label import label_preferences

        labels = label_preferences(
            load_pair(resolve_model(model), dtype, device_map, trust_remote_code),
            data,
            checker,
            out,
            columns=parse_columns(columns),
            split=split,
            limit=limit,
            router_threshold=router_threshold,
            rollouts=rollouts,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
        )
        say(labels.summary())


def train(
    model: Model,
    labels: Annotated[Path, typer.Option(metavar="DIR", help="Made by `citer label` with the same pair.")],
    out: Out,
    objective: Annotated[
        str, typer.Option(metavar="NAME", help="citer-plus, citer (the paper's), citer-s or co-llm.")
    ] = "citer-plus",
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Before every further round, roll out again with the new router.")
    ] = 1,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="The data that was labelled, to be sure that it is the same.")
    ] = None,
    checker: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of further rounds. [default: that of the labels]")
    ] = None,
    rollouts: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Roll-outs of a further round, where the router is unsure.")
    ] = None,
    learning_rates: Annotated[
        str, typer.Option("--learning-rate", metavar="X,...", help="Those to try; the best by validation is kept.")
    ] = "0.001,0.003,0.01",
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="At most.")] = 25,
    batch_size: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens in a batch of the training.")] = 512,
    report_to: Annotated[str, typer.Option(metavar="NAME", help="Logging of transformers' Trainer.")] = "none",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a router on labels, and save it as a router repository."""
    with plain_errors(), resumable(out):
        from citer_hf.bench.options import parse_numbers
        from citer_hf.training.train import summary
        from citer_hf.training.train import train as train_router

        provenance = train_router(
            load_pair(resolve_model(model), dtype, device_map, trust_remote_code),
            labels,
            out,
            objective=objective,
            rounds=rounds,
            data=data,
            checker=checker,
            rollouts=rollouts,
            learning_rates=parse_numbers("--learning-rate", learning_rates),
            epochs=epochs,
            batch_size=batch_size,
            report_to=report_to,
            seed=seed,
        )
        say(f"Router saved in {out}. {summary(provenance)}")


def evaluate(
    model: Model,
    data: Data,
    checker: CheckerName,
    out: Out,
    baselines: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Labels: also train and measure every other method on them."),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Another router for the same pair, made by `citer train`. May be repeated."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="With --baselines: these alone. [default: all]")
    ] = None,
    shares: Annotated[
        str | None, typer.Option(metavar="P,...", help="LLM shares at which points are wanted. [default: 13 of them]")
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(metavar="X,...", help="Thresholds of the model's own router instead.")
    ] = None,
    columns: Columns = None,
    split: Split = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 512,
    batch_tokens: BatchTokens = BATCH_TOKENS,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure accuracy against cost, from the SLM alone to the LLM alone: a table, results.json and a plot."""
    with plain_errors(), resumable(out):
        from citer_hf.bench.options import parse_numbers
        from citer_hf.data.examples import read_examples
        from citer_hf.evaluation.evaluate import evaluate as measure
        from citer_hf.evaluation.evaluate import method_name
        from citer_hf.evaluation.results import SHARES
        from citer_hf.evaluation.table import print_tables
        from citer_hf.runs import process_state
        from citer_hf.training.baselines import baseline_routers, method_of, router_of

        pair = load_pair(resolve_model(model), dtype, device_map, trust_remote_code)
        examples = read_examples(data, parse_columns(columns), split=split, needs=("answer",), limit=limit)
        own = method_of(str(pair.name_or_path)) or method_name(pair)
        routers: dict[str, Any] = {}
        if baselines is not None:
            routers |= baseline_routers(pair, baselines, None if methods is None else methods.split(","), seed)
        routers |= dict(router_of(directory, pair) for directory in compare or ())
        given = parse_numbers("--thresholds", thresholds)
        results = measure(
            pair,
            examples,
            checker,
            routers={own: pair.router} | {name: router for name, router in routers.items() if name != own},
            shares=parse_numbers("--shares", shares) or SHARES,
            thresholds={own: given} if given else None,
            seed=seed,
            out=out,
            arguments={"baselines": baselines, "compare": list(compare or ())},
            max_new_tokens=max_new_tokens or 512,
            batch_tokens=batch_tokens,
        )
        if process_state().is_main_process:
            print_tables(results)
        say(f"results.json, results.md and curve.png are in {out}.")


def calibrate(
    model: Model,
    data: Data,
    checker: Annotated[
        str | None, typer.Option(metavar="NAME", help="As for `citer label`; --accuracy needs it.")
    ] = None,
    llm_share: Annotated[
        float | None, typer.Option(metavar="P", help="Share of the tokens that the LLM should write.")
    ] = None,
    accuracy: Annotated[
        float | None, typer.Option(metavar="P", help="Fraction of the LLM's accuracy to reach as cheaply as possible.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the threshold into MODEL's config, a directory.")
    ] = False,
    columns: Columns = None,
    split: Split = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 512,
    batch_tokens: BatchTokens = BATCH_TOKENS,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find the threshold for a budget: an LLM share, or a fraction of the LLM's accuracy."""
    with plain_errors():
        from citer_hf.data.examples import read_examples
        from citer_hf.evaluation import calibrate as calibration

        name = resolve_model(model)
        if write and not Path(name).is_dir():
            raise ValueError(f"--write: {model} is no directory; save the router there first.")
        found = calibration.calibrate(
            load_pair(name, dtype, device_map, trust_remote_code),
            read_examples(data, parse_columns(columns), split=split, needs=("answer",), limit=limit),
            checker,
            llm_share=llm_share,
            accuracy=accuracy,
            max_new_tokens=max_new_tokens or 512,
            batch_tokens=batch_tokens,
            seed=seed,
        )
        low, high = found.llm_share_ci
        say(f"router_threshold {found.threshold:.6g}: the LLM writes {found.llm_share:.1%} ({low:.1%} to {high:.1%})")
        if found.accuracy is not None and found.accuracy_ci is not None:
            low, high = found.accuracy_ci
            say(f"accuracy {found.accuracy:.1%} ({low:.1%} to {high:.1%}) of {found.problems} problems")
        if write:
            calibration.write_threshold(Path(name), found)
            say(f"Written into {name}.")


def load_pair(name: str, dtype: str, device_map: str | None, trust_remote_code: bool) -> Any:
    """Load a pair; under `accelerate launch`, each process on a device of its own."""
    from citer_hf import CiterForCausalLM
    from citer_hf.runs import process_state

    state = process_state()
    several = state.num_processes > 1 and device_map == "auto"
    where: Any = ({"": state.device} if state.device.type != "cpu" else "cpu") if several else device_map
    return CiterForCausalLM.from_pretrained(name, dtype=dtype, device_map=where, trust_remote_code=trust_remote_code)


def parse_columns(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return `FIELD=COLUMN` options as a dictionary."""
    columns = {}
    for pair in pairs or ():
        field, equals, column = pair.partition("=")
        if not (field and equals and column):
            raise ValueError(f"--map: expected FIELD=COLUMN, such as prompt=question, got {pair!r}.")
        columns[field] = column
    return columns


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Print, when work is interrupted, that it can be resumed."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. The work so far is kept in {out}: run the same command to resume.", err=True)
        raise typer.Exit(130) from None


def say(text: str) -> None:
    """Print a result, once when there are several processes."""
    from citer_hf.runs import process_state

    if process_state().is_main_process:
        typer.echo(text)
