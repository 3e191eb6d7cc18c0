"""Long runs: files that are whole or absent, work that can be resumed, one progress bar, provenance."""

import dataclasses
import hashlib
import importlib
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from .model.routers import as_threshold

logger = logging.getLogger(__name__)

# --- Options of a command ------------------------------------------------------------------------------------------


def option(default: Any, help: str, metavar: str | None = None, flag: str | None = None, **limits: Any) -> Any:
    """Return a field of a command's options dataclass, which the Python function and the command line share."""
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar, "flag": flag, **limits})


@dataclasses.dataclass(frozen=True)
class CommandOptions:
    """Base class of the options of a command, which are checked where they are made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata.get("min")
            if None not in (value, least) and not value >= least:
                raise ValueError(f"{field.name}: expected at least {least}, got {value}.")
            if field.name == "router_threshold" and value is not None:
                as_threshold(value)


# --- Files ---------------------------------------------------------------------------------------------------------


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, and move what is made there to `path`; on an error nothing is left behind."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield made
        made.replace(path)
    except BaseException:
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is at `path` only when it is complete."""
    with beside(path) as made, made.open("wb") as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; a `ValueError` names the file when it holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        found = type(values).__name__
    except ValueError as error:
        found = f"something else ({error})"
    raise ValueError(f"{path}: expected a JSON object, got {found}. Write the file again.")


def import_extra(library: str, extra: str) -> ModuleType:
    """Return a library of an optional extra, or raise one line that says how to install it."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        package = library.partition(".")[0]
        if error.name not in (library, package):
            raise
        raise ImportError(f"{package} is not installed: pip install 'citer-hf[{extra}]'") from None


# --- Resumable work -------------------------------------------------------------------------------------------------

WORK, ARGUMENTS = ".work", "arguments.json"


class Work:
    """Results of units of work (tables of pyarrow, or JSON), kept in `out/.work` and divided among processes."""

    progress: "Progress"

    def __init__(self, out: Path | None, arguments: Mapping[str, Any]):
        self.process, self.processes = 0, 1
        if out is None:
            # Everything is computed in this process.
            self._temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self._temporary.name)
            return
        state = process_state()
        self.process, self.processes = state.process_index, state.num_processes
        self.folder = Path(out) / WORK
        begun, wanted = self.folder / ARGUMENTS, json.loads(json.dumps(dict(arguments), default=str))
        if self.process == 0 and not begun.exists():
            if out.exists() and (not out.is_dir() or any(path.name != WORK for path in out.iterdir())):
                raise FileExistsError(f"out: {out} exists already. Choose another directory, or remove it.")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(begun, wanted)
        self.wait()
        check_arguments(out, read_json(begun), wanted)

    def run(self, name: str, units: Sequence[Any], compute: Callable[[Any], Any]) -> list[Any]:
        """Compute the units that nobody has computed yet, and return the results of all, in order."""
        (self.folder / name).mkdir(exist_ok=True)
        self.progress.begin(name, math.ceil(len(units) / self.processes))
        for number in range(self.process, len(units), self.processes):
            if self._find(name, number) is None:
                value, path = compute(units[number]), self.folder / name / f"{number:06d}.json"
                if type(value).__module__.startswith("pyarrow"):
                    write_table(value, path.with_suffix(".parquet"))
                else:
                    write_json(path, {"value": value})
            self.progress.advance()
        self.wait()
        return [self._read(name, number) for number in range(len(units))]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return one result, computed by the main process unless it is kept already."""
        return self.run(name, [None], lambda _: compute())[0]

    def wait(self) -> None:
        """Wait for the other processes; `ConnectionError` when one has ended."""
        if self.processes > 1:
            with explained():
                process_state().wait_for_everyone()

    def _find(self, name: str, number: int) -> Path | None:
        paths = (self.folder / name / f"{number:06d}{suffix}" for suffix in (".json", ".parquet"))
        return next((path for path in paths if path.exists()), None)

    def _read(self, name: str, number: int) -> Any:
        path = self._find(name, number)
        if path is None:
            raise FileNotFoundError(f"{self.folder / name}: unit {number} is gone. Run the same command to resume.")
        if path.suffix == ".json":
            return read_json(path)["value"]
        return importlib.import_module("pyarrow.parquet").read_table(path, memory_map=True)


@contextmanager
def work_in(out: Path | None, arguments: Mapping[str, Any]) -> Iterator[Work]:
    """Show how far the work in a directory is, and remove the kept results when all of it is done."""
    work = Work(out, arguments)
    with progress_bar(work.process == 0) as work.progress:
        yield work
        # Another process may still be at its last results.
        work.wait()
    if work.process == 0:
        shutil.rmtree(work.folder, ignore_errors=True)


