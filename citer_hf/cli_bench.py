"""Options of `citer bench` that mean nothing with `--simulate`, and those that mean nothing without it."""

from __future__ import annotations

import typer

__all__ = ["refuse_options"]

# What runs models, and what to do instead.
MEASURES = {
    "thresholds": "no router decides. Give --shares instead",
    "prompts": "nobody reads prompts. Give their length as --prompt-length instead",
    "repeats": "nothing is repeated. Leave it out",
    "warmup": "nothing warms up. Leave it out",
    "device": "the machine is the one of --gpu or --bandwidth. Leave it out",
    "dtype": "weights have the bits of their configurations. Give --slm-bits and --llm-bits instead",
    "cache_implementation": "passes are taken to be compiled. Leave it out",
    "seed": "its draws are always the same. Leave it out",
    "released_loop": "that loop is not projected. Leave it out",
    "assisted": "assisted generation is not projected. Leave it out",
    "plot": "nothing is drawn. Give --json instead",
    "trust_remote_code": "code that repositories bring is not run. Leave it out",
}
# What projects, and what to do instead.
PROJECTS = {
    "gpu": "--device says where to measure",
    "bandwidth": "that of this machine is measured",
    "slm_bits": "--dtype says in what precision to measure",
    "llm_bits": "--dtype says in what precision to measure",
    "tensor_parallel": "one copy of the pair is measured, on --device",
    "replicas": "one copy of the pair is measured, on --device",
}


def refuse_options(context: typer.Context, simulate: bool) -> None:
    """Refuse an option that would be ignored, whatever its value."""
    for name, instead in (MEASURES if simulate else PROJECTS).items():
        source = context.get_parameter_source(name)
        if source is None or source.name in ("DEFAULT", "DEFAULT_MAP"):
            continue
        option = "--" + name.replace("_", "-")
        if name == "assisted" and not context.params[name]:
            option = "--no-assisted"
        if simulate:
            raise ValueError(f"{option}: with --simulate no model runs, and {instead}, or leave out --simulate.")
        raise ValueError(
            f"{option}: this is for --simulate alone; without it {instead}. Add --simulate, or leave it out."
        )
