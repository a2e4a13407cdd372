"""Every format that is read: which one it is found to be, and the turns that come of a row of its published schema."""

import base64
import gzip
import io
import json
import re
import tarfile

import pytest
from PIL import Image

from prefixvlm.processing.images_prefix_vlm import load_image
from prefixvlm.train.data import sources
from prefixvlm.train.data.conversation import Picture
from prefixvlm.train.data.forms import FORMS
from prefixvlm.train.data.pictures import PictureFinder

A, B = ("picture", "a"), ("picture", "b")
COLORS = {"a": (255, 0, 0), "b": (0, 0, 255)}
TALK = [("user", [A, "What?"]), ("assistant", ["A square."])]
TWO = [("user", [A, "What?"]), ("assistant", ["One."]), ("user", ["And", B, "here?"]), ("assistant", ["Two."])]


def caption(text, picture=A):
    return [("user", [picture, ""]), ("assistant", [text])]


def png(name="a") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), COLORS[name]).save(buffer, "PNG")
    return buffer.getvalue()


URI = "data:image/png;base64," + base64.b64encode(png()).decode()
BASE64 = base64.b64encode(png("a") + bytes(100)).decode()


@pytest.fixture
def folder(tmp_path):
    for name in COLORS:
        (tmp_path / f"{name}.png").write_bytes(png(name))
    return tmp_path


def turns_of(conversation) -> list:
    """(role, parts) of each turn, a picture by its colour."""
    names = {color: ("picture", name) for name, color in COLORS.items()}

    def shown(part):
        return names[load_image(part.source).getpixel((0, 0))] if isinstance(part, Picture) else part

    return [(turn.role, [shown(part) for part in turn.parts]) for turn in conversation.turns]