def check_arguments(out: Path, found: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` when a directory holds the work of other arguments, and name those that differ."""
    different = sorted(key for key in found.keys() | arguments.keys() if found.get(key) != arguments.get(key))
    if different:
        raise ValueError(
            f"out: {out} holds work that was begun with other arguments: "
            + "; ".join(f"{key} was {found.get(key)!r} and is {arguments.get(key)!r}" for key in different)
            + ". Give the same arguments to resume (in every process), or another directory."
        )


def write_table(table: Any, path: Path) -> None:
    with atomic_write(path) as file:
        importlib.import_module("pyarrow.parquet").write_table(table, file)


# --- Progress -------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on stderr; where that is no terminal, one line for every kind of work."""

    def __init__(self, bar: Any, shown: bool, by_thread: bool):
        self._bar, self._task, self._shown, self._by_thread = bar, bar.add_task("", total=None), shown, by_thread

    def begin(self, description: str, total: int | None) -> None:
        self._bar.reset(self._task, description=description, total=total)
        if self._shown and self._bar.disable:
            print(description if total is None else f"{description}: {total}", file=sys.stderr)

    def advance(self, done: int = 1) -> None:
        self._bar.advance(self._task, done)
        if not self._by_thread:
            self._bar.refresh()


@contextmanager
def progress_bar(shown: bool = True, by_thread: bool = True) -> Iterator[Progress]:
    """Show how far a run is, with an estimate of the time left; a thread that draws slows down what is timed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    counts, passed, left = MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    columns = ("{task.description:24}", BarColumn(), counts, passed, "passed,", left, "left")
    disable = not (shown and console.is_terminal)
    with Bar(*columns, console=console, transient=True, auto_refresh=by_thread, disable=disable) as bar:
        yield Progress(bar, shown, by_thread)


# --- Processes ------------------------------------------------------------------------------------------------------

# One process may have hours of work left when another has none: torch would give up after minutes.
LONGEST_WAIT = timedelta(days=30)
# What launchers tell a process about the others.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def process_state() -> Any:
    """Return accelerate's `PartialState`: which of how many processes this is; the first call connects them."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if PartialState._shared_state:
        return PartialState()
    # accelerate takes a machine without accelerator for a single process, unless it is told.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    launched = any(name in os.environ for name in LAUNCHED)
    if parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ and not launched:
        logger.warning(
            "accelerate has started one process: with --cpu it starts several through MPI alone. Start them with "
            "`accelerate launch --multi_gpu --num_processes N` (on a CPU too) or `torchrun --nproc-per-node N`."
        )
    return PartialState(cpu=on_cpu, **({"timeout": LONGEST_WAIT} if launched else {}))


@contextmanager
def explained() -> Iterator[None]:
    """Raise `ConnectionError` where torch says that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "Another process has ended before its work was done; the reason is above. What is done is kept: run the "
            f"same command to resume. ({str(error).strip().splitlines()[0]})"
        ) from error


@contextmanager
def alone() -> Iterator[None]:
    """Make `Trainer` take this process for the only one: it must not wait for the others."""
    from accelerate.state import AcceleratorState

    hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)
        process_state()


# --- Provenance -----------------------------------------------------------------------------------------------------

# A token of the Hub; real ones are longer.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def provenance(model: Any, options: Any = None) -> dict[str, Any]:
    """Return what a run was made with: router, base models, versions, machine, date and options (a dataclass)."""
    import torch
    import transformers

    from . import __version__

    return {
        "router_sha256": router_sha256(model.router),
        "router": {"name": anonymous(model.name_or_path), "type": model.config.router["type"]},
        **base_models(model),
        "versions": {
            "citer_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": machine(model.slm.device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": anonymous(vars(options) if options is not None else {}),
    }


def base_models(model: Any) -> dict[str, dict[str, Any]]:
    """Return what identifies both base models: name, commit, size, and a sha256 of a sample of their weights."""
    return {
        role: {
            "name": anonymous(base.name_or_path),
            "commit": model._commits.get(role),
            "parameters": base.num_parameters(),
            "sample_sha256": sample_sha256(base),
        }
        for role, base in (("slm", model.slm), ("llm", model.llm))
    }


def sample_sha256(model: Any) -> str:
    """Return the sha256 of about 32 numbers of each weight, in whatever precision and place a model is loaded."""
    import torch

    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            flat = tensor.detach().reshape(-1)
            digest.update(str(flat[:: max(flat.numel() // 32, 1)].to(torch.bfloat16).cpu().tolist()).encode())
    return digest.hexdigest()


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def router_sha256(router: Any) -> str | None:
    """Return the sha256 of the `model.safetensors` that a router is saved as, or `None` for one without weights."""
    from safetensors.torch import save

    tensors = router if isinstance(router, Mapping) else router.state_dict(prefix="router.")
    own = {key: value.detach().cpu().contiguous() for key, value in tensors.items() if key.startswith("router.")}
    return hashlib.sha256(save(own, metadata={"format": "pt"})).hexdigest() if own else None


def file_sha256(path: Path) -> str | None:
    """Return the sha256 of the router in a `model.safetensors`, which may hold base models too."""
    from safetensors.torch import load_file

    return router_sha256(load_file(path)) if path.is_file() else None


def machine(device: Any) -> dict[str, Any]:
    """Return kind and name of a device, and the number of threads."""
    import torch

    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return {"device": device.type, "name": name, "threads": torch.get_num_threads()}


def anonymous(value: Any) -> Any:
    """Return arguments as they may be published: only the last part of absolute paths, no tokens."""
    if isinstance(value, Mapping):
        return {str(key): anonymous(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [anonymous(one) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    value = TOKEN.sub("hf_...", str(value))
    return Path(value).name if value.startswith("~") or Path(value).is_absolute() else value
