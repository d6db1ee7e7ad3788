from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import aptvit
from aptvit.cli import app, main
from aptvit.vlm.prompts import make_prompt

run = CliRunner()


@pytest.fixture
def folder(tmp_path: Path, make_llava: Any, make_processor: Any, photos: list) -> Path:
    make_llava().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    Image.fromarray(photos[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    return tmp_path


def ask(folder: Path, *options: str) -> dict[str, Any]:
    command = ["vqa", str(folder / "photo.png"), "what is this ?", "--llava", str(folder / "model")]
    done = run.invoke(app, [*command, "--out", str(folder / "out"), "--max-new-tokens", "4", "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_answer_is_the_model_s(folder: Path) -> None:
    import transformers

    result = ask(folder, "--keep", "0.5", "--uniform")
    assert (result["visual_tokens"], result["visual_tokens_uniform"]) == (31, 64)
    host = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model")
    own = transformers.AutoProcessor.from_pretrained(folder / "model")
    photo = Image.open(folder / "photo.png")
    for name, model, processor in (
        ("uniform_answer", host, own),
        ("answer", *aptvit.vlm.adapt_llava(host, own, keep=0.5)),
    ):
        inputs = processor(images=photo, text=[make_prompt(processor, "what is this ?")], return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert result[name] == processor.batch_decode(out, skip_special_tokens=True)[0].strip()
    drawn = Image.open(result["drawing"])
    assert drawn.size == (768, 768)
    pixels = np.asarray(drawn.resize((64, 64), Image.Resampling.BOX)).astype(float)
    received = own(images=photo, text=["<image>"], return_tensors="pt")["pixel_values"][0]
    mean, std = (np.array(values) for values in (own.image_processor.image_mean, own.image_processor.image_std))
    expected = (received.permute(1, 2, 0).numpy() * std + mean) * 255
    assert np.corrcoef(pixels.mean(-1).flatten(), expected.mean(-1).flatten())[0, 1] > 0.9


def test_adaptive_folders_keep_their_thresholds(folder: Path) -> None:
    import transformers

    host = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model")
    own = transformers.AutoProcessor.from_pretrained(folder / "model")
    model, processor = aptvit.vlm.adapt_llava(host, own, thresholds=1e9)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    assert ask(folder)["visual_tokens"] == 16
    assert ask(folder, "--keep", "0.9")["visual_tokens"] == 58
    assert ask(folder, "--thresholds", "-1")["visual_tokens"] == 64


def test_people_read_two_lines(folder: Path) -> None:
    command = ["vqa", str(folder / "photo.png"), "what ?", "--llava", str(folder / "model")]
    done = run.invoke(app, [*command, "--out", str(folder / "out"), "--thresholds", "1e9", "--max-new-tokens", "2"])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == f"{folder / 'out' / 'photo.png'}  16 of 64 visual tokens (25%)"


def test_bad_input_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    photo, model = str(folder / "photo.png"), str(folder / "model")
    (folder / "broken.png").write_bytes(b"not a picture")
    cases = {
        "give one, each sets": [photo, "?", "--llava", model, "--keep", "0.5", "--thresholds", "5"],
        "does not exist": [str(folder / "none.png"), "?", "--llava", model],
        "cannot load": [photo, "?", "--llava", str(folder / "nothing")],
        "broken.png": [str(folder / "broken.png"), "?", "--llava", model],
        "keep=1.5": [photo, "?", "--llava", model, "--keep", "1.5"],
    }
    for message, arguments in cases.items():
        monkeypatch.setattr("sys.argv", ["aptvit", "vqa", *arguments, "--out", str(folder / "out")])
        with pytest.raises(SystemExit) as stopped:
            main()
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2
        assert message in error.splitlines()[-1] and error.splitlines()[-1].startswith("aptvit: ")


def test_prompts(make_processor: Any) -> None:
    plain = make_processor()
    assert make_prompt(plain, "why ?").endswith("USER: <image>\nwhy ? ASSISTANT:")
    assert make_prompt(plain, "this <image> or <image> ?", 2).count("<image>") == 2
    assert make_prompt(plain, "why ?", 0).endswith("USER: why ? ASSISTANT:")
    template = (
        "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    own = make_processor(chat_template=template)
    assert make_prompt(own, "why ?", 2) == "user:<image> <image> why ? assistant:"
