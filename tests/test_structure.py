"""What the package brings along, registers and needs; which part may import which (arrows go down only)."""

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import citer_hf

PACKAGE = Path(citer_hf.__file__).parent
BASE = {"", "runs", "costs", "model"}
# What each part may import beside itself; "" is the package's own `__init__`.
ALLOWED = {
    "runs": {"", "model"},
    "options": set(),
    "terminal": set(),
    "costs": {"model"},
    "pairs": {"", "runs", "options", "model", "scale", "demo"},
    "model": set(),
    "data": {"runs", "model"},
    "evaluation": {*BASE, "data", "terminal", "scale", "bench"},
    "training": {*BASE, "data", "evaluation", "scale"},
    "importers": BASE,
    "hub": BASE,
    "serving": BASE | {"data"},
    # Replicas are servers; evaluation and labelling give units of work to actors.
    "scale": BASE | {"data", "serving"},
    "playground": {"", "runs", "model", "data"},
    "chat": BASE | {"data", "terminal"},
    "demo": BASE | {"data", "evaluation", "terminal"},
    "bench": BASE | {"data", "terminal"},
}


def imported_parts(file: Path) -> set[str]:
    """The parts of the package that a file imports, at whatever place in it."""
    inside = ("citer_hf", *file.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            module = ".".join([*inside[: len(inside) - node.level], node.module or ""]) if node.level else node.module
            # `from . import name` may import a module of that name.
            names = [f"{module}.{alias.name}".replace("..", ".") for alias in node.names]
        for parts in (name.split(".") for name in names):
            if parts[0] == "citer_hf":
                found.add(parts[1] if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file() else "")
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_is_below_it(part: str):
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else list((PACKAGE / part).rglob("*.py"))
    assert files
    for file in files:
        assert imported_parts(file) <= ALLOWED[part] | {part}, file


def test_every_part_has_its_place():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"__init__", "cli"} == set(ALLOWED)


def test_every_public_name_is_there():
    for name in citer_hf.__all__:
        assert getattr(citer_hf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        citer_hf.nothing  # noqa: B018


def test_importing_loads_nothing_beyond_torch_and_transformers_and_registers_the_auto_classes():
    code = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
before = {name.split('.')[0] for name in sys.modules}
import citer_hf
config = AutoConfig.for_model("citer")
print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)
citer_hf.CiterForCausalLM
print(*sorted({name.split('.')[0] for name in sys.modules} - before))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["CiterConfig", "CiterForCausalLM", "citer_hf"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_newest_dependencies_that_the_wheel_allows_run_the_demo(tmp_path):
    """Only torch is fixed, to the version that runs this test: any other one is gigabytes on some machines."""
    # Nothing of the environment that runs the tests, nor of this checkout.
    apart = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=apart, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, PACKAGE.parent)
    (wheel,) = tmp_path.glob("citer_hf-*.whl")
    venv.create(tmp_path / "fresh", with_pip=True)
    scripts = tmp_path / "fresh" / ("Scripts" if os.name == "nt" else "bin")
    run(scripts / "python", "-m", "pip", "install", wheel, f"torch=={torch.__version__.split('+')[0]}")
    came = run(scripts / "python", "-m", "pip", "list")
    said = run(scripts / "citer", "demo", "--problems", 4)
    assert "deprecated" not in said, came
    assert "LLM alone" in said, said
