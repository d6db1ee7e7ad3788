"""Jobs of many images: every image has exactly one row, with broken files and after the process was killed."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from typer.testing import CliRunner

import aptvit
from aptvit.bulk import Embedder, Job, Options, embedder, list_images, run_here
from aptvit.bulk.listing import read_entries
from aptvit.cli import app
from aptvit.storage.writing import digest_file

from .conftest import BROKEN, MODEL, command, options, rows

pa = pytest.importorskip("pyarrow")
dataset = pytest.importorskip("pyarrow.dataset")
parquet = pytest.importorskip("pyarrow.parquet")


def test_each_image_has_one_row(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    job = Job(str(images), options(checkpoint), str(tmp_path), part_size=8)
    run_here(job, threads=3, done=counts.append)
    table_rows = rows(tmp_path)
    assert len(table_rows) == len(job.entries) == 31 + BROKEN == sum(counts)
    assert {row["file"] for row in table_rows} == {entry.name for entry in job.entries}
    broken = [row for row in table_rows if row["error"] is not None]
    assert len(broken) == BROKEN and all(row["feature"] is None and row["tokens"] is None for row in broken)
    reasons = {Path(row["file"]).name[0]: row["error"] for row in broken}
    assert "empty" in reasons["a"] and "more than the" in reasons["g"]
    model = aptvit.adapt(timm.create_model(MODEL, num_classes=10, checkpoint_path=str(checkpoint)), thresholds=(5.0,))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model.adapter.vit))
    for row in table_rows:
        if row["error"] is not None:
            continue
        image = Image.open(row["file"]).convert("RGB")
        assert (row["width"], row["height"]) == image.size
        with torch.inference_mode():
            features = model.eval().forward_features(transform(image)[None])
            expected = model.forward_head(features, pre_logits=True)[0]
        np.testing.assert_allclose(row["feature"], expected.numpy(), rtol=1e-3, atol=1e-4)
        assert (row["tokens"], row["uniform_tokens"]) == (features.layout.seqlens[0] - 1, 100)


def test_predictions_and_maps(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    for output in ("predictions", "map", "pooled"):
        job = Job(str(images / "folder0"), options(checkpoint, output=output), str(tmp_path / output), 4)
        run_here(job)
    guesses, maps, pooled = (rows(tmp_path / output) for output in ("predictions", "map", "pooled"))
    model = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(checkpoint))
    for guess, feature_map, feature in zip(guesses, maps, pooled, strict=True):
        shares = model.get_classifier()(torch.tensor(feature["feature"])).softmax(0)
        assert guess["classes"] == shares.topk(5).indices.tolist()
        np.testing.assert_allclose(guess["shares"], shares.topk(5).values.detach(), atol=1e-4)
        assert feature_map["map_shape"] == [64, 10, 10] and len(feature_map["map"]) == 6400


def in_shards(images: Path, folder: Path) -> Path:
    folder.mkdir()
    files = sorted((images / "folder0").iterdir())
    for number, members in enumerate((files[:8], files[8:])):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for file in members:
                tar.add(file, file.name)
                label = tarfile.TarInfo(f"{file.stem}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(b"3"))
    return folder


def in_tables(images: Path, folder: Path) -> Path:
    folder.mkdir()
    files = sorted((images / "folder0").iterdir())
    contents = [file.read_bytes() for file in files]
    structs = [{"bytes": content, "path": None} for content in contents[:5]]
    parquet.write_table(pa.table({"label": list(range(5)), "image": structs}), folder / "0.parquet")
    parquet.write_table(pa.table({"jpg": contents[5:10]}), folder / "1.parquet", row_group_size=2)
    parquet.write_table(pa.table({"path": [str(file) for file in files[10:]]}), folder / "2.parquet")
    return folder


@pytest.mark.parametrize("kind", ["shards", "tables", "list", "url"])
def test_all_sources_hold_the_same(kind: str, images: Path, checkpoint: Path, tmp_path: Path) -> None:
    files = sorted((images / "folder0").iterdir())
    if kind == "list":
        source = tmp_path / "list.txt"
        source.write_text("\n".join([*map(str, files), ""]))
    elif kind == "url":
        source = Path(f"file://{images / 'folder0'}")
    else:
        source = (in_shards if kind == "shards" else in_tables)(images, tmp_path / "source")
    word = f"file://{images / 'folder0'}" if kind == "url" else str(source)
    entries = list_images(word)
    assert list(read_entries(entries)) == [file.read_bytes() for file in files]
    assert len({entry.name for entry in entries}) == len(files)
    # parts do not end with files
    run_here(Job(word, options(checkpoint), str(tmp_path / "out"), 4))
    run_here(Job(str(images / "folder0"), options(checkpoint), str(tmp_path / "plain"), 4))
    results, plain = rows(tmp_path / "out"), rows(tmp_path / "plain")
    assert [row["feature"] for row in results] == [row["feature"] for row in plain]


def test_files_that_vanish_become_errors(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{images / 'nowhere.jpg'}\n{images / 'folder0' / '00.jpg'}\n")
    run_here(Job(str(tmp_path / "list.txt"), options(checkpoint), str(tmp_path / "out")))
    good, bad = sorted(rows(tmp_path / "out"), key=lambda row: row["error"] or "")
    assert good["feature"] is not None and "nowhere.jpg" in bad["error"]


def test_finished_parts_are_not_computed_again(
    images: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_here(Job(str(images), options(checkpoint), str(whole), 8))
    plain, calls = Embedder.rows, []

    def dies(self: Embedder, images: Any) -> Any:
        calls.append(1)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return plain(self, images)

    monkeypatch.setattr(Embedder, "rows", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_here(Job(str(images), options(checkpoint), str(cut), 8))
    (cut / ".part-000003.parquet.123").write_bytes(b"half of a part")
    run_here(Job(str(images), options(checkpoint), str(cut), 8))
    assert len(calls) == 5 + 2
    assert rows(cut) == rows(whole)
    assert not list(cut.glob(".part*"))
    run_here(Job(str(images), options(checkpoint), str(cut), 8))
    assert len(calls) == 7
    with pytest.raises(ValueError, match=r"rows of another job \(part_size: 8 → 9\)"):
        Job(str(images), options(checkpoint), str(cut), 9)
    with pytest.raises(ValueError, match=r"another job \(output: pooled → map\): give another --out"):
        Job(str(images), options(checkpoint, output="map"), str(cut), 8)
    with pytest.raises(ValueError, match=r"another job \(images: 38 \(\w+\) → \d+ \(\w+\)\)"):
        Job(str(images / "folder0"), options(checkpoint), str(cut), 8)


@pytest.mark.parametrize("kind", ["folder", "checkpoint", "thresholds"])
def test_rows_of_two_models_are_not_mixed(
    kind: str, images: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is saved anew under the same name while the job is interrupted, or while it is loaded."""
    host = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(checkpoint))
    model, weights = aptvit.adapt(host, thresholds=(5.0,)), tmp_path / "weights.safetensors"

    def save(change: float) -> Options:
        with torch.no_grad():
            host.head.bias += change if kind != "thresholds" else 0
        if kind == "checkpoint":
            save_file(host.state_dict(), weights)
            return options(weights)
        model.thresholds = (5.0 + change,) if kind == "thresholds" else (5.0,)
        model.save_pretrained(tmp_path / "saved")
        return Options(str(tmp_path / "saved"))

    begun = Job(str(images / "folder0"), save(0), str(tmp_path / "out"))
    assert Job(str(images / "folder0"), save(0), str(tmp_path / "out")).weights == begun.weights
    later = save(1)
    with pytest.raises(ValueError, match=r"another job \(weights of the model: \w+ → \w+\): give another"):
        Job(str(images / "folder0"), later, str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"was saved anew \(\w+ → \w+\): rows of two models"):
        run_here(pickle.loads(pickle.dumps(begun)))  # as in another process, which loads the model anew
    assert not list((tmp_path / "out").glob("part-*"))
    monkeypatch.setattr(embedder, "digest_file", _digest_while_saved(later))
    with pytest.raises(ValueError, match="was saved anew while it was read: rows of two models"):
        Job(str(images / "folder0"), later, str(tmp_path / "other"))


