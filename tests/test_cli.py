"""`citer`, as a user and as a script meet it: options, loading, errors, `citer chat`, the commands of the method."""

import json
import os
import re
import subprocess
import sys
import unittest.mock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from typer.testing import CliRunner

import citer_hf.demo
from citer_hf import CiterForCausalLM
from citer_hf import options as options_module
from citer_hf.chat import chat
from citer_hf.cli import COMMANDS, load_pair, plain_errors
from citer_hf.hub import method_of
from citer_hf.options import Options, expanded
from citer_hf.runs import file_sha256, option, read_json
from citer_hf.training import train as train_module
from citer_hf.training.train import TrainOptions
from tests.chat_pairs import Screen, chat_pair, invoke, save_demo_pair

# The options of each command by their names, which scripts rely on.
PAIR = "--revision --slm --llm --router --slm-quantization --llm-quantization --dtype --trust-remote-code"
DATA = "--data --checker --map --split --limit --max-new-tokens --batch-tokens --seed"
FLAGS = {
    "demo": "--seed --problems --router-threshold --json --export --split",
    "chat": f"{PAIR} --device-map --router-threshold --max-new-tokens --system",
    "playground": f"{PAIR} --device-map --host --port --max-new-tokens",
    "label": f"{PAIR} --device-map {DATA} --out --router-threshold --rollouts",
    "train": f"{PAIR} --device-map --labels --out --objective --rounds --checker --learning-rate --epochs --seed "
    "--patience --report-to --labels-revision",
    "evaluate": f"{PAIR} --device-map {DATA} --out --baselines --compare --methods --shares --thresholds",
    "check": f"--slm --llm --device-map {DATA.replace(' --batch-tokens', '')} --minutes --json",
    "calibrate": f"{PAIR} --device-map {DATA} --llm-share --accuracy --write",
    "bench": f"{PAIR} --device-map --device --shares --thresholds --prompts --prompt-length --batch-size "
    "--max-new-tokens --repeats --warmup --cache-implementation --seed --no-assisted --json --simulate --gpu "
    "--bandwidth --slm-bits --llm-bits --tensor-parallel --agreement --veto",
    "serve": f"{PAIR} --device-map --host --port --router-threshold --max-new-tokens --max-request-bytes "
    "--max-waiting --timeout --cache-implementation",
    "convert": "--slm --llm --out --router-threshold",
    "push": "--dataset --private --create-pr --revision --commit-message --commit-description --tag --space",
}


def test_help_names_every_command_in_full_and_imports_none() -> None:
    code = """
import sys
from typer.testing import CliRunner
from citer_hf.cli import app
print(CliRunner().invoke(app, ["-h"], terminal_width=150).stdout)
print("imported", [name for name in ("datasets", "citer_hf.evaluation", "citer_hf.hub") if name in sys.modules])
"""
    environment = {**os.environ, "COLUMNS": "150"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert all(f"  {name} " in done.stdout for name in FLAGS) and set(FLAGS) == set(COMMANDS)
    assert "..." not in done.stdout.partition("Commands:")[2] and "imported []" in done.stdout and not done.stderr


@pytest.mark.parametrize("name", FLAGS)
def test_options_keep_their_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    found = set(re.findall(r"(?<![\w-])--[\w-]+", invoke(name, "-h").stdout))
    assert set(FLAGS[name].split()) - found == set()
    assert invoke("--version").stdout == f"{citer_hf.__version__}\n"


@dataclass(frozen=True)
class Sample:
    """One field of each kind."""

    place: str | None = option(None, "Where.", "PLACE", argument=True)
    shares: tuple[float, ...] = option((0.1, 0.2), "Shares.", "P,...")
    names: Sequence[str] | None = option(None, "Names.", "NAME,...")
    folders: Sequence[Path] = option((), "Folders.", "DIR", flag="--folder")
    columns: Mapping[str, str] | None = option(None, "Columns.", "FIELD=COLUMN", flag="--map")
    size: int = option(3, "A size.", "N", min=1)
    fast: bool = option(True, "Fast.")
    loud: bool = option(False, "Loud.")

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ValueError("size: anything but 13.")


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("", {}),
        ("here --shares 0.5,1 --names a,b", {"place": "here", "shares": (0.5, 1.0), "names": ("a", "b")}),
        ("--folder a --folder b", {"folders": [Path("a"), Path("b")]}),
        ("--map a=b,x=y,z --map c=d=e", {"columns": {"a": "b", "x": "y,z", "c": "d=e"}}),
        ("--size 4 --no-fast --loud", {"size": 4, "fast": False, "loud": True}),
        ("--size 0", "--size"),
        ("--size 13", "Error: size: anything but 13."),
        ("--shares 0.5,x", "expected numbers separated by commas"),
        ("--map a", "expected FIELD=COLUMN"),
        ("--no-loud", "No such option"),
    ],
    ids=str,
)
def test_the_fields_of_a_dataclass_are_the_options(monkeypatch, arguments, given):
    seen = []
    monkeypatch.setattr(options_module, "load", lambda path: Sample)
    one = typer.Typer(rich_markup_mode=None)

    def run(options) -> None:
        seen.append(options)

    run.__annotations__ = {"options": Annotated[Options, "of.Sample"]}
    one.command()(expanded(run, plain_errors))
    result = CliRunner().invoke(one, arguments.split())
    if isinstance(given, str):
        assert result.exit_code in (1, 2) and given in result.stderr and not seen
    else:
        assert seen == [{"size": 3, "fast": True, "loud": False} | given]
        help_text = " ".join(CliRunner().invoke(one, ["--help"]).stdout.split())
        assert "Shares. [default: 0.1,0.2]" in help_text and "--fast / --no-fast" in help_text


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> unittest.mock.Mock:
    """What loading was asked for; nothing is loaded."""
    asked = unittest.mock.Mock(side_effect=ValueError("stopped"))
    monkeypatch.setattr(CiterForCausalLM, "from_pretrained", asked)
    monkeypatch.setattr(CiterForCausalLM, "from_pair", asked)
    return asked


