"""Sharing a router repository or labels: the card, and the push to the Hub in one commit."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, SpaceCardData
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import CardData

from . import __version__
from .model.modeling import CiterForCausalLM
from .runs import LABELS, atomic_write, check_inside, fetch, file_sha256, method_of, option, read_json

logger = logging.getLogger(__name__)

CARD, CONFIG, WEIGHTS = "README.md", "config.json", "model.safetensors"
TEMPLATE = Path(__file__).with_name("card.md")
GENERATED = "<!-- Written by citer_hf from the files beside it. Remove this line to keep what you change below. -->"
# The id of labels in the card that `citer label` writes, before they are pushed.
NO_ID = "USER/LABELS"
TAGS = ("citer", "token-level-routing")
# The files that tell of a router: each JSON file names the router by its sha256, the others belong to that file.
FACTS = {"provenance.json": (), "results.json": ("results.md", "curve.png")}
ALL_FACTS = tuple(name for json, others in FACTS.items() for name in (json, *others))
# What may be left on the Hub of a router that is replaced; files that are uploaded are not deleted.
OF_A_ROUTER = ("*.safetensors", "*.safetensors.index.json", "citer/*", "*_citer.py", "slm*/*", "llm*/*")
# Hidden files, Python's cache and logs of a training, which name this machine, stay on it.
HIDDEN = (".*", "*/.*", "*__pycache__/*", "runs/*")
# The gradio of Spaces, and their program.
GRADIO = "6.31.0"
SPACE_APP = """\
from citer_hf import CiterForCausalLM
from citer_hf.playground import playground

