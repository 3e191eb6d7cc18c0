"""Imports: what the package brings along and registers, and which part may import which (arrows go down only)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import citer_hf

PACKAGE = Path(citer_hf.__file__).parent
BASE = {"", "runs", "costs", "model"}
# What each part may import beside itself; "" is the package's own `__init__`.
ALLOWED = {
    "runs": {"", "model"},
    "options": set(),
    "terminal": set(),
    "costs": {"model"},
    "model": set(),
    "data": {"runs", "model"},
    "evaluation": {*BASE, "data", "terminal"},
    "training": {*BASE, "data", "evaluation"},
    "importers": BASE,
    "hub": BASE,
    "serving": BASE | {"data"},
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
print(*sorted({name.split('.')[0] for name in sys.modules} - before))
config = AutoConfig.for_model("citer")
print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["citer_hf", "CiterConfig", "CiterForCausalLM"]


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("model/*.py")), ids=lambda file: file.stem)
def test_the_core_imports_only_torch_transformers_and_itself(file):
    allowed = {"torch", "transformers", "accelerate", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and (PACKAGE / "model" / f"{node.module}.py").is_file()
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {str(name).split(".")[0] for name in names} <= allowed
