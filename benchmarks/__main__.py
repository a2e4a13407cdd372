"""`python -m benchmarks`: measures, prints a line of JSON a result and a table at the end, and keeps the lines."""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import (
    common,
    cost,
    decoding,
    first_token,
    images,
    imports,
    input_pipeline,
    questions,
    report,
    training_step,
)
from benchmarks.common import Setup

# the share of the time that each may take; what has none takes what it takes
SHARES = {
    "imports": (imports, None),
    "first_token": (first_token, 0.1),
    "decoding": (decoding, None),
    "training_step": (training_step, 0.27),
    "input_pipeline": (input_pipeline, None),
    "questions": (questions, 0.05),
    "cost": (cost, 0.1),
    "images": (images, 0.07),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(SHARES)}")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="default: bfloat16, but where the device has no arithmetic for it only for decoding, else float32",
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="about; models lose layers to keep to it (default: 15)")
    parser.add_argument("--full", action="store_true", help="all layers, however long it takes")
    parser.add_argument("--captions", type=Path, default=training_step.BUILT_IN, help="a .txt, or .jsonl with `texts`")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks.jsonl"), help="default: runs/benchmarks.jsonl")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(SHARES)
    if unknown := set(names) - set(SHARES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; choose of {', '.join(SHARES)}")
    if not options.captions.is_file():
        parser.error(f"there is no file {options.captions}")
    device = torch.device(options.device)
    on_gpu = options.device.startswith("cuda")
    results = []
    for name in names:
        module, share = SHARES[name]
        seconds = None if options.full or on_gpu or share is None else 60 * options.minutes * share
        setup = Setup(device, _dtype(name, options.dtype, device), seconds)
        results += module.run(setup, **_further(name, options.captions, results))
        common.free()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    results = [{**result, "command": command} for result in results]
    options.output.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    print(report.table(results))
    print(f"Saved to {options.output}")


def _dtype(name: str, asked_for: str | None, device: torch.device) -> torch.dtype:
    if asked_for:
        return getattr(torch, asked_for)
    return torch.bfloat16 if name == "decoding" else common.fast_dtype(device)


def _further(name: str, captions: Path, results: list[dict]) -> dict:
    if name == "training_step":
        return {"captions": captions}
    if name == "input_pipeline":
        steps = [result for result in results if "samples_per_second" in result]
        return {"captions": captions, "consumed": {step["measurement"]: step["samples_per_second"] for step in steps}}
    return {}


if __name__ == "__main__":
    main()
