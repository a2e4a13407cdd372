"""How soon the command line answers: processes started anew, with the time of an empty Python taken away."""

import subprocess
import sys

import torch

from benchmarks.common import REPEATS, Setup, alternate, emit, summary

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import prefixvlm": [sys.executable, "-c", "import prefixvlm"],
    "prefixvlm --help": [sys.executable, "-m", "prefixvlm", "--help"],
}
ASK_FOR_TORCH = "import sys, prefixvlm.cli; prefixvlm.cli.parser().format_help(); print('torch' in sys.modules)"


def run(setup: Setup) -> list[dict]:
    calls = {
        name: lambda command=command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name, command in COMMANDS.items()
    }
    seconds = alternate(calls, torch.device("cpu"), 2 * REPEATS)
    imports = subprocess.run([sys.executable, "-c", ASK_FOR_TORCH], check=True, capture_output=True, text=True)
    return [
        emit(
            "start of the command line",
            **{name: summary(values) for name, values in seconds.items()},
            imports_torch=imports.stdout.strip() == "True",
        )
    ]
