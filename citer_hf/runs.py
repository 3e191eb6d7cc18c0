"""Long runs: files that are whole or absent, work that can be resumed, one progress bar, provenance."""

import dataclasses
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file, save
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers.utils.hub import cached_file

from . import __version__
from .model.quality import sample_of
from .model.references import file_keywords
from .model.routers import as_threshold

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
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is at `path` only when it is complete; on an error nothing is left behind."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with made.open("wb") as file:
            yield file
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; a `ValueError` names the file when it holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        values = error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {values!r:.200}. Write the file again.")
    return values


def check_inside(file: Path, folder: Path) -> None:
    """Raise an error for a link that leads out of a directory."""
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"directory: {file} is a link out of the directory. Replace it by the file.")


def fetch(source: str, name: str, keywords: Mapping[str, Any]) -> Path | None:
    """Return a file of the repository that a pair was loaded from, or `None` where it is not there."""
    where = file_keywords({**keywords, "force_download": None})
    file = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
    if file is not None and os.path.isdir(source):
        check_inside(Path(file), Path(source))
    return None if file is None else Path(file)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; who connects before the pair is loaded waits."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: {error}. Choose others; --port 0 takes a free one.") from error


def is_address(llm: Any) -> bool:
    """Return True if an LLM is named by the address of a server that has it."""
    return isinstance(llm, str) and llm.lower().startswith(("http://", "https://"))


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
    """Results of units of work (tensors, numbers, lists), kept in `out/.work` and divided among processes."""

    def __init__(self, out: Path | None, arguments: Mapping[str, Any], pool: Any = None):
        # Actors of Ray, where they compute the units.
        self.pool = pool
        self.process, self.processes = 0, 1
        if out is None:
            # Everything is computed in this process.
            self._temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self._temporary.name)
            return
        state = process_state()
        if pool is not None and state.num_processes > 1:
            raise ValueError("ray: expected one process, which gives work to actors. Start it without a launcher.")
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
        paths = [self.folder / name / f"{number:06d}.pt" for number in range(len(units))]
        own = [number for number in range(self.process, len(units), self.processes) if not paths[number].exists()]
        made = ((number, compute(units[number])) for number in own)
        if self.pool is not None:
            made = self.pool.compute(compute, units, own, self)
        for number, value in progress(made, name, len(own), shown=self.process == 0):
            with atomic_write(paths[number]) as file:
                torch.save(value, file)
        self.wait()
        return [torch.load(path, mmap=True, weights_only=True) for path in paths]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return one result, computed by the main process unless it is kept already."""
        return self.run(name, [None], lambda _: compute())[0]

    def wait(self) -> None:
        """Wait for the other processes; torch raises `RuntimeError` when one has ended."""
        if self.processes > 1:
            process_state().wait_for_everyone()


@contextmanager
def work_in(out: Path | None, arguments: Mapping[str, Any], pool: Any = None) -> Iterator[Work]:
    """Give the work in a directory, and remove the kept results when all of it is done."""
    work = Work(out, arguments, pool)
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


# --- Progress -------------------------------------------------------------------------------------------------------


def note(text: str) -> None:
    """Print a text on stderr, once where there are several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def progress(things: Any, description: str, total: int | None = None, shown: bool = True) -> Any:
    """Return things within a bar on stderr; where that is no terminal, one line says how many they are."""
    total = len(things) if total is None else total
    if shown and not sys.stderr.isatty():
        print(f"{description}: {total}", file=sys.stderr)
    return tqdm(things, description, total, leave=False, disable=None if shown else True)


# --- Processes ------------------------------------------------------------------------------------------------------

# One process may have hours of work left when another has none: torch would give up after minutes.
LONGEST_WAIT = timedelta(days=30)
# What launchers tell a process about the others.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def process_state() -> Any:
    """Return accelerate's `PartialState`: which of how many processes this is; the first call connects them."""
    if PartialState._shared_state:
        return PartialState()
    # accelerate takes a machine without accelerator for a single process, unless it is told.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    launched = any(name in os.environ for name in LAUNCHED)
    return PartialState(cpu=on_cpu, **({"timeout": LONGEST_WAIT} if launched else {}))


@contextmanager
def alone() -> Iterator[None]:
    """Make `Trainer` take this process for the only one: it must not wait for the others."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)
        process_state()


# --- Provenance -----------------------------------------------------------------------------------------------------

# The file of a directory of labels that says how they were made.
LABELS = "labels.json"
# A token of the Hub; real ones are longer.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def provenance(model: Any, options: Any = None) -> dict[str, Any]:
    """Return what a run was made with: router, base models, versions, machine, date and options (a dataclass)."""
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


def arguments_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a provenance what results depend on: no names, versions, date and machine."""
    own = {key: value for key, value in made.items() if key.endswith("sha256") or key in ("checker", "dtypes")}
    models = {f"{role}_sha256": (made.get(role) or {}).get("sample_sha256") for role in ("slm", "llm")}
    return {**(made.get("options") or {}), **own, **models}


# Of a remote model, whose weights nobody here has seen.
REMOTE = "remote: "


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
    if getattr(model, "is_remote", False):
        return f"{REMOTE}{anonymous(model.name_or_path)}"
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            digest.update(str(sample_of(tensor, 32)).encode())
    return digest.hexdigest()


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def router_sha256(router: Any) -> str | None:
    """Return the sha256 of the `model.safetensors` that a router is saved as, or `None` for one without weights."""
    tensors = router if isinstance(router, Mapping) else router.state_dict(prefix="router.")
    own = {key: value.detach().cpu().contiguous() for key, value in tensors.items() if key.startswith("router.")}
    return hashlib.sha256(save(own, metadata={"format": "pt"})).hexdigest() if own else None


def method_of(told: Mapping[str, Any], router: str | None, kind: str) -> str | None:
    """Return the method as which a provenance or results file holds a router, or `None` when it tells of others."""
    provenance = told.get("provenance", told)
    for run in provenance.get("runs") or [provenance]:
        for method, sha256 in (run.get("routers_sha256") or {}).items():
            # Routers without weights are known by their kind. A method may be "KIND, veto X".
            if sha256 == router and (router is not None or str(method).partition(",")[0] == kind):
                return str(method)
        is_known = router is not None or (run.get("router") or {}).get("type") == kind
        if run.get("router_sha256", "") == router and is_known:
            return str(told.get("objective") or kind)
    return None


def file_sha256(path: Path) -> str | None:
    """Return the sha256 of the router in a `model.safetensors`, which may hold base models too."""
    return router_sha256(load_file(path)) if path.is_file() else None


def machine(device: Any) -> dict[str, Any]:
    """Return kind and name of a device, and the number of threads."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
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