model = CiterForCausalLM.from_pretrained({repo_id!r}, device_map="auto", dtype="auto")
playground(model, host="0.0.0.0", port=7860)
"""


@dataclass(frozen=True)
class PushOptions:
    dataset: bool = option(False, "DIR holds labels of `citer label`; push them as a data set.")
    private: bool = option(False, "Make a new repository private.")
    create_pr: bool = option(False, "Open a pull request instead.")
    revision: str | None = option(None, "The branch to push to. [default: the main one]", metavar="NAME")
    commit_message: str | None = option(None, "First line of the commit. [default: what it is]", metavar="TEXT")
    commit_description: str | None = option(None, "What else the commit says.", metavar="TEXT")
    tags: Sequence[str] = option((), "Another tag for the card. May be repeated.", metavar="TAG", flag="--tag")
    space: str | None = option(None, "Also write a Space that shows the router on a page.", metavar="USER/NAME")

    def __post_init__(self) -> None:
        if self.space is not None and (self.create_pr or self.revision is not None or self.dataset):
            raise ValueError(
                "space: a Space shows a router on the main branch. Leave create_pr, revision and dataset out."
            )


def push(directory: str | os.PathLike[str], repo_id: str, *, token: str | bool | None = None, **options: Any) -> str:
    """Upload a router repository with a model card, or labels with a card of their own, in one commit.

    The card is written into the directory as `README.md`, unless a person's card is there or on the Hub. What is left
    on the Hub of another router is removed there in the same commit.

    Args:
        directory: Made by `save_pretrained` or `citer train`; with `dataset`, by `citer label`. `results.json` and
            `curve.png` of `citer evaluate` in it are shown in the card when they are of this router.
        repo_id: Where to, such as `user/my-router`; made when it is not there.
        token: Of the Hub. Default: the one that `hf auth login` saved.
        options: The fields of `PushOptions`.

    Returns:
        The address of the commit, or of the pull request; on a second line that of the commit in the Space.

    Raises:
        ValueError: when the directory is no router repository, or refers to models that nobody else has.
        OSError: when something cannot be read or uploaded; then the directory is as it was, but for the card.
    """
    wanted = PushOptions(**options)
    return (push_labels if wanted.dataset else _push)(Path(directory), repo_id, token, wanted)


def push_model(
    model: CiterForCausalLM, directory: str, repo_id: str, token: str | bool | None = None, **options: Any
) -> str:
    """Upload a pair that was just saved, with what tells of its router where the pair was loaded from."""
    folder, card = Path(directory), None
    if model._repository is not None:
        source, keywords = model._repository[0], {**model._repository[1], "token": token}
        for name, file in facts_of(folder, lambda name: fetch(source, name, keywords), source).items():
            shutil.copyfile(file, folder / name)
        card = fetch(source, CARD, keywords)
    wanted = PushOptions(**{key: value for key, value in options.items() if value is not None})
    return _push(folder, repo_id, token, wanted, card)


def _push(
    folder: Path, repo_id: str, token: str | bool | None, options: PushOptions, earlier_card: Path | None = None
) -> str:
    check(folder)
    here = facts_of(folder, folder.joinpath, str(folder))
    api = HfApi(token=token)

    def on_hub(name: str) -> Path | None:
        return fetch(repo_id, name, {"token": token, "revision": options.revision})

    with uploading(repo_id):
        repo_id = repository(api, repo_id, options, "model")
        if not (folder / CARD).exists() and (card := on_hub(CARD) or earlier_card) is not None:
            shutil.copyfile(card, folder / CARD)
        # Beside the same router, what tells of it stays on the Hub.
        kept = facts_of(folder, lambda name: None if name in here else on_hub(name))
        write_card(folder, repo_id, options.tags, kept | here)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=[*HIDDEN, *(name for name in ALL_FACTS if name not in here)],
            delete_patterns=[*OF_A_ROUTER, *(name for name in ALL_FACTS if name not in kept)],
            commit_message=options.commit_message or "Upload router",
            commit_description=options.commit_description,
            create_pr=options.create_pr,
            revision=options.revision,
        )
    addresses = [commit.pr_url or commit.commit_url]
    if options.space is not None:
        with uploading(options.space):
            addresses.append(push_space(api, options.space, repo_id, options.private))
    return "\n".join(map(str, addresses))


def repository(api: HfApi, repo_id: str, options: PushOptions, kind: str) -> str:
    """Make a repository and its branch where they are not there, and return the whole id."""
    repo_id = api.create_repo(repo_id, repo_type=kind, private=options.private or None, exist_ok=True).repo_id
    if options.revision is not None and not options.revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type=kind, branch=options.revision, exist_ok=True)
    return repo_id


def push_labels(folder: Path, repo_id: str, token: str | bool | None, options: PushOptions) -> str:
    """Upload the labels in a directory as a data set; its card names the data set."""
    files = [LABELS, *(file.relative_to(folder).as_posix() for file in sorted(folder.glob("*/*.parquet")))]
    if len(files) == 1 or not all((folder / name).is_file() for name in (LABELS, CARD)):
        raise ValueError(f"directory: {folder} holds no labels. Give one that a finished `citer label` has made.")
    for name in (CARD, *files):
        check_inside(folder / name, folder)
    api = HfApi(token=token)
    where: dict[str, Any] = {"repo_type": "dataset", "revision": options.revision}
    with uploading(repo_id):
        repo_id = repository(api, repo_id, options, "dataset")
        there = api.list_repo_files(repo_id, **where)
        published = Path(api.hf_hub_download(repo_id, CARD, **where)).read_text("utf-8") if CARD in there else None
        card = labels_card((folder / CARD).read_text("utf-8"), published, repo_id, options.tags)
        old = [name for name in there if name.endswith(".parquet") and name not in files]
        added = [CommitOperationAdd(CARD, card.encode()), *(CommitOperationAdd(name, folder / name) for name in files)]
        commit = api.create_commit(
            repo_id,
            [*added, *map(CommitOperationDelete, old)],
            commit_message=options.commit_message or "Upload labels",
            commit_description=options.commit_description,
            create_pr=options.create_pr,
            **where,
        )
    return str(commit.pr_url or commit.commit_url)


def labels_card(written: str, published: str | None, repo_id: str, tags: Sequence[str]) -> str:
    """Return the card of labels under their id; on the Hub, a person's card stays, and so does added metadata."""
    if published is not None and GENERATED in written and GENERATED not in published:
        return published
    card = RepoCard(written.replace(NO_ID, repo_id), ignore_metadata_errors=True)
    cards = [RepoCard(text, ignore_metadata_errors=True) for text in (written, published or written)]
    own, old = (one.data.to_dict() for one in cards)  # type: ignore[no-untyped-call]
    every = [*own.get("tags", ()), *old.get("tags", ()), *tags]
    card.data = CardData(**{**old, **own, "tags": list(dict.fromkeys(every))})
    return str(card)


