"""Commands of `citer` in several processes, as users start them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
ONE = [sys.executable]
ACCELERATE = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", *ACCELERATE, "--main_process_port", "0"]
TWO = [*ACCELERATE, "--num_processes", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(launcher: list[str], *arguments: Any) -> subprocess.Popen[str]:
    """Start a module or a script; what it says is one text."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [*launcher, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(launcher: list[str], *arguments: Any) -> str:
    """Run a module or a script to its end, and return what it said."""
    process = start(launcher, *arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said
