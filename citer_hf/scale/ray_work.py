"""Units of work on Ray: each actor loads the pair once. Actors may join, leave and die at any time."""

import copy
import io
import os
import pickle
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..model.modeling import CiterForCausalLM
from ..model.references import ROLES
from ..runs import import_extra, sample_sha256

Load = Callable[[], CiterForCausalLM]
# A unit during which so many actors died is given up; new machines are looked for so often.
DEATHS, SECONDS = 3, 10


class Actor:
    """A process of Ray that loads the pair, and computes units with its two models."""

    def load(self, load: Load, folder: str, sums: Mapping[str, str]) -> None:
        # Relative paths are those of the command.
        if os.path.isdir(folder):
            os.chdir(folder)
        model = load()
        for role in ROLES:
            if sample_sha256(getattr(model, role)) != sums[role]:
                raise ValueError(f"ray: actors load another {role.upper()} than that of the pair. Load the same one.")
        self.known = [model.slm, model.llm, model.load_tokenizer(), None]
        self.function: tuple[bytes, Any] = (b"", None)

    def compute(self, function: bytes, unit: bytes) -> Any:
        # A function keeps what it has found out: it is loaded once.
        if self.function[0] != function:
            self.function = function, Unpickler(function, self.known).load()
        return self.function[1](Unpickler(unit, self.known).load())


class Unpickler(pickle.Unpickler):
    """Puts an actor's own models where those of the command were."""

    def __init__(self, data: bytes, known: Sequence[Any]):
        super().__init__(io.BytesIO(data))
        self.known = known

    def persistent_load(self, key: Any) -> Any:
        return self.known[key] if isinstance(key, int) else pickle.loads(key).to(self.known[0].device)


def pickled(thing: Any, known: Sequence[Any]) -> bytes:
    """Pickle without what every actor has, and with routers for any device."""
    ray_pickle, file = import_extra("ray.cloudpickle", "ray"), io.BytesIO()

    class Pickler(ray_pickle.Pickler):  # type: ignore[name-defined]
        def persistent_id(self, part: Any) -> Any:
            if isinstance(part, nn.Module) and not isinstance(part, PreTrainedModel):
                return ray_pickle.dumps(copy.deepcopy(part).cpu())
            return next((place for place, one in enumerate(known) if part is one), None)

    Pickler(file).dump(thing)
    return file.getvalue()


class Pool:
    """As many actors as the cluster has GPUs, or else CPUs."""

    def __init__(self, model: CiterForCausalLM, load: Load):
        self.ray, self.model = import_extra("ray", "ray"), model
        self.recipe = load, os.getcwd(), {role: sample_sha256(getattr(model, role)) for role in ROLES}
        self.actors, self.idle = list[Any](), list[Any]()
        # What actors are at: the number of a unit, or `None` while they load the pair.
        self.at: dict[Any, tuple[Any, int | None]] = {}

    def grow(self, most: int) -> None:
        """Have an actor for each GPU or CPU of the machines that are there now."""
        if not self.ray.is_initialized():
            self.ray.init(log_to_driver=False)
        there = self.ray.cluster_resources()
        kind = "GPU" if there.get("GPU") else "CPU"
        remote = self.ray.remote(Actor).options(**{f"num_{kind.lower()}s": 1})
        while len(self.actors) < min(most, max(int(there.get(kind, 0)), 1)):
            self.actors.append(actor := remote.remote())
            self.at[actor.load.remote(*self.recipe)] = (actor, None)

    def compute(
        self, function: Callable[[Any], Any], units: Sequence[Any], numbers: Sequence[int], work: Any
    ) -> Iterator[tuple[int, Any]]:
        """Compute units of work, and give number and result of each as it comes."""
        known = [self.model.slm, self.model.llm, self.model.load_tokenizer(), work]
        sent, waiting, deaths, left = None, deque(numbers), Counter[int | None](), len(numbers)
        while left:
            self.grow(left)
            sent = sent or self.ray.put(pickled(function, known))
            while self.idle and waiting:
                actor, number = self.idle.pop(), waiting.popleft()
                self.at[actor.compute.remote(sent, pickled(units[number], known))] = (actor, number)
            for done in self.ray.wait([*self.at], timeout=SECONDS)[0]:
                actor, at = self.at.pop(done)
                try:
                    value = self.ray.get(done)
                except self.ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except self.ray.exceptions.RayError as error:
                    # The actor has died: there will be another one, and any one has its unit.
                    self.actors.remove(actor)
                    waiting.extend([] if at is None else [at])
                    deaths[at] += 1
                    if deaths[at] == DEATHS:
                        raise ChildProcessError(f"ray: actors die again and again. {error}") from None
                    continue
                self.idle.append(actor)
                if at is None:
                    del deaths[None]
                else:
                    left -= 1
                    yield at, value


def pool_of(model: CiterForCausalLM, ray: bool | Load) -> Pool | None:
    """Return actors that load a pair as they are told, or from its repository; `None`: all work is done here."""
    if ray is True:
        if model._repository is None:
            raise ValueError("ray: this pair was not loaded from a repository. Give a function that loads it.")
        (name, where), dtypes = model._repository, {f"{role}_dtype": getattr(model, role).dtype for role in ROLES}
        ray = partial(CiterForCausalLM.from_pretrained, name, device_map="auto", **dtypes, **where)
    return Pool(model, ray) if callable(ray) else None