def _digest_while_saved(options: Options) -> Any:
    """A digest of a file that changes while it is read."""
    path = Path(options.checkpoint or options.model)

    def digest(file: Path) -> str:
        for each in path.iterdir() if path.is_dir() else [path]:
            os.utime(each, ns=(0, time.time_ns()))
        return digest_file(file)

    return digest


def test_a_signal_stops_a_job_between_whole_files(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    """SIGTERM to the group, twice, while a part is computed or written: as service managers and terminals send it."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "aptvit", *command(images, checkpoint, out, "--part-size", 2)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len(list(out.glob("part-*"))) < 2:
        time.sleep(0.005)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    parts = sorted(path.name for path in out.iterdir())
    whole = [f"part-{number:06d}.parquet" for number in range(len(parts) - 2)]
    assert len(whole) >= 2 and parts == [".lock", "_job.json", *whole]
    assert f"stopped after {2 * len(whole)} of 38 images: the same command continues" in errors
    assert "Traceback" not in errors
    run_here(Job(str(images), options(checkpoint, max_tokens=8192), str(out), 2))
    assert len({row["file"] for row in rows(out)}) == len(rows(out)) == 38


def test_killed_at_any_moment(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    """After SIGKILL while parts are written, the rows are those of an uninterrupted job."""
    words = [sys.executable, "-m", "aptvit", *command(images, checkpoint, tmp_path / "cut")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "cut").glob("part-*"))) < 3:
        time.sleep(0.005)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(words, capture_output=True).returncode == 1  # done, and some images are broken
    run_here(Job(str(images), options(checkpoint, max_tokens=8192), str(tmp_path / "whole"), 4))
    results, whole = rows(tmp_path / "cut"), rows(tmp_path / "whole")
    for a, b in zip(results, whole, strict=True):
        feature = a.pop("feature"), b.pop("feature")
        assert a == b
        if feature[0] is not None:
            np.testing.assert_allclose(*feature, rtol=1e-4, atol=1e-5)


def test_the_command(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, command(images, checkpoint, tmp_path / "out", "--json"), catch_exceptions=False)
    counts = json.loads(result.stdout)
    assert (counts["images"], counts["errors"], counts["parts_missing"]) == (31 + BROKEN, BROKEN, 0)
    assert 0 < counts["tokens"] < counts["uniform_tokens"] == 3100
    second = CliRunner().invoke(app, command(images, checkpoint, tmp_path / "out"), catch_exceptions=False)
    assert "all done before" in second.stdout.replace("\n", "")
    run = aptvit.adapt(timm.create_model(MODEL, num_classes=10, checkpoint_path=str(checkpoint)), thresholds=(5.0,))
    run.save_pretrained(tmp_path / "saved")
    saved = [
        "embed",
        str(images),
        "--model",
        str(tmp_path / "saved"),
        "--part-size",
        "4",
        "--out",
        str(tmp_path / "b"),
    ]
    assert CliRunner().invoke(app, saved, catch_exceptions=False).exit_code == result.exit_code == 1  # some are broken
    assert rows(tmp_path / "b") == rows(tmp_path / "out")


def test_bad_input_is_named(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        list_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no images"):
        list_images(str(tmp_path))
    (tmp_path / "0.tar").write_bytes(b"no tar file")
    with pytest.raises(ValueError, match=r"0\.tar is not a tar file"):
        list_images(str(tmp_path))
    parquet.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"none of its columns \(number\)"):
        list_images(str(tmp_path / "numbers.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a Parquet file of images"):
        list_images(str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match="part_size=0"):
        Job(str(images), options(checkpoint), str(tmp_path / "out"), 0)
    with pytest.raises(ValueError, match="--thresholds and --keep: give one"):
        CliRunner().invoke(app, command(images, checkpoint, tmp_path, "--keep", 0.5), catch_exceptions=False)


def test_random_weights_are_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda *_: False)
    with pytest.raises(ValueError, match="no trained weights on this machine: give --checkpoint"):
        run_here(Job(str(images), Options(MODEL), str(tmp_path)))


def test_parts_that_promise_more_than_there_is_are_rows_with_their_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).resize((32, 32)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(buffer.getvalue())
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    entries = [entry for entry in list_images(str(tmp_path)) if entry.name.endswith("a.png")]
    huge = replace(entries[0], size=2**55)
    contents = list(read_entries([huge, *entries]))
    assert isinstance(contents[0], ValueError) and contents[1] == buffer.getvalue()
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": pa.nulls(10_000_000, "binary")}), tmp_path / "b.parquet")
    problems = [entry.problem for entry in list_images(str(tmp_path)) if entry.problem]
    assert len(problems) == 1 and "10,000,000 rows in" in problems[0]


def test_rows_of_a_table_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across row groups, each of which may hold more images than fit into memory."""
    contents = [bytes([number]) * 10 for number in range(250)]
    parquet.write_table(pa.table({"image": contents}), tmp_path / "a.parquet", row_group_size=100)
    entries = list_images(str(tmp_path / "a.parquet"))
    assert list(read_entries(entries)) == contents
    assert list(read_entries(entries[95:205])) == contents[95:205]
    assert list(read_entries(entries[3:250:60])) == contents[3:250:60]
    monkeypatch.setattr("aptvit.bulk.listing.MAX_BYTES", 9)
    first = next(iter(read_entries(entries)))
    assert isinstance(first, ValueError) and "an image of 10 bytes, more than are read" in str(first)
