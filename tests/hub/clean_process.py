"""Run as a program: uses saved folders where transformers, torch and pillow are installed but not this package.

    python clean_process.py JOB.json RESULT.pt

A job names the modules to block, an image, the folders to measure, and what else to do; the result holds what
`measure` says of each folder. This file imports nothing of the package, so that tests also use `measure` for reference.
"""

import json
import os
import runpy
import shutil
import sys

QUESTIONS = ("Is it red?", "Why, and what is é? <|image_pad|>")


def conversations(image: str) -> list:
    return [
        [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": question}]}]
        for question in QUESTIONS
    ]


def measure(model, processor, image: str) -> dict:
    """All that a user sees of a model: ids, pixels, logits and answers for two questions of different length."""
    import torch

    inputs = processor.apply_chat_template(
        conversations(image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {**inputs, "logits": logits, "generated": generated, "answers": answers}


def main(job: dict) -> dict:
    for name in job["blocked"]:
        sys.modules[name] = None  # importing it fails as if it were not installed
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    transformers.logging.set_verbosity_error()
    image, result = job["image"], {}
    load = {"trust_remote_code": True, "dtype": torch.float32}
    for name, folder in job["folders"].items():
        model = AutoModelForImageTextToText.from_pretrained(folder, **load).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        result[name] = measure(model, processor, image)
        for part in (model, model.config, processor):
            assert type(part).__module__.startswith("transformers_modules."), type(part).__module__
    if folder := job.get("repository"):
        # as if it had been downloaded from the Hub
        cache = os.path.join(os.environ["HF_HOME"], "hub", "models--someone--vlm-0.5b")
        shutil.copytree(folder, os.path.join(cache, "snapshots", "1" * 40))
        os.mkdir(os.path.join(cache, "refs"))
        with open(os.path.join(cache, "refs", "main"), "w") as file:
            file.write("1" * 40)
        model = AutoModelForImageTextToText.from_pretrained("someone/vlm-0.5b", **load).eval()
        processor = AutoProcessor.from_pretrained("someone/vlm-0.5b", trust_remote_code=True)
        result["repository"] = measure(model, processor, image)
    if folder := job.get("every_auto_class"):
        # 5.x has no AutoModelForVision2Seq
        with open(f"{folder}/config.json", encoding="utf-8") as file:
            names = [name for name in json.load(file)["auto_map"] if hasattr(transformers, name)]
        result["loaded"] = {}
        for name in names:
            loaded = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
            result["loaded"][name] = type(loaded).__name__
    if folder := job.get("pipeline"):
        pipe = transformers.pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype=torch.float32)
        texts = pipe(text=conversations(image), max_new_tokens=8, do_sample=False, return_full_text=False)
        result["pipeline"] = [text[0]["generated_text"] for text in texts]
    if job.get("adapter"):
        from peft import PeftModel

        base = AutoModelForImageTextToText.from_pretrained(job["adapter"]["base"], **load)
        model = PeftModel.from_pretrained(base, job["adapter"]["folder"]).eval()
        processor = AutoProcessor.from_pretrained(job["adapter"]["base"], trust_remote_code=True)
        result["adapter"] = measure(model, processor, image)
    if job.get("resave"):
        model = AutoModelForImageTextToText.from_pretrained(job["resave"]["from"], **load)
        processor = AutoProcessor.from_pretrained(job["resave"]["from"], trust_remote_code=True)
        model.save_pretrained(job["resave"]["to"])
        processor.save_pretrained(job["resave"]["to"])
    if folder := job.get("card"):
        # the code of the model card, pasted in its folder
        os.chdir(folder)
        with open("README.md", encoding="utf-8") as file:
            code = file.read().split("```python\n")[1].split("```")[0]
        names = {}
        exec(code, names)
        result["card"] = names["output"]
    if job.get("save"):
        # the other way round: this version of transformers saves, with the package
        del sys.modules["prefixvlm"]
        tiny = runpy.run_path(job["save"]["tiny"])
        model, processor = tiny["tiny_model"](), tiny["tiny_processor"]()
        model.save_pretrained(job["save"]["folder"])
        processor.save_pretrained(job["save"]["folder"])
        result["saved"] = measure(model, processor, image)
    if job.get("save_joined"):
        sys.modules.pop("prefixvlm", None)
        sys.path.insert(0, job["save_joined"]["helpers"])
        from joined import save_joined

        result["joined"] = save_joined(job["save_joined"]["folder"], measure, image)
    result["version"] = transformers.__version__
    return result


if __name__ == "__main__":
    job_path, result_path = map(os.path.abspath, sys.argv[1:])
    with open(job_path, encoding="utf-8") as job_file:
        outcome = main(json.load(job_file))
    import torch

    torch.save(outcome, result_path)
