"""The gallery: a page that needs no other file, and a picture, of examples spread over the test set."""

import base64
import html
import io
import re
import sys
import warnings

import pytest
from PIL import Image

from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.evaluation.gallery import refuse_without_matplotlib, save_gallery
from prefixvlm.train.evaluation.tasks import Example


def example(index=0, question="what?", references=("that",), size=(40, 30), images=1):
    pictures = [Image.new("RGB", size, (index, 0, 0))] * images
    return Example(Conversation.about(pictures, [("user", question)], f"row {index}"), list(references))


@pytest.fixture
def page(tmp_path):
    """The page of some examples."""

    def page(examples, predictions, title="a model", **options):
        page, picture = save_gallery(examples, predictions, tmp_path, title, **options)
        assert Image.open(picture).width > 100
        return page.read_text(encoding="utf-8")

    return page


def thumbnails(text):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def test_examples_are_spread_over_the_set(page):
    text = page([example(index) for index in range(10)], [f"said {index}" for index in range(10)], count=5)
    assert re.findall(r"said \d", text) == [f"said {index}" for index in (0, 2, 4, 6, 8)]
    assert [picture.getpixel((0, 0))[0] for picture in thumbnails(text)] == [0, 2, 4, 6, 8]


def test_a_row_shows_all_images_small_and_three_references(page):
    text = page([example(references="abcde", size=(1000, 500), images=2)], ["said"])
    assert [picture.size for picture in thumbnails(text)] == [(224, 112)] * 2
    assert "<td>a<br>b<br>c</td>" in text


def test_a_caption_is_said_to_be_one(page):
    assert "(caption)" in page([example(question="")], ["said"])


def test_what_a_model_says_is_text_and_no_code(page):
    text = page([example(question="<b>&", references=["<i>"])], ["<script>alert(1)</script>"], title="<u>")
    assert not re.search("<(b|i|u|script)>", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


@pytest.mark.parametrize("said", ["", "$x_{$", "\\$", "a\nb", "w" * 500, "{%s}"])
def test_any_prediction_can_be_drawn(said, page):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        text = page([example(references=[said or "that"])], [said], title="$x_{$")
    assert f"<td class=p>{html.escape(said)}</td>" in text


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'prefixvlm\[train\]'"):
        refuse_without_matplotlib()
