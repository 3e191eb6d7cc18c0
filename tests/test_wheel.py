"""A new release of a dependency that breaks `pip install citer-hf` is noticed here first."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_newest_dependencies_that_the_wheel_allows_run_the_demo(tmp_path):
    """Only torch is fixed, to the version that runs this test: any other one is gigabytes on some machines."""
    # Nothing of the environment that runs the tests, nor of this checkout.
    apart = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            env=apart,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, REPOSITORY)
    (wheel,) = tmp_path.glob("citer_hf-*.whl")
    venv.create(tmp_path / "fresh", with_pip=True)
    scripts = tmp_path / "fresh" / ("Scripts" if os.name == "nt" else "bin")
    run(scripts / "python", "-m", "pip", "install", wheel, f"torch=={torch.__version__.split('+')[0]}")
    came = run(scripts / "python", "-m", "pip", "list")
    said = run(scripts / "citer", "demo", "--problems", 4)
    assert "deprecated" not in said, came
    assert "LLM alone" in said, said