@contextmanager
def uploading(repo_id: str) -> Iterator[None]:
    """Turn whatever stops an upload into one error that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, HTTPError) as error:
        raise OSError(
            f"push: the upload to {repo_id} failed: {str(error).strip() or repr(error)}\nNothing on this machine was "
            "lost, and nothing half on the Hub. Check the network and your token (`hf auth login`), and push again."
        ) from error


def push_space(api: HfApi, space: str, repo_id: str, private: bool) -> str:
    """Write a Space that shows a router of the Hub, in one commit, and return the address of the commit."""
    about = SpaceCardData(
        title=repo_id.split("/")[-1], sdk="gradio", sdk_version=GRADIO, app_file="app.py", models=[repo_id]
    )
    text = f"The router [{repo_id}](https://huggingface.co/{repo_id}), on the page of `citer playground`."
    files = {
        "app.py": SPACE_APP.format(repo_id=repo_id),
        "requirements.txt": f"citer-hf[playground]=={__version__.rpartition('.')[0]}.*\ntorch\n",
        "README.md": f"---\n{about.to_yaml()}\n---\n\n{text}\n",
    }
    space = api.create_repo(
        space, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True
    ).repo_id
    added = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    return str(api.create_commit(space, added, repo_type="space", commit_message=f"Show {repo_id}").commit_url)


def check(folder: Path) -> None:
    """Raise an error when a directory holds no router, or one that nobody else could load."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("model_type") != "citer":
        has_labels = (folder / LABELS).is_file()
        todo = "Add --dataset to push labels" if has_labels else "Give one that `save_pretrained` has made"
        raise ValueError(f"directory: {folder} is no router repository. {todo}.")
    for role in ("slm", "llm"):
        reference = config.get(f"{role}_reference") or {}
        for part in (reference, reference.get("adapter") or {}):
            name = part.get("name_or_path")
            if name is not None and (os.path.isabs(name) or os.path.isdir(name)):
                raise ValueError(
                    f"{role}: the router refers to the directory {name} of this machine. Save it from a pair that was "
                    "loaded by repository ids, or with save_base_models=True."
                )
    for file in folder.rglob("*"):
        check_inside(file, folder)


def facts_of(folder: Path, find: Callable[[str], Path | None], place: str | None = None) -> dict[str, Path]:
    """Return the files that tell of a directory's router, by name; `place` is named where others are left out."""
    router, kind = file_sha256(folder / WEIGHTS), read_json(folder / CONFIG)["router"]["type"]
    found: dict[str, Path] = {}
    foreign: list[str] = []
    for json, others in FACTS.items():
        files = {name: file for name in (json, *others) if (file := find(name)) is not None and file.is_file()}
        if json in files and method_of(read_json(files[json]), router, kind) is not None:
            found |= files
        elif json in files:
            foreign += [json, *others]
    if foreign and place is not None:
        logger.warning(
            "Left out: %s of %s. They do not name the router here (sha256 %s).", ", ".join(foreign), place, router
        )
    return found


def write_card(folder: Path, repo_id: str, tags: Sequence[str], facts: Mapping[str, Path]) -> None:
    """Write a directory's card from the files that tell of its router, unless a person has written one."""
    path, metadata = folder / CARD, {}
    if path.is_file():
        present = path.read_text(encoding="utf-8")
        if GENERATED not in present:
            return
        metadata = ModelCard(present, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    config = read_json(folder / CONFIG)
    provenance, results = (read_json(facts[json]) if json in facts else {} for json in FACTS)
    references: dict[str, Any] = {role: config.get(f"{role}_reference") or {} for role in ("slm", "llm")}
    parts = [part for at in references.values() for part in (at, at.get("adapter") or {})]
    bases = list(dict.fromkeys(filter(None, (part.get("name_or_path") or part.get("origin") for part in parts))))
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "model-index": None}
    metadata["tags"] = list(dict.fromkeys([*TAGS, *metadata.get("tags", ()), *tags]))
    # The Hub's relation for a small set of weights that works on top of models as they are.
    metadata |= {"base_model": bases or None, "base_model_relation": "adapter" if bases else None}
    method = method_of(results, file_sha256(folder / WEIGHTS), config["router"]["type"]) if results else None
    card = ModelCard.from_template(
        ModelCardData(**{key: value for key, value in metadata.items() if value is not None}),
        template_path=str(TEMPLATE),
        generated=GENERATED,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        router=config["router"],
        threshold=config["router_threshold"],
        **references,
        results=results,
        points=results["methods"].get(method, []) if results else [],
        dataset=f"sha256:{results['provenance']['data_sha256'][:12]}" if results else "",
        has_curve="curve.png" in facts,
        training={**(provenance.get("options") or {}), **provenance},
        has_chat=(folder / "chat_template.jinja").is_file(),
    )
    with atomic_write(path) as file:
        file.write(str(card).encode())
