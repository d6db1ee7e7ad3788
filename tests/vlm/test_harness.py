"""Runs where lmms-eval is installed (pip install 'aptvit[vqa]'): a hundred packages, too many to ask of every test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install 'aptvit[vqa]'")

TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output}
doc_to_visual: !function helpers.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, do_sample: false, until: ["."]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
HELPERS = """
from PIL import Image

def pictures(doc):
    return [Image.open(path).convert("RGB") for path in doc["pictures"]]
"""


@pytest.fixture
def toy(tmp_path: Path, make_llava: Any, make_processor: Any, photos: list) -> Path:
    """A tiny model, and questions about none, one and two photos."""
    model, processor = make_llava(), make_processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for number, photo in enumerate(photos[:3]):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    rows = [
        {"question": "what is this ?", "pictures": ["0.png"]},
        {"question": "one or two ?", "pictures": ["1.png", "2.png"]},
        {"question": "yes or no ?", "pictures": []},
        {"question": "what is in this picture ?", "pictures": ["2.png"]},
    ]
    lines = [
        json.dumps({**row, "answer": "cat", "pictures": [str(tmp_path / one) for one in row["pictures"]]})
        for row in rows
    ]
    (tmp_path / "toy.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "helpers.py").write_text(HELPERS)
    task = TASK.format(data=tmp_path / "toy.jsonl", output="generate_until")
    (tmp_path / "tasks" / "toy.yaml").write_text(task)
    return tmp_path


def evaluate(folder: Path, arguments: str, batch_size: int) -> dict[str, str]:
    """The answer to each question."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "aptvit_llava", "--model_args", arguments]
    command += ["--tasks", "toy", "--include_path", str(folder / "tasks"), "--batch_size", str(batch_size)]
    command += ["--log_samples", "--output_path", str(folder / "out"), "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (samples,) = (folder / "out").rglob("*samples_toy.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    samples.unlink()
    answers = {row["doc_id"]: row["filtered_resps"] for row in rows}
    return {number: one if isinstance(one, str) else one[0] for number, one in answers.items()}


def test_it_answers_as_the_model_does(toy: Path) -> None:
    import aptvit
    from aptvit.vlm.prompts import make_prompt

    separate = evaluate(toy, f"pretrained={toy / 'model'},thresholds=5.0", 1)
    assert len(separate) == 4
    assert evaluate(toy, f"pretrained={toy / 'model'},thresholds=5.0", 3) == separate
    import transformers

    host = transformers.LlavaForConditionalGeneration.from_pretrained(toy / "model")
    own = transformers.AutoProcessor.from_pretrained(toy / "model")
    model, processor = aptvit.vlm.adapt_llava(host, own, thresholds=5.0)
    lines = [json.loads(line) for line in (toy / "toy.jsonl").read_text().splitlines()]
    for number, row in enumerate(lines):
        pictures = [Image.open(path).convert("RGB") for path in row["pictures"]]
        prompt = make_prompt(processor, row["question"], len(pictures))
        inputs = processor(images=pictures or None, text=[prompt], return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert separate[number] == processor.batch_decode(out, skip_special_tokens=True)[0].strip().split(".")[0]
    model.save_pretrained(toy / "adaptive")
    processor.save_pretrained(toy / "adaptive")
    assert evaluate(toy, f"pretrained={toy / 'adaptive'}", 2) == separate


def test_likelihood_of_an_answer(toy: Path) -> None:
    from lmms_eval.api.instance import Instance

    from aptvit.vlm.harness import AptvitLlava

    model = AptvitLlava(str(toy / "model"), thresholds="5.0", device="cpu")
    lines = [json.loads(line) for line in (toy / "toy.jsonl").read_text().splitlines()]
    model.task_dict = {"toy": {"test": lines}}

    def visuals(row: dict) -> list:
        return [Image.open(path) for path in row["pictures"]]

    about = {"task": "toy", "doc_id": 0, "repeats": 1}
    requests = [
        Instance("loglikelihood", (row["question"], answer, visuals, number, "toy", "test"), 0, about)
        for number, row in enumerate(lines)
        for answer in ("cat", "a cat")
    ]
    result = model.loglikelihood(requests)
    assert len(result) == 8 and all(likelihood < 0 for likelihood, _ in result)
    assert all(result[2 * i][0] != result[2 * i + 1][0] for i in range(4))


def test_missing_options_are_named(toy: Path) -> None:
    from aptvit.vlm.harness import AptvitLlava

    with pytest.raises(ValueError, match=r"thresholds=5\.75 or keep=0\.5"):
        AptvitLlava(str(toy / "model"))
