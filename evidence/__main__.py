"""`python -m evidence`: runs every study whose data is there, several jobs at a time, and fills in docs/EVIDENCE.md.

A job is one training run and its test, in its own process with one thread. Finished jobs are kept, so that an interrupted
run continues where it stopped.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from evidence import report, studies
from evidence.results import MASKS
from evidence.studies import Workspace
from prefixvlm.inference.environment import versions


def phases(workspace: Workspace, seeds: range) -> list[dict]:
    """The jobs of each phase by name; a job needs only the results of earlier phases."""
    given = workspace.given is not None
    backbones = {"backbones/easy": studies.easy_backbones}
    trainings = {
        f"easy/{mode}/{seed}": partial(studies.easy, mode=mode, seed=seed)
        for seed in seeds
        for mode in ("prefix", "causal")
    }
    trainings["easy/prefix_all_images/0"] = partial(studies.easy, mode="prefix_all_images", seed=0)
    trainings |= _talks("easy", seeds)
    after = {
        f"pairs/{mode}/{seed}": partial(studies.pairs, mode=mode, seed=seed)
        for seed in seeds
        for mode in ("prefix", "causal", "prefix_all_images")
    }
    if given:
        backbones["backbones/ucm"] = studies.ucm_backbones
        backbones |= {f"backbones/text-{kind}": partial(studies.text_decoder, kind=kind) for kind in studies.DECODERS}
        trainings |= {
            f"ucm/{arm}/{seed}": partial(studies.ucm, arm=arm, seed=seed) for seed in seeds for arm in studies.UCM_ARMS
        }
        trainings["ucm/prefix_all_images/0"] = partial(studies.ucm, arm="prefix", seed=0, mode="prefix_all_images")
        after |= {
            f"noise/{trained}/{level}/{seed}": partial(studies.noise, level=level, trained=trained, seed=seed)
            for seed in seeds[: len(studies.NOISE_SEEDS)]
            for trained in ("projector", "everything")
            for level in studies.NOISES
        }
        after |= {
            f"coco/{writer}/{seed}": partial(studies.coco, writer=writer, seed=seed)
            for seed in seeds
            for writer in ("human", "machine")
        }
        after |= {f"texts/{decoder}": partial(studies.texts, decoder=decoder) for decoder in studies.DECODERS}
    if studies.has_radiographs(workspace):
        backbones["backbones/rad"] = studies.rad_backbones
        trainings |= _talks("rad", seeds)
    return [{"data": studies.prepare}, backbones, trainings, after]


def _talks(name: str, seeds: range) -> dict:
    return {
        f"talks/{name}/{mode}/{seed}": partial(studies.talks, name=name, mode=mode, seed=seed)
        for seed in seeds
        for mode in MASKS[f"talks/{name}"]
    }


def _only(all_phases: list[dict], study: str | None) -> list[dict]:
    """The jobs of one study, and what it starts from."""
    if study is None:
        return all_phases
    used = ("data", "backbones/easy", "backbones/rad")
    return [
        {name: job for name, job in phase.items() if name in used or name.startswith(f"{study}/")} for phase in all_phases
    ]


def result_file(workspace: Workspace, name: str) -> Path:
    return workspace.output / "results" / f"{name}.json"


def run_job(workspace: Workspace, seeds: range, name: str) -> None:
    """Runs one job in this process and writes its result."""
    jobs = {known: job for phase in phases(workspace, seeds) for known, job in phase.items()}
    if name not in jobs:
        raise ValueError(f"There is no job {name}; there are {', '.join(jobs)}.")
    started = time.perf_counter()
    result = jobs[name](workspace)
    result["job_seconds"] = round(time.perf_counter() - started, 1)
    file = result_file(workspace, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(json.dumps(result, indent=1))
    partial_file.replace(file)


def start(command: list[str], log_folder: Path, name: str) -> str | None:
    """Runs a job in its own process; returns its name if it failed."""
    log = log_folder / f"{name.replace('/', '-')}.log"
    started = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run([*command, "--job", name], stdout=file, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD)
    print(f"{'failed' if done.returncode else 'done'} {name} in {time.perf_counter() - started:.0f} s", flush=True)
    return name if done.returncode else None


def _command(options: argparse.Namespace) -> str:
    if options.only:
        return " ".join(["python -m evidence", "--only", options.only, *(["--data folder"] if options.data else [])])
    return "make evidence DATA=folder" if options.data else "make evidence"


ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m evidence", description=__doc__.splitlines()[0])
    options.add_argument(
        "--data",
        type=Path,
        help="folder with ucm_captions, coco_photos, human_vs_machine_text and, if it is there, vqa_rad",
    )
    options.add_argument("--output", type=Path, default=Path("runs/evidence"))
    options.add_argument("--workers", type=int, default=2, help="jobs at a time, with one thread each (default: 2)")
    options.add_argument("--seeds", type=int, default=len(studies.SEEDS), help="seeds per arm (default: 5)")
    options.add_argument("--only", choices=["talks"], help="run this study alone, and keep the others' results as they are")
    options.add_argument("--job", help="run only this job, in this process")
    options.add_argument("--report", type=Path, default=report.PAGE, help="page to fill in (default: docs/EVIDENCE.md)")
    options = options.parse_args()
    workspace, seeds = Workspace(options.data, options.output), range(options.seeds)
    if options.data is not None and not (options.data / "ucm_captions").is_dir():
        print(
            f"python -m evidence: {options.data} has no folder ucm_captions; without --data only easy-VQA is used.",
            file=sys.stderr,
        )
        return 2
    if options.seeds < 2 or options.workers < 1:
        print("python -m evidence: intervals need --seeds of at least 2, and --workers at least 1.", file=sys.stderr)
        return 2
    if options.job:
        run_job(workspace, seeds, options.job)
        return 0
    try:
        report.check(options.report)  # before hours of work whose results could not be written
    except ValueError as error:
        print(f"python -m evidence: {error}", file=sys.stderr)
        return 2
    logs = options.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "evidence", "--output", str(options.output), "--seeds", str(options.seeds)]
    command += ["--data", str(options.data)] if options.data else []
    if not options.data:
        print("Without --data only the studies on easy-VQA are run.")
    started = time.perf_counter()
    chosen = _only(phases(workspace, seeds), options.only)
    for phase in chosen:
        waiting = [name for name in phase if not result_file(workspace, name).exists()]
        with ThreadPoolExecutor(options.workers) as pool:
            failed = [name for name in pool.map(partial(start, command, logs), waiting) if name]
        if failed:
            print(f"python -m evidence: {', '.join(failed)} failed; see {logs}.", file=sys.stderr)
            return 1
    elapsed = options.output / "seconds.json"  # with the time before an interruption
    seconds = time.perf_counter() - started + (json.loads(elapsed.read_text()) if elapsed.exists() else 0.0)
    elapsed.write_text(json.dumps(seconds))
    print(f"All jobs done in {seconds / 60:.1f} minutes.")
    results = {name: json.loads(result_file(workspace, name).read_text()) for phase in chosen for name in phase}
    cpu_minutes = round(sum(one["job_seconds"] for one in results.values()) / 60)
    if options.only:
        others = report.kept(options.report)
        results = others | {
            name: one for name, one in results.items() if name.startswith(f"{options.only}/") or name not in others
        }
    results[f"run/{options.only}" if options.only else "run"] = {
        "command": _command(options),
        "minutes": round(seconds / 60),
        "cpu_minutes": cpu_minutes,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
    }
    report.write(results, options.report, has_curves=options.only is None)
    print(f"Saved to {options.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
