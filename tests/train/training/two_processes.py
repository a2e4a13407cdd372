"""Run by `test_sharded.py` and others: training and evaluation, each job in processes of its own.

    two_processes.py JOB.json ...

A job says how many `processes`, with which file of accelerate's (`sharded_by`) their weights are sharded, if at all, and
their `arguments`: three steps of stage 2 with checkpoints (steps OUTPUT DEVICE_BATCH), two steps on ragged samples (ragged
OUTPUT KINDS.json), evaluation by `Trainer` (evaluate OUTPUT), or those of `prefixvlm`. Forks, so that everything is
imported only once.

accelerate shards for accelerators only, although gloo and torch's `fully_shard` serve a CPU as well. So each trainer here
tells it, at the one point where it asks, that this is a run on several GPUs; all else is what happens on those.
"""

import gc
import json
import os
import socket
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - each process would import it for itself
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from ragged import evaluate_ragged, train_ragged
from tiny import random_batch, tiny_model
from transformers import TrainingArguments

from prefixvlm import cli
from prefixvlm.train.recipes.stages import PAPER_STAGES
from prefixvlm.train.training import run
from prefixvlm.train.training.trainer import StageTrainer


class CPUTrainer(StageTrainer):
    def create_accelerator_and_postprocess(self):
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if sharded:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        assert self.is_fsdp_enabled == sharded

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] += self.state.global_step  # the first model is the best, and must come back
        return output


def three_steps(output: str, device_batch: int) -> None:
    model = tiny_model()
    batch = random_batch(model, [3, 9, 4, 7, 2, 8, 6, 5, 3, 4, 9, 2])
    batch["labels"] = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 1), -100)
    rows = [{name: values[i] for name, values in batch.items()} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=device_batch,
        max_steps=3,
        logging_steps=1,
        report_to="none",
        save_steps=2,
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_backend="gloo",
    )
    trainer = CPUTrainer(
        model,
        PAPER_STAGES[2],
        arguments,
        train_dataset=rows,
        data_collator=lambda some: {name: torch.stack([row[name] for row in some]) for name in some[0]},
    )
    trainer.train()
    trainer.save_model(f"{output}/final")
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        with open(f"{output}/history.json", "w") as file:
            json.dump(history, file)


def ragged(output: str, kinds: str) -> None:
    """Writes the log of each kind of training, by its name."""
    logs = {}
    for name, options in json.loads(Path(kinds).read_text()).items():
        try:
            logs[name] = train_ragged(Path(output) / name, trainer_class=CPUTrainer, **options)
        except Exception as error:
            raise RuntimeError(f"{name} failed") from error
    if PartialState().is_main_process:
        Path(output, "logs.json").write_text(json.dumps(logs))


def evaluate(output: str) -> None:
    found = evaluate_ragged(Path(output))
    if PartialState().is_main_process:
        Path(output, "found.json").write_text(json.dumps(found))


def threads_of_gloo() -> list[str]:
    """Threads that could still run while the interpreter shuts down; known on Linux only."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def work(arguments: list[str]) -> None:
    """What one process does, up to its end."""
    code, (command, *rest) = 0, arguments
    if command == "steps":
        three_steps(rest[0], int(rest[1]))
    elif command == "ragged":
        ragged(*rest)
    elif command == "evaluate":
        evaluate(*rest)
    else:
        run.StageTrainer = CPUTrainer
        code = cli.main(arguments)
    cli.leave_process_group()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # torch keeps the mesh of FSDP, and with it gloo's threads, to the end; runs on GPUs have none of those
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    deadline = time.monotonic() + 10  # the system lists a thread for a moment after its end
    while threads_of_gloo() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads_of_gloo()
    sys.exit(code)


def launch(processes: int, sharded_by: str | None, arguments: list[str]) -> None:
    """Starts the processes as torchrun or `accelerate launch` would, and waits for them."""
    environment = {}
    if sharded_by:
        asked = ["--config_file", sharded_by, "--num_processes", str(processes), "two_processes.py"]
        options, *_ = _validate_launch_command(launch_command_parser().parse_args(asked))
        environment = prepare_multi_gpu_env(options)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            work(arguments)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"exit codes {codes} of {' '.join(arguments)}")


gc.freeze()
for path in sys.argv[1:]:
    launch(**json.loads(Path(path).read_text()))