NAMED = {"llm_name_or_path": "llm", "llm_max_memory": {"0": 1}}


@pytest.mark.parametrize(
    ("arguments", "names", "keywords"),
    [
        ("me/router --revision v2 --device-map cpu", ["me/router"], {"revision": "v2", "device_map": "cpu"}),
        ("me --trust-remote-code --slm revision=v2", ["me"], {"trust_remote_code": True, "slm_revision": "v2"}),
        ('me --llm name_or_path=llm --llm max_memory={"0":1}', ["me"], NAMED),
        ("--slm s --slm subfolder=a=b --llm l --router r", ["s", "l"], {"router": "r", "slm_subfolder": "a=b"}),
    ],
)
def test_every_keyword_of_loading_can_be_given(loading, arguments, names, keywords):
    assert invoke("chat", *arguments.split()).stderr == "Error: stopped\n"
    loading.assert_called_once_with(*names, **({"dtype": "auto", "device_map": "auto"} | keywords))


def test_either_model_can_be_quantized(loading: unittest.mock.Mock) -> None:
    invoke("chat", "me/router", "--llm-quantization", "nf4", "--slm-quantization", "int8")
    slm, llm = (loading.call_args.kwargs[f"{role}_quantization_config"] for role in ("slm", "llm"))
    assert slm.load_in_8bit and llm.load_in_4bit and llm.bnb_4bit_quant_type == "nf4"


def test_a_pair_of_two_models_chats(saved: Path) -> None:
    slm, llm = (saved.parent / role for role in ("slm", "llm"))
    result = invoke("chat", "--slm", slm, "--llm", llm, "--router", "entropy", text="/exit\n")
    assert result.exit_code == 0 and "Threshold 0.5." in result.stdout


