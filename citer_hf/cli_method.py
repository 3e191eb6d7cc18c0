"""The commands of the method: `citer label`, `train`, `evaluate` and `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    with plain_errors():
        from citer_hf.training import command

        command.label(
            command.load_pair(resolve_model(model), dtype, device_map, trust_remote_code),
            data,
            checker,
            out,
            columns=command.parse_columns(columns),
            split=split,
            limit=limit,
            router_threshold=router_threshold,
            rollouts=rollouts,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
        )


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
    with plain_errors():
        from citer_hf.training import command

        command.train(
            command.load_pair(resolve_model(model), dtype, device_map, trust_remote_code),
            labels,
            out,
            objective=objective,
            rounds=rounds,
            data=data,
            checker=checker,
            rollouts=rollouts,
            settings=command.settings(learning_rates, epochs, batch_size, seed),
            report_to=report_to,
        )


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
    with plain_errors():
        from citer_hf.training import command

        command.evaluate(
            command.load_pair(resolve_model(model), dtype, device_map, trust_remote_code),
            command.read(data, columns, split, limit),
            checker,
            out,
            baselines=baselines,
            compare=compare or (),
            methods=None if methods is None else methods.split(","),
            shares=command.parse_numbers("--shares", shares),
            thresholds=command.parse_numbers("--thresholds", thresholds),
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
        )


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
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy MODEL, a directory, and write the threshold there.")
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
    """Find the threshold for a budget: an LLM share, or a fraction of the LLM's accuracy."""
    with plain_errors():
        from citer_hf.training import command

        name = resolve_model(model)
        if write and not Path(name).is_dir():
            raise ValueError(f"--write: {model} is no directory; save the router there first.")
        command.calibrate(
            command.load_pair(name, dtype, device_map, trust_remote_code),
            command.read(data, columns, split, limit),
            checker,
            write=write,
            out=out,
            llm_share=llm_share,
            accuracy=accuracy,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
        )
