"""Images, questions, references and predictions side by side, as in Tables VIII and IX: an HTML page and a PNG."""

import base64
import html
import io
import textwrap
from pathlib import Path

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.processing.images_prefix_vlm import load_image
from prefixvlm.train.evaluation.figures import save
from prefixvlm.train.evaluation.tasks import Example, spread

THUMBNAIL = 224  # maximum side in pixels
SHOWN_REFERENCES = 3
STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:62rem;color:#222}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.6rem;text-align:left;"
    "vertical-align:top}img{border-radius:4px;margin-right:4px}.p{font-weight:600}"
)


def refuse_without_matplotlib() -> None:
    """Raises an ImportError that says what to install, before the long work starts."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("The gallery needs matplotlib; run: pip install 'prefixvlm[train]'") from error


def save_gallery(examples: list[Example], predictions: list[str], folder: Path, title: str, count: int = 12) -> list[Path]:
    """Writes a self-contained gallery.html and gallery.png of `count` examples, evenly spaced over the test set.

    Returns:
        The files.
    """
    shown = spread(list(zip(examples, predictions, strict=True)), count)
    page, picture = folder / "gallery.html", folder / "gallery.png"
    write_atomically(page, _page(shown, title))
    _draw(shown, title, picture)
    return [page, picture]


def _thumbnails(example: Example) -> list:
    pictures = [load_image(image, example.question.name).convert("RGB") for image in example.question.images]
    for picture in pictures:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return pictures


def _page(shown: list[tuple[Example, str]], title: str) -> str:
    rows = []
    for example, prediction in shown:
        images = ""
        for picture in _thumbnails(example):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            images += f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        references = "<br>".join(html.escape(text) for text in example.references[:SHOWN_REFERENCES])
        question = html.escape(example.question.turns[-1].text) or "(caption)"
        rows.append(
            f"<tr><td>{images}</td><td>{question}</td><td>{references}</td><td class=p>{html.escape(prediction)}</td></tr>"
        )
    head = "<tr><th>image</th><th>question</th><th>reference</th><th>prediction</th></tr>"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<table>\n{head}\n"
        + "\n".join(rows)
        + "\n</table></html>\n"
    )


def _draw(shown: list[tuple[Example, str]], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 4.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (example, prediction) in zip(axes.flat, shown, strict=False):
        axis.imshow(_thumbnails(example)[0])
        asked = [f"Q: {example.question.turns[-1].text}"] if example.question.turns[-1].text else []
        lines = [*asked, f"Reference: {example.references[0]}", f"Prediction: {prediction}"]
        text = "\n".join(line for text in lines for line in textwrap.wrap(text, 40)[:4])
        axis.set_title(text, fontsize=9, loc="left", parse_math=False)  # a $ is a dollar sign
    figure.suptitle(title, parse_math=False)
    save(figure, path)