def test_demo_is_the_name_of_the_shipped_pair(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(citer_hf.demo, "DEMO_PAIR", saved)
    result = invoke("chat", "demo", "--max-new-tokens", 4, text="Eva has 2 apples.\n/stats\n")
    assert result.exit_code == 0 and "4 tokens" in result.stdout
    monkeypatch.setattr(citer_hf.demo, "DEMO_PAIR", tmp_path / "gone")
    result = invoke("demo")
    assert result.exit_code == 1 and "gone" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("chat", 1, "MODEL, --slm, --llm: expected MODEL"),
        ("chat me/router --router mlp", 1, "MODEL, --slm, --llm: expected MODEL"),
        ("chat --slm a --llm b --revision v2", 1, "MODEL, --slm, --llm: expected MODEL"),
        ("chat {pair} --dtype fp16", 1, "dtype: expected 'auto', or a dtype of torch such as 'bfloat16', got 'fp16'"),
        ("chat {pair} --device-map abacus", 1, "--device-map: expected auto or a device, got 'abacus'"),
        ("chat {pair} --llm device_map=cuda:99", 1, "got 'cuda:99'"),
        ("chat {pair} --slm-quantization q4", 1, "--slm-quantization: expected nf4 or int8, got 'q4'"),
        ("chat {pair} --router-threshold 70", 1, "70"),
        ("chat {pair} --max-new-tokens 0", 2, "--max-new-tokens"),
        ("chat {pair} --slm abacus=3", 1, "abacus"),
        ("chat {tmp}", 1, "{tmp}"),
        ("chat {pair}/slm", 1, "{pair}/slm"),
        ("convert a.pt --slm a --llm b --out c", 1, "router: there is no file a.pt"),
        ("bench {pair} --simulate --gpu h100 --llm name_or_path={tmp}", 1, "{tmp}"),
        ("demo --split dev", 1, "no split named 'dev'"),
        ("demo --router-threshold nan", 1, "router_threshold: expected a number from 0"),
        ("demo --problems 0", 2, "--problems"),
        ("chatt", 2, "No such command"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(saved, tmp_path, arguments, status, message):
    places = {"pair": str(saved), "tmp": str(tmp_path)}
    result = invoke(*arguments.format(**places).split())
    assert result.exit_code == status and message.format(**places) in result.stderr and not result.stdout
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1
    assert status == 2 or result.stderr.count("\n") == 1, result.stderr


def test_errors_are_one_line_and_interrupted_work_says_how_to_resume(capsys, tmp_path):
    missing = ModuleNotFoundError("no", name="datasets")
    kept = f"Interrupted. The work so far is kept in {tmp_path}: run the same command to resume.\n"
    (tmp_path / ".work").mkdir()
    for error, out, status, message in (
        (ValueError("a\n b"), None, 1, "Error: a b\n"),
        (torch.OutOfMemoryError("the LLM does not fit"), None, 1, "Error: the LLM does not fit\n"),
        (missing, None, 1, "Error: datasets is not installed: pip install 'citer-hf[train]'\n"),
        (KeyboardInterrupt(), None, 130, "Interrupted.\n"),
        (KeyboardInterrupt(), tmp_path, 130, kept),
    ):
        with pytest.raises(typer.Exit) as raised, plain_errors(out, extra="train"):
            raise error
        assert (raised.value.exit_code, capsys.readouterr().err) == (status, message)


def test_faults_of_the_program_are_no_errors_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("a fault"), BrokenPipeError(), TypeError("a fault")):
        with pytest.raises(type(error)), plain_errors():
            raise error
    monkeypatch.setattr(CiterForCausalLM, "from_pretrained", unittest.mock.Mock(side_effect=TypeError("a fault")))
    with pytest.raises(TypeError, match="a fault"):
        load_pair({"model": "me/router"})
    with pytest.raises(ValueError, match="a fault"):
        load_pair({"model": "me/router", "llm": ["abacus=3"]})


def test_chat_from_a_pipe(tmp_path: Path) -> None:
    chat_pair().save_pretrained(tmp_path, save_base_models=True)
    lines = "hello\n\n/stats\n/threshold 2\nhello again\n/stats\n/reset\n/stats\n/nonsense\n"
    result = invoke("chat", tmp_path, "--max-new-tokens", 8, text=lines)
    assert result.exit_code == 0
    assert "[[" in result.stdout and "\x1b" not in result.stdout and "> " not in result.stdout
    first, second = re.findall(r"(\d+) tokens: (\d+) by the SLM, (\d+) by the LLM", result.stdout)
    assert first[0] == "8" and first[2] != "0" and second == ("8", "0", "8")
    assert "no answer yet" in result.stdout
    assert result.stderr == "Error: there is no command /nonsense; /help lists them.\n"


def test_ctrl_c_at_the_prompt_leaves_the_chat_open(monkeypatch, capsys):
    prompted = unittest.mock.Mock(side_effect=[KeyboardInterrupt(), "/threshold 0.25", EOFError()])
    monkeypatch.setattr("builtins.input", prompted)
    monkeypatch.setattr(sys, "stdin", Screen())
    model = chat_pair()
    chat(model, max_new_tokens=40)
    shown = capsys.readouterr().out
    assert "/exit or Ctrl-D leaves." in shown and "threshold 0.25" in shown
    assert prompted.call_args_list == [unittest.mock.call("> ")] * 3
    model._tokenizer = None
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        chat(model)


# ---- label, train, evaluate, calibrate ----


TRAINED = {"citer", "acceptance", "citer-s", "co-llm", "query"}
BASELINES = {*TRAINED, "confidence", "entropy", "random", "bild", "speculative"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair, its data, labels and a router that was trained on them."""
    folder = tmp_path_factory.mktemp("work")
    save_demo_pair(folder)
    invoke("demo", "--export", folder / "train.jsonl", "--problems", 10, "--split", "train")
    invoke("demo", "--export", folder / "test.jsonl", "--problems", 4)
    data = ("--data", folder / "train.jsonl", "--checker", f"{__name__}:has_digit")
    result = invoke("label", folder / "pair", *data, "--out", folder / "labels", "--max-new-tokens", 30)
    assert result.exit_code == 0, result.output
    assert "tokens of 10 answers" in result.stdout and "roll-outs of the SLM: " in result.stderr
    assert "exactly as the models see it" in result.stderr and "response from 'response'" in result.stderr
    result = invoke("train", folder / "pair", "--labels", folder / "labels", "--out", folder / "router", "--epochs", 2)
    assert result.exit_code == 0, result.output
    assert "held-out questions" in result.stdout
    return folder


def has_digit(response: str, answer: str) -> bool | None:
    """Whether a response has the answer's last digit."""
    return answer[-1] in response if response else None


def test_three_commands_give_curves_of_every_method(work, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "TrainOptions", partial(TrainOptions, learning_rates=(1e-2,), epochs=1))
    out = tmp_path / "results"
    data = ("--data", work / "test.jsonl", "--checker", f"{__name__}:has_digit", "--max-new-tokens", 20)
    measured = ("--baselines", work / "labels", "--shares", "0.2,0.5")
    arguments = ("evaluate", work / "router", *data, "--out", out, *measured)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    values = json.loads((out / "results.json").read_text())
    assert set(values["methods"]) == BASELINES | {"citer-plus"} and set(values["ends"]) == {"slm", "llm"}
    keys = {"threshold", "veto", "accuracy", "accuracy_ci", "llm_share", "llm_calls", "bytes", "seconds"}
    points = [one for method in values["methods"].values() for one in method]
    assert all(keys <= set(one) for one in points) and values["ends"]["llm"]["llm_share"] == 1
    assert {one["veto"] for one in points if one not in values["methods"]["bild"]} == {0}
    assert {file.name for file in out.iterdir()} == {"results.json", "results.md", "curve.png"}
    assert invoke(*arguments).exit_code == 0


def test_routers_of_other_directories_are_compared(work: Path, tmp_path: Path) -> None:
    other = tmp_path / "co-llm"
    train = ("train", work / "pair", "--labels", work / "labels", "--objective", "co-llm", "--epochs", 1)
    assert invoke(*train, "--out", other).exit_code == 0
    data = ("--data", work / "test.jsonl", "--checker", "math", "--max-new-tokens", 8, "--shares", "0.5")
    out = tmp_path / "results"
    others = ("--compare", other, "--methods", "bild,speculative", "--vetoes", "0,0.3")
    result = invoke("evaluate", work / "router", *data, "--out", out, *others)
    assert result.exit_code == 0, result.output
    results = read_json(out / "results.json")
    names = {"citer-plus", "citer-plus, veto 0.3", "co-llm", "co-llm, veto 0.3", "bild", "speculative"}
    assert set(results["methods"]) == names
    vetoed = [one["veto"] for name in names for one in results["methods"][name] if "0.3" in name or name == "bild"]
    assert set(vetoed) == {0.3}
    # The card of each router shows the points of its own, and none those of other routers.
    for directory, method in ((work / "router", "citer-plus"), (other, "co-llm"), (work / "pair", None)):
        assert method_of(results, file_sha256(directory / "model.safetensors"), "mlp") == method
    told = {"routers_sha256": {"bild": None, "confidence, veto 0.3": None}}
    assert method_of(told, None, "confidence") == "confidence, veto 0.3"


EVALUATE = "evaluate {work}/pair --data {work}/test.jsonl --checker math --out {tmp}/x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("label {work}/pair --data {work}/no.jsonl --checker math --out {tmp}/x", "no.jsonl"),
        ("label {work}/pair --data {work}/test.jsonl --checker math --out {work}", "exists already"),
        ("train {work}/pair --labels {work} --out {tmp}/x", "holds no labels"),
        (f"{EVALUATE} --compare {{work}}/pair", "--compare"),
        (f"{EVALUATE} --methods bild,co-llm", "got bild, co-llm. The others need labels (--baselines)"),
        ("calibrate {work}/pair --data {work}/test.jsonl", "expected exactly one"),
        ("calibrate demo --data {work}/test.jsonl --llm-share 0.2 --write", "calibrate the copy"),
    ],
)
def test_wrong_input_of_the_method_is_one_line_and_changes_nothing(work, tmp_path, arguments, message):
    before = sorted(str(file) for file in work.rglob("*"))
    result = invoke(*arguments.format(work=work, tmp=tmp_path).split())
    assert result.exit_code == 1 and message.format(work=work) in " ".join(result.stderr.split())
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.stderr
    assert sorted(str(file) for file in work.rglob("*")) == before
