"""README's plain `Trainer` script, run as it stands on a tiny model and tiny data."""

import json
import re
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_model, tiny_processor

README = Path(__file__).parent.parent / "README.md"


def block(containing: str) -> str:
    """The one Python block of README that has some text in it."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if containing in code]
    return found


def test_the_trainer_script_fine_tunes_a_saved_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = tmp_path / "runs/quickstart/final"
    tiny_model().save_pretrained(start)
    tiny_processor().save_pretrained(start)
    data = tmp_path / "flaviagiammarino/path-vqa"
    data.mkdir(parents=True)
    Image.effect_noise((16, 16), 80).convert("RGB").save(data / "a.png")
    rows = [{"image": "a.png", "question": f"what {i}?", "answer": f"it is {i}"} for i in range(6)]
    (data / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = block("path-vqa")
    assert len(code.splitlines()) <= 22
    exec(compile(code, "README.md", "exec"), {})
    before, after = (load_file(folder / "model.safetensors") for folder in (start, Path("runs/pathvqa-plain/final")))
    assert before.keys() == after.keys()
    assert any(not after[name].equal(before[name]) for name in before)


def test_the_questions_about_one_picture_are_answered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((16, 16), 80).convert("RGB").save("photo.png")
    exec(compile(block("EncodedImages"), "README.md", "exec"), {"model": tiny_model(), "processor": tiny_processor()})
    assert len(capsys.readouterr().out.splitlines()) >= 2