def read(folder, content, name="data.json", **options):
    """What comes of a file: the name of the format, and the turns of each sample."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    samples = sources.load("auto", path=str(path), **options)
    form = next(name for name, kind in FORMS.items() if type(samples.form) is kind)
    return form, [turns_of(sample) for sample in samples]


def said(*turns, role="role", content="content"):
    return [{role: who, content: what} for who, what in turns]


def image_part(**source):
    return {"type": "image", **source}


CHATS = {
    "llava": {
        "image": "a.png",
        "conversations": said(("human", "<image>\nWhat?"), ("gpt", "A square."), role="from", content="value"),
    },
    "llava, roles by the other names": {
        "image": "a.png",
        "conversations": said(("user", "What?\n<image>"), ("assistant", "A square.")),
    },
    "llava, a text of JSON": {
        "image": "a.png",
        "conversations": json.dumps(said(("user", "<image>What?"), ("assistant", "A square."))),
    },
    "llama-factory, ms-swift": {
        "images": ["a.png"],
        "messages": said(("user", "<image>What?"), ("assistant", "A square.")),
    },
    "xtuner": {"images": ["a.png"], "conversation": said(("user", "What?"), ("assistant", "A square."))},
    "openai": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": "A square."},
        ]
    },
    "parts with their image": {
        "messages": [
            {"role": "user", "content": [image_part(image="a.png"), {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
        ]
    },
    "parts in a table, with the keys of all kinds of parts": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [image_part(text=None), {"type": "text", "text": "What?", "image": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A square.", "image": None}]},
        ],
    },
    "trl": {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": [image_part(), {"type": "text", "text": "What?"}]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "A square."}]}],
    },
    "an image beside a turn's text": {
        "messages": [
            {"role": "user", "content": "What?", "images": ["a.png"]},
            {"role": "assistant", "content": "A square."},
        ]
    },
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("key", [None, "photo"])
def test_chats(folder, row, key):
    if key:  # the row's pictures under a name that nobody knows
        if not {"image", "images"} & row.keys():
            pytest.skip("the images are within the turns")
        row = {(key if name in ("image", "images") else name): value for name, value in row.items()}
        form, (turns,) = read(folder, [row], image=key)
    else:
        form, (turns,) = read(folder, [row])
    assert form in ("llava", "messages")
    # the place of the image is the front wherever it opens or closes the first turn alone
    assert [(role, [part for part in parts if part != ""]) for role, parts in turns] in (
        TALK,
        [("user", ["What?", A]), TALK[1]],
    )


@pytest.mark.parametrize(
    "row",
    [
        {
            "images": ["a.png", "b.png"],
            "messages": said(
                ("user", "<image>What?"), ("assistant", "One."), ("user", "And <image> here?"), ("assistant", "Two.")
            ),
        },
        {
            "images": ["b.png", "a.png"],
            "messages": [
                {"role": "user", "content": [image_part(index=1), {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "One."}]},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "And"}, image_part(index=0), {"type": "text", "text": "here?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": "What?", "image": "a.png"},
                {"role": "assistant", "content": "One."},
                {"role": "user", "content": "And <image> here?", "image": "b.png"},
                {"role": "assistant", "content": "Two."},
            ]
        },
        {
            "query": "And <image> here?",
            "response": "Two.",
            "images": ["a.png", "b.png"],
            "history": [["<image>What?", "One."]],
        },
    ],
    ids=["placeholders", "parts with numbers", "beside the turns", "history"],
)
def test_an_image_stays_in_its_turn(folder, row):
    assert read(folder, [row])[1] == [TWO]


ANSWER = [("user", [A, "Where?"]), ("assistant", ["left"])]
LISTED = "Which?\nA. cat\nB. dog"
CHOSEN = [("user", [A, LISTED]), ("assistant", ["dog"])]
VQA = {
    "one answer": ({"image": "a.png", "question": "Where?", "answer": "left"}, ANSWER),
    "a list of answers": ({"image": "a.png", "question": "Where?", "answers": ["left", "right", "left"]}, ANSWER),
    "vizwiz": (
        {"image": "a.png", "question": "Where?", "answers": [{"answer": "right"}, *[{"answer": "left"}] * 2]},
        ANSWER,
    ),
    "slake": ({"img_name": "a.png", "question": "Where?", "answer": "left", "q_lang": "en"}, ANSWER),
    "vqa-rad": ({"image_name": "a.png", "question": "Where?", "answer": "left", "answer_type": "OPEN"}, ANSWER),
    "alpaca": ({"image": "a.png", "instruction": "Where?", "input": "", "output": "left"}, ANSWER),
    "ms-swift": ({"images": ["a.png"], "query": "<image>Where?", "response": "left"}, ANSWER),
    "a number": ({"image": "a.png", "question": "Where?", "answer": 3}, [ANSWER[0], ("assistant", ["3"])]),
    "a truth value": ({"image": "a.png", "question": "Where?", "answer": True}, [ANSWER[0], ("assistant", ["yes"])]),
    "base64": ({"image": BASE64, "question": "Where?", "answer": "left"}, ANSWER),
    "a data uri": ({"image": URI, "question": "Where?", "answer": "left"}, ANSWER),
    "no ending": ({"image": "a", "question": "Where?", "answer": "left"}, ANSWER),
    "scienceqa": ({"image": "a.png", "question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": ""}, CHOSEN),
    "a-okvqa": (
        {
            "image": "a.png",
            "question": "Which?",
            "choices": ["cat", "dog"],
            "correct_choice_idx": 1,
            "direct_answers": ["x"],
        },
        CHOSEN,
    ),
    "a letter": ({"image": "a.png", "question": "Which?", "options": ["cat", "dog"], "answer": "B"}, CHOSEN),
    "the words": ({"image": "a.png", "question": "Which?", "choices": ["cat", "dog"], "answer": "dog"}, CHOSEN),
    "mmbench": ({"image": "a.png", "question": "Which?", "A": "cat", "B": "dog", "C": None, "answer": "B"}, CHOSEN),
    "words that are numbers": (
        {"image": "a.png", "question": "How many?", "choices": ["1", "2", "3"], "answer": "2"},
        [("user", [A, "How many?\nA. 1\nB. 2\nC. 3"]), ("assistant", ["2"])],
    ),
}


@pytest.mark.parametrize(("row", "expected"), VQA.values(), ids=VQA)
def test_questions(folder, row, expected):
    form, turns = read(folder, [row])
    assert form == ("choices" if "Which?" in str(row) or "choices" in row else "vqa")
    assert turns == [expected]


def test_questions_and_answers_in_two_files(folder):
    (folder / "COCO_val2014_000000000007.jpg").write_bytes(png())
    answers = [{"question_id": 70, "image_id": 7, "answers": [{"answer": "left"}], "multiple_choice_answer": "left"}]
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": answers}))
    questions = {"questions": [{"question_id": 70, "image_id": 7, "question": "Where?"}]}
    assert read(folder, questions, "v2_OpenEnded_mscoco_val2014_questions.json") == ("vqa", [ANSWER])


@pytest.mark.parametrize(
    ("content", "form", "expected"),
    [
        ({"data": [{"image_id": "a", "question": "Where?", "answers": ["left"] * 10}]}, "vqa", ANSWER),  # TextVQA
        ({"02": {"imageId": "a", "question": "Where?", "answer": "left"}}, "vqa", ANSWER),  # GQA
        ({"9": {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "image": "a.png"}}, "choices", CHOSEN),
    ],
    ids=["textvqa", "gqa", "scienceqa"],
)
def test_rows_within_an_object(folder, content, form, expected):
    assert read(folder, content) == (form, [expected])


def test_scienceqa_keeps_its_pictures_in_folders(folder):
    (folder / "train" / "9").mkdir(parents=True)
    (folder / "train" / "9" / "image.png").write_bytes(png())
    row = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "image": "image.png", "split": "train"}
    assert read(folder, {"9": row}) == ("choices", [CHOSEN])


SHARED = [caption("One."), caption("Two.")]
TABLES = {
    "csv": ("data.csv", "image,caption\na.png,One.\na.png,Two.\n", SHARED),
    "a quoted field": ("data.csv", 'image,caption\na.png,"One, ""two""\nlines."\n', [caption('One, "two"\nlines.')]),
    "semicolons": ("data.csv", "image;caption\na.png;One.\na.png;Two.\n", SHARED),
    "a mark of the order of bytes": ("data.csv", "\ufeffimage,caption\na.png,One.\na.png,Two.\n", SHARED),
    "tsv": ("data.tsv", "img_path\tcaption\na.png\tOne.\na.png\tTwo.\n", SHARED),
    "flickr8k": ("Flickr8k.token.txt", "a.png#0\tOne.\na.png#1\tTwo.\n", SHARED),
    "flickr30k": ("results_20130124.token", "a.png#0\tOne.\na.png#1\tTwo.\n", SHARED),
    "flickr30k's results": ("results.csv", "image_name| comment_number| comment\na.png| 0| One.\na.png| 1| Two.\n", SHARED),
    "captions.txt": ("captions.txt", "image,caption\na.png,One.\na.png,Two.\n", SHARED),
    "questions": ("data.csv", "image,question,answer\na.png,Where?,left\n", [ANSWER]),
    "pmc-vqa": (
        "data.csv",
        "Figure_path,Question,Answer,Choice A,Choice B,Answer_label\na.png,Which?,dog, A:cat , B:dog ,B\n",
        [CHOSEN],
    ),
}


@pytest.mark.parametrize(("name", "text", "expected"), TABLES.values(), ids=TABLES)
def test_tables(folder, name, text, expected):
    assert read(folder, text, name)[1] == expected


@pytest.mark.parametrize(
    ("images", "annotations"),
    [
        ([{"id": 7, "file_name": "a.png"}], [{"image_id": 7, "caption": "One."}, {"image_id": 7, "caption": "Two."}]),
        (
            [{"id": 7, "coco_url": "http://x.org/a.png"}],
            [{"image_id": 7, "caption": "One."}, {"image_id": 7, "caption": "Two."}],
        ),
    ],
    ids=["coco", "nocaps"],
)
def test_captions_by_image(folder, images, annotations):
    options = {"images": str(folder)} if "coco_url" in images[0] else {}
    assert read(folder, {"images": images, "annotations": annotations}, **options) == ("captions", SHARED)


def test_pairs(folder):
    row = {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A square.", "source": "x"}]}
    assert read(folder, [row]) == ("pairs", [TALK])


MMC4 = {
    "text_list": ["First.", "Second."],
    "image_info": [
        {"image_name": "b.png", "raw_url": "http://x.org/z.png", "matched_text_index": 1},
        {"raw_url": "http://x.org/pictures/a.png?w=3", "matched_text_index": 0},
    ],
}
OBELICS = {"images": ["http://x.org/a.png", None, "http://x.org/b.png", None], "texts": [None, "First.", None, "Second."]}


@pytest.mark.parametrize("row", [MMC4, OBELICS], ids=["mmc4", "obelics"])
def test_interleaved_documents_find_their_pictures_in_a_folder(folder, row):
    form, turns = read(folder, json.dumps(row) + "\n", "data.jsonl", images=str(folder))
    assert (form, turns) == ("interleaved", [[("assistant", [A, "First.", B, "Second."])]])


ROW_OF_LINES = {"image": "a.png", "question": "Where?", "answer": "left"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.JSON", json.dumps([ROW_OF_LINES] * 2).encode()),
        ("data.jsonl", json.dumps([ROW_OF_LINES] * 2, indent=2).encode()),
        ("data.json", b"\n".join([json.dumps(ROW_OF_LINES).encode()] * 2)),
        ("data.ndjson", b"\r\n".join([json.dumps(ROW_OF_LINES).encode()] * 2)),
        ("data.jsonl.gz", gzip.compress(b"\n".join([json.dumps(ROW_OF_LINES).encode()] * 2))),
        ("data.json.gz", gzip.compress(json.dumps([ROW_OF_LINES] * 2).encode())),
        ("data.csv.gz", gzip.compress(b"image,question,answer\n" + b"a.png,Where?,left\n" * 2)),
    ],
    ids=["capitals", "a list in .jsonl", "lines in .json", "ndjson", "jsonl.gz", "json.gz", "csv.gz"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_files_by_what_they_hold(folder, name, content, streaming):
    (folder / name).write_bytes(content)
    samples = sources.load("auto", path=str(folder / name), streaming=streaming)
    made = [make() for _, make in samples.epoch("0")] if streaming else list(samples)
    assert [turns_of(sample) for sample in made] == [ANSWER] * 2


@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_of_images_with_their_metadata(folder, metadata, is_link, tmp_path_factory):
    pytest.importorskip("datasets")
    rows = [{"file_name": "a.png", "text": "One."}, {"file_name": "b.png", "text": "Two."}]
    lines = map(json.dumps, rows) if metadata.endswith("jsonl") else ["file_name,text", "a.png,One.", "b.png,Two."]
    (folder / metadata).write_text("\n".join(lines) + "\n")
    if is_link:
        link = tmp_path_factory.mktemp("links") / "link"
        link.symlink_to(folder, target_is_directory=True)
        folder = link
    samples = sources.load("auto", path=str(folder))
    assert [turns_of(sample) for sample in samples] == [caption("One."), caption("Two.", B)]


def test_an_address_is_refused_as_it_is_written_or_fetched_where_its_host_is_allowed(folder):
    row = {"image": "https://x.org/a.png", "question": "Where?", "answer": "left"}
    (folder / "data.json").write_text(json.dumps([row]))
    samples = sources.load("auto", path=str(folder / "data.json"))
    with pytest.raises(ValueError, match=r"data.json, row 1: the image https://x.org/a.png is not on this machine"):
        samples[0]
    allowed = sources.load("auto", path=str(folder / "data.json"), hosts=["x.org"])
    assert allowed[0].images == ["https://x.org/a.png"]


def test_pathvqas_own_pickles(folder):
    import pickle

    rows = [{"image": "a", "question": "Where?", "answer": "left"}]
    assert read(folder, pickle.dumps(rows), "train_qa.pkl") == ("vqa", [ANSWER])


def test_a_pickle_with_code_is_refused_and_not_run(folder):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "made"), "w"))

    (folder / "data.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(ValueError, match="no pickled list of plain rows"):
        sources.load("auto", path=str(folder / "data.pkl"))
    assert not (folder / "made").exists()


def test_webdataset_reads_what_its_json_holds(folder):
    pytest.importorskip("datasets")
    files = {
        "0.png": png(),
        "0.json": json.dumps({"image": "elsewhere.png", "question": "Where?", "answer": "left"}).encode(),
    }
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    samples = sources.load("auto", path=str(folder / "shard-0.tar"))
    assert [turns_of(sample) for sample in samples] == [ANSWER]


@pytest.mark.parametrize("names", [("image_1", "image_2"), ("image", "image2"), ("img0", "img1")])
def test_images_under_numbered_keys(folder, names):
    row = {names[1]: "b.png", names[0]: "a.png", "image_3": None, "question": "Where?", "answer": "left"}
    assert read(folder, [row])[1] == [[("user", [A, B, "Where?"]), ("assistant", ["left"])]]


def test_frames_of_a_video_are_images(folder):
    row = {"video": ["a.png", "b.png"], "conversations": said(("user", "<video>\nWhat?"), ("assistant", "A square."))}
    assert read(folder, [row])[1] == [[("user", [A, B, "What?"]), ("assistant", ["A square."])]]


REFUSED = {
    "places for fewer": (
        {"image": ["a.png", "b.png"], "conversations": said(("user", "<image>?"), ("assistant", "x"))},
        "1 <image>, but the row has 2",
    ),
    "places for more": (
        {"image": "a.png", "conversations": said(("user", "<image><image>?"), ("assistant", "x"))},
        "2 <image>, but the row has 1",
    ),
    "a place without images": (
        {"conversations": said(("user", "<image>?"), ("assistant", "x"))},
        "1 <image>, but the row has no image",
    ),
    "a place among parts without images": (
        {"messages": [{"role": "user", "content": [image_part()]}, {"role": "assistant", "content": "x"}]},
        "1 places for images, but the row has no image",
    ),
    "places with one number": (
        {
            "images": ["a.png", "b.png"],
            "messages": [{"role": "user", "content": [image_part(index=0)] * 2}, {"role": "assistant", "content": "x"}],
        },
        "2 places for images, numbered [0, 0], but the row has 2 image(s)",
    ),
    "a question without an image": ({"question": "Where?", "answer": "left"}, "there is no image"),
    "a caption without an image": ({"caption": "One."}, "there is no image"),
    "an image under a name that nobody knows": (
        {"photo": "a.png", "question": "Where?", "answer": "left"},
        "`photo` looks like an image",
    ),
    "of a conversation": (
        {"photo": "a.png", "messages": said(("user", "Where?"), ("assistant", "left"))},
        "`photo` looks like an image",
    ),
    "of a turn": (
        {"messages": [{"role": "user", "content": "?", "photo": "a.png"}, {"role": "assistant", "content": "x"}]},
        "`photo` looks like an image",
    ),
    "an empty name": ({"image": "", "question": "Where?", "answer": "left"}, "`image` is empty"),
    "neither bytes nor path": (
        {"image": {"bytes": None}, "question": "Where?", "answer": "left"},
        "neither bytes nor a path",
    ),
    "a video": ({"video": "v.mp4", "conversations": said(("user", "?"), ("assistant", "x"))}, "names a video"),
    "a video beside an image": (
        {"image": "a.png", "video": "v.mp4", "conversations": said(("user", "?"), ("assistant", "x"))},
        "names a video",
    ),
    "frames beside an image": (
        {"image": "a.png", "video": ["b.png"], "conversations": said(("user", "?"), ("assistant", "x"))},
        "both under `image` and under `video`",
    ),
    "a sound": ({"image": "a.png", "audio": "v.wav", "question": "Where?", "answer": "left"}, "names a sound"),
    "a tool": (
        {"image": "a.png", "tools": "[]x", "conversations": said(("user", "?"), ("assistant", "x"))},
        "tools and preferences",
    ),
    "a role": (
        {"image": "a.png", "conversations": said(("observation", "?"), ("assistant", "x"))},
        "a turn is by 'observation'",
    ),
    "an answer of nothing": ({"image": "a.png", "question": "Where?", "answer": ""}, "`answer` is empty"),
    "no answer of the choices": (
        {"image": "a.png", "question": "Which?", "choices": ["cat", "dog"], "answer": 2},
        "none of the 2 choices",
    ),
    "half a character": ({"image": "a.png", "question": "Where?", "answer": "\ud83d"}, "a broken character"),
    "a path out of the folder": ({"image": "../a.png", "question": "Where?", "answer": "left"}, "lies outside"),
    "an id out of the folder": ({"image_id": "../a", "question": "Where?", "answer": "left"}, "lies outside"),
    "a weight": (
        {
            "image": "a.png",
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x", "weight": 0.5}],
        },
        "`weight` of a turn is 0.5",
    ),
}


@pytest.mark.parametrize(("row", "why"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_cannot_be_used_is_reported(folder, row, why):
    (folder / "data.json").write_text(json.dumps([row]))
    samples = sources.load("auto", path=str(folder / "data.json"))
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        samples[0]
    assert str(caught.value).startswith(f"{folder / 'data.json'}, row 1")


def test_images_without_places_go_to_the_front_if_that_is_set(folder):
    row = {"images": ["a.png", "b.png"], "conversations": said(("user", "See <image>."), ("assistant", "x"))}
    assert read(folder, [row], images_without_place="front")[1] == [[("user", [A, B, "See ."]), ("assistant", ["x"])]]


@pytest.mark.parametrize(
    "row", [{"image": "", "question": "Where?", "answer": "left"}, {"question": "Where?", "answer": "left"}]
)
def test_text_alone_is_used_if_that_is_set(folder, row):
    assert read(folder, [row], allow_text_only=True)[1] == [[("user", ["Where?"]), ("assistant", ["left"])]]


def test_answers_keep_their_letters(folder):
    text = "    indented <image>\n\tline\n"
    row = {"image": "a.png", "conversations": said(("user", "Transcribe."), ("assistant", text))}
    assert read(folder, [row])[1] == [[("user", [A, "Transcribe."]), ("assistant", [text])]]


def test_what_is_not_learnt(folder):
    turns = [
        *said(("user", "1?"), ("assistant", "")),
        *said(("user", "2?")),
        {"role": "assistant", "content": "b", "loss": False},
    ]
    turns += [
        *said(("user", "3?")),
        {"role": "assistant", "content": "c", "weight": 0},
        *said(("user", "4?"), ("assistant", "d")),
    ]
    path = folder / "data.json"
    path.write_text(json.dumps([{"image": "a.png", "system": "Terse.", "conversations": turns}]))
    sample = sources.load("auto", path=str(path))[0]
    assert sample.said[0] == ("system", "Terse.")
    assert [turn.text for turn in sample.turns if turn.is_learnt] == ["d"]


GOOD_ROW = b'{"image":"a.png","question":"Q","answer":"ok"}'
BAD_ROW = b'{"image":"a.png","question":"\xe9","answer":"A"}'
BAD_FILES = {
    "bytes in lines": ("data.jsonl", GOOD_ROW + b"\n" + BAD_ROW + b"\n"),
    "bytes in a list": ("data.json", b"[" + GOOD_ROW + b"," + BAD_ROW + b"]"),
    "bytes in an object": ("data.json", b'{"data":[' + GOOD_ROW + b"," + BAD_ROW + b"]}"),
    "bytes in a table": ("data.csv", b"image,question,answer\na.png,Q,ok\na.png,\xe9,A\n"),
    "bytes in tokens": ("data.token", b"a.png#0\tok\na.png#1\t\xe9\n"),
    "columns": ("data.csv", b"image,question,answer\na.png,Q,ok\na.png,Q\n"),
    "nul in lines": ("data.jsonl", GOOD_ROW + b"\n\0\0\0\n"),
    "nul in a table": ("data.csv", b"image,question,answer\na.png,Q,ok\na\0.png,Q,A\n"),
    "an array among lines": ("data.jsonl", GOOD_ROW + b"\n[1]\n"),
    "another kind of row": ("data.json", b"[" + GOOD_ROW + b",7]"),
}


@pytest.mark.parametrize(("name", "content"), BAD_FILES.values(), ids=BAD_FILES)
def test_one_bad_row_is_one_bad_row(folder, name, content):
    (folder / name).write_bytes(content)
    samples = sources.load("auto", path=str(folder / name))
    assert samples[0].caption == "ok"
    with pytest.raises(ValueError, match=rf"{name}, row 2"):
        load_image(samples[1].images[0])


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("data.jsonl", b"", "has no row"),
        ("data.json", b"", "not valid JSON"),
        ("data.csv", b"", "names no columns"),
        ("data.csv", "image,caption\n".encode("utf-16"), "UTF-16"),
        ("data.jsonl.gz", b"nothing packed", "cannot be unpacked"),
        ("data.json", b'{"annotations": [{"question_id": 1, "answers": []}]}', "give the file of questions"),
        ("data.json", b'{"images": [{"id": 1}], "annotations": [{"bbox": [1]}]}', "annotations without captions"),
        ("data.json", b'[{"score": 1}]', "no known format is found"),
        ("data.xyz", b"", "of no kind that is read"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(folder, name, content, why):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=why) as caught:
        sources.load("auto", path=str(folder / name))
    assert name in str(caught.value)


ODD = [None, 0, 1.5, True, "", "<image>", "[1", "data:", "http://[", [], {}, [None], [[]], [{}], [1], {"bytes": None}]
ODD += [[{"type": "image"}], [{"type": "text"}], [{"role": []}], [{"role": "user"}]]
CAPTIONED = {"filename": "a.png", "sentences": [{"raw": "One."}]}
DOCUMENTS = [{"images": ["a.png"], "texts": [{"user": "What?", "assistant": "x"}]}, MMC4, OBELICS, CAPTIONED]
ALL_ROWS = [*CHATS.values(), *(row for row, _ in VQA.values()), *DOCUMENTS]


def with_odd_values(value):
    """A value with each of `ODD` in place of each of its parts, and without each of its keys."""
    yield from ODD
    if isinstance(value, dict):
        for key in value:
            yield {name: inner for name, inner in value.items() if name != key}
            yield from ({**value, key: odd} for odd in with_odd_values(value[key]))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([*value[:place], odd, *value[place + 1 :]] for odd in with_odd_values(inner))


@pytest.mark.parametrize("name", FORMS)
def test_whatever_a_row_has_it_is_a_sample_or_a_sentence(tmp_path, name):
    form = FORMS[name](PictureFinder(tmp_path))
    reasons = []
    for row in ALL_ROWS:
        for odd in filter(lambda value: isinstance(value, dict), with_odd_values(row)):
            form.is_of(odd)
            try:
                for part in range(form.count(lambda odd=odd: odd)):
                    form.sample(lambda odd=odd: odd, part, "row 1").messages()
            except ValueError as error:
                reasons.append(str(error))
    assert len(reasons) > 100
    assert all(reason.startswith("row 1") for reason in reasons)
