"""Figures: the attention masks of Fig. 3 and 6, loss curves as in Fig. 4, losses of texts as in Fig. 5."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from prefixvlm.modeling_vlm.masking_prefix_vlm import attention_mask_4d, image_index

IMAGE_TOKENS = 4
LOSSES = {"loss": "loss", "loss_noised": "noised targets", "loss_clean": "clean targets", "eval_loss": "held-out data"}
SEEN, UNSEEN, BETWEEN = "#2a9d8f", "#f4e9e1", "#ffffff"


def save_masks(path: Path) -> None:
    """Draws the attention masks with the function that training uses; the suffix of `path` sets the format."""
    from matplotlib.colors import ListedColormap

    single = "i" * IMAGE_TOKENS + "t" * 6
    interleaved = "i" * IMAGE_TOKENS + "ttt" + "i" * IMAGE_TOKENS + "ttt"
    masks = [
        ("causal", "causal: what most models do", single),
        ("bidirectional", "bidirectional: stage 0 (Fig. 3a)", single),
        ("prefix", "prefix: stages 1 to 3 (Fig. 3b)", single),
        ("prefix_all_images", "prefix_all_images: interleaved (Fig. 6a)", interleaved),
        ("prefix", "prefix: interleaved (Fig. 6b)", interleaved),
    ]
    with panels(path, len(masks), 4, 4.6) as axes:
        for axis, (mode, title, layout) in zip(axes, masks, strict=True):
            is_image = torch.tensor([[kind == "i" for kind in layout]])
            mask = attention_mask_4d(torch.ones_like(is_image), image_index(is_image, IMAGE_TOKENS), mode)[0, 0]
            axis.pcolormesh(
                mask.flip(0).int(), cmap=ListedColormap([UNSEEN, SEEN]), vmin=0, vmax=1, edgecolors=BETWEEN, linewidth=1
            )
            labels = ["im" if kind == "i" else "txt" for kind in layout]
            centres = [index + 0.5 for index in range(len(layout))]
            axis.set_xticks(centres, labels, rotation=90, fontsize=8)
            axis.set_yticks(centres, labels[::-1], fontsize=8)
            axis.tick_params(length=0)
            axis.set_aspect("equal")
            axis.set_title(title, fontsize=11)
        axes[0].set_ylabel("this position ...")
        axes[0].figure.supxlabel("... may attend to these (green)")


def save_loss_curve(histories: dict[str, list[dict]], path: Path) -> None:
    """Draws the logged losses of one or more runs; `histories` maps names to `Trainer.state.log_history`."""
    with panels(path, len(histories), 4.5, 3.4) as axes:
        for axis, (name, history) in zip(axes, histories.items(), strict=True):
            for key, label in LOSSES.items():
                points = [(entry["step"], entry[key]) for entry in history if key in entry]
                if points:
                    axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.set_ylabel("cross-entropy")
            axis.grid(alpha=0.3)
            if axis.lines:  # a run shorter than logging_steps has logged no loss
                axis.legend()


def save_text_losses(sets: dict[str, dict], path: Path) -> None:
    """Draws the loss of each set of texts with its interval, per token and per character (see `text_loss.summarise`)."""
    labels = {"loss": "nats per token", "loss_per_character": "nats per character"}
    with panels(path, len(labels), max(3.2, 0.9 * len(sets)), 3.4) as axes:
        for axis, (key, label) in zip(axes, labels.items(), strict=True):
            for place, numbers in enumerate(sets.values()):
                low, high = numbers[f"{key}_interval"]
                axis.plot([place, place], [low, high], color=f"C{place}", linewidth=2)
                axis.plot(place, numbers[key], "o", color=f"C{place}")
            axis.set_xticks(range(len(sets)), list(sets), rotation=30 if len(sets) > 3 else 0)
            axis.set_xlim(-0.5, len(sets) - 0.5)
            axis.set_ylabel(f"cross-entropy, {label}")
            axis.grid(alpha=0.3)


@contextmanager
def panels(path: Path, count: int, width: float, height: float, **subplots) -> Iterator[list]:
    """Yields the axes of `count` panels side by side, each `width` by `height` inches, and then saves the figure."""
    import matplotlib.pyplot as plt

    size = (width * count, height)
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained", **subplots)
    yield list(axes[0])
    save(figure, path)


def save(figure, path: Path) -> None:
    """Writes a figure and closes it; an older file at `path` stays until the new one is complete."""
    import matplotlib.pyplot as plt

    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=110)
    except (ValueError, OSError) as error:
        raise ValueError(f"The figure {path} cannot be written ({error}).") from error
    finally:
        plt.close(figure)
    partial.replace(path)
