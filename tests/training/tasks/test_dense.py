"""Detectors and segmenters trained on synthetic shapes, from the command line to the drawings of the results."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.ops import box_iou
from typer.testing import CliRunner

from aptvit.cli import app
from aptvit.dense import find_boxes, find_masks
from aptvit.dense.inference import predict_image
from aptvit.dense.saved import from_pretrained
from aptvit.evaluation.training_run import evaluate_dense
from aptvit.hosts.pretrained import load_host
from aptvit.training import DetectionRecipe, SegmentationRecipe
from aptvit.training.data import Batch, make_loader
from aptvit.training.log import read_log
from aptvit.training.run_folder import read_origin, read_recipe, sources_of
from aptvit.training.tasks.datasets import BoxDataset, MaskDataset
from aptvit.training.tasks.detection import DetectionLearner, score_detector
from aptvit.training.tasks.segmentation import SegmentationLearner, score_segmenter
from aptvit.training.trainer import Training

MODEL = "test_vit"
COMMON = {"precision": "float32", "workers": 0, "batch_size": 4, "eval_every": 0, "size": 128, "lr": 1e-3, "clip": 1.0}
COMMON |= {"layer_decay": 1.0, "drop_path": 0.0, "weight_decay": 0.05}
PIXELS = {**COMMON, "objective": "pixels", "jitter": (0.8, 1.2), "distort": 0.0, "channels": 16, "epochs": 8}
BOXES = {**COMMON, "objective": "boxes", "jitter": (0.8, 1.2), "channels": 16, "epochs": 8, "flip": 0.0}
BOXES |= {"warmup": 0.1, "batch_size": 2}


def recipe_of(values: dict[str, Any]) -> DetectionRecipe | SegmentationRecipe:
    """Return a recipe of the task of the objective."""
    kind: Any = DetectionRecipe if values["objective"] == "boxes" else SegmentationRecipe
    return kind(**values)


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.masks(tmp_path_factory.mktemp("streets"), 24, 6)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.boxes(tmp_path_factory.mktemp("cells"), 24, 6)


def aptvit(*words: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def as_options(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        value = list(value) if isinstance(value, tuple) else value
        words += ["--set", f"{name}={json.dumps(value)}"]
    return words


@pytest.fixture(scope="module")
def segmenters(streets: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A uniform segmenter, and an adaptive one that starts from it."""
    root = tmp_path_factory.mktemp("segmenters")
    command = ["train-segmenter", streets, "--model", MODEL, "--checkpoint", checkpoint, "--json", *as_options(PIXELS)]
    uniform = json.loads(aptvit(*command, "--out", root / "uniform"))
    short = ["--start", root / "uniform", "--keep", 0.6, "--recipe", "segmenter-short", "--set", "epochs=2"]
    short += ["--set", "lr=1e-4", "--set", "scales=2"]
    adaptive = json.loads(aptvit(*command, *short, "--out", root / "adaptive"))
    return {"root": root, "uniform": uniform, "adaptive": adaptive}


@pytest.fixture(scope="module")
def detectors(cells: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("detectors")
    command = ["train-detector", cells, "--model", MODEL, "--checkpoint", checkpoint, "--json", *as_options(BOXES)]
    uniform = json.loads(aptvit(*command, "--out", root / "uniform"))
    short = ["--start", root / "uniform", "--keep", 0.6, "--recipe", "detector-short", "--set", "epochs=4"]
    short += ["--set", "lr=1e-3", "--set", "scales=2"]
    adaptive = json.loads(aptvit(*command, *short, "--out", root / "adaptive"))
    return {"root": root, "uniform": uniform, "adaptive": adaptive}


def test_a_segmenter_learns_and_becomes_adaptive(segmenters: dict[str, Any]) -> None:
    before, after = segmenters["uniform"]["evaluations"]
    assert before["miou"] < 0.4 and after["miou"] > 0.8 and after["kept"] == 1.0
    start, end = segmenters["adaptive"]["evaluations"]
    assert end["miou"] > 0.75 and end["kept_content"] == pytest.approx(0.6, abs=0.1)
    assert start["miou"] > before["miou"]  # it starts from the uniform segmenter
    assert (segmenters["root"] / "adaptive" / "index.html").is_file()


def test_a_detector_learns_and_becomes_adaptive(detectors: dict[str, Any]) -> None:
    before, after = detectors["uniform"]["evaluations"]
    assert before["map_50"] < 0.2 and after["map_50"] > 0.7 and after["kept_content"] == 1.0
    _, end = detectors["adaptive"]["evaluations"]
    assert end["map_50"] > 0.5 and end["kept_content"] == pytest.approx(0.6, abs=0.1)
    assert detectors["adaptive"]["speedup"]["median"] > 0


@pytest.mark.parametrize("name, score, scorer", [("segmenter", "miou", "entropy"), ("detector", "map_50", "spread")])
def test_maps_are_learned_without_labels(
    name: str, score: str, scorer: str, request: Any, checkpoint: Path, tmp_path: Path
) -> None:
    uniform = request.getfixturevalue(f"{name}s")["root"] / "uniform"
    data = request.getfixturevalue("streets" if name == "segmenter" else "cells")
    values = {"precision": "float32", "workers": 0, "scales": 2, "channels": 16, "size": 128}
    values |= {"batch_size": 4, "epochs": 3, "lr": 3e-4, "jitter": [0.8, 1.2], "eval_every": 0}
    values |= {"slide": False} if name == "segmenter" else {}
    command = [f"train-{name}", data, "--model", MODEL, "--checkpoint", checkpoint]
    command += ["--keep", 0.6, *as_options(values), "--set", f"scorer={scorer}", "--out", tmp_path, "--json"]
    with pytest.raises(ValueError, match="name it with --start"):
        aptvit(*command, "--recipe", f"{name}-heal")
    before, after = json.loads(aptvit(*command, "--recipe", f"{name}-heal", "--start", uniform))["evaluations"]
    assert after["kept"] < 0.8 and after[score] > before[score] - 0.05
    losses = [line["loss"] for line in read_log(tmp_path) if line["what"] == "train"]
    assert losses[-1] < losses[0]
    initial, trained = (load_file(folder / "model" / "model.safetensors") for folder in (uniform, tmp_path))
    new = {key for key in trained if any(part in key for part in ("cell_detail.", "coarse_embed.", "coarse_glance."))}
    assert all(torch.equal(trained[key], initial[key]) for key in trained.keys() - new)
    assert any(trained[key].any() for key in new if ".out." in key) and trained.keys() - new == initial.keys()
    assert from_pretrained(tmp_path).model.patchifier.scorer_name == scorer


@pytest.mark.parametrize("name", ["segmenter", "detector"])
@pytest.mark.parametrize(
    "scorer", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("spread", "harm")), "preview"]
)
def test_only_the_scorer_is_trained(name: str, scorer: str, request: Any, checkpoint: Path, tmp_path: Path) -> None:
    uniform = request.getfixturevalue(f"{name}s")["root"] / "uniform"
    data = request.getfixturevalue("streets" if name == "segmenter" else "cells")
    values = {"precision": "float32", "workers": 0, "scales": 2, "channels": 16, "size": 128}
    values |= {"slide": False} if name == "segmenter" else {}
    command = [f"train-{name}", data, "--model", MODEL, "--checkpoint", checkpoint, "--recipe", f"{name}-choose"]
    command += ["--start", uniform, "--keep", 0.6, *as_options(values), "--set", f"scorer={scorer}"]
    results = json.loads(aptvit(*command, "--out", tmp_path, "--json"))
    (evaluation,) = results["evaluations"]
    assert results["finished"] and results["updates"] == 0
    assert evaluation["kept_content"] == pytest.approx(0.6, abs=0.1)
    if scorer == "preview":  # a quarter in the first pass, less if sides are odd, and the fine tokens in the second
        assert evaluation["read"] == pytest.approx(1 / 4 + evaluation["kept"] - (1 - evaluation["kept"]) / 3, abs=0.05)
    initial, trained = (load_file(folder / "model" / "model.safetensors") for folder in (uniform, tmp_path))
    new = {key for key in trained if "coarse_glance." in key}
    assert bool(new) == (scorer != "preview") and trained.keys() - new == initial.keys()
    assert all(torch.equal(trained[key], initial[key]) for key in initial)
    dense = from_pretrained(tmp_path)
    assert dense.model.thresholds[0] > 0 and dense.model.patchifier.scorer_name == scorer
    if scorer == "preview":  # a segmenter previews its outputs, a detector those of its backbone
        network = dense.model.patchifier.scorer.preview.network
        assert network is (dense.network if name == "segmenter" else dense.network.backbone)
        image, read = Image.fromarray(shapes.draw(100)[0]).resize((128, 128)), []
        dense.model.adapter.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
        prediction = predict_image(dense, image)  # scores the image twice: to predict, and to draw its patches
        assert prediction.tokens_read == sum(read[:2]) - 2 * dense.model.num_prefix_tokens > prediction.tokens


@torch.no_grad()
def test_spread_is_trained_on_outputs_of_the_uniform_network(
    segmenters: dict[str, Any], detectors: dict[str, Any], streets: Path, cells: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The outputs are those in eval mode with merging disabled, and the network is not changed."""
    kinds = (
        ("pixels", PIXELS, segmenters, find_masks(str(streets))),
        ("boxes", BOXES, detectors, find_boxes(str(cells))),
    )
    for kind, values, networks, (images, _) in kinds:
        uniform = from_pretrained(networks["root"] / "uniform").network
        recipe = recipe_of({**values, "method": "apt", "scorer": "spread", "keep": 0.6})
        host = load_host(MODEL, checkpoint)
        with pytest.raises(ValueError, match="scorer=spread predicts"):
            Training(recipe, host, images, None, tmp_path / kind)._prepare_shares()
        training = Training(recipe, host, images, None, tmp_path / kind, networks["root"] / "uniform")
        training.network.train()
        batch = torch.randn(2, 3, 64, 96)
        before = training.model.budget
        outputs = training.task.uniform_outputs(batch)
        assert training.network.training and training.model.budget == before
        if kind == "pixels":
            torch.testing.assert_close(outputs, uniform(batch).softmax(1))
            continue
        (last,) = uniform.backbone.maps(batch)
        variance = last.var((2, 3), keepdim=True)
        floor = 0.01 * variance.mean(1, keepdim=True)
        torch.testing.assert_close(outputs, last / (torch.maximum(variance, floor) * last.shape[1]).sqrt())


def test_evaluate_equals_the_evaluation_of_the_training(
    segmenters: dict[str, Any], detectors: dict[str, Any], streets: Path, cells: Path
) -> None:
    for runs, data, task, name in (
        (segmenters, streets, "segmentation", "miou"),
        (detectors, cells, "detection", "map"),
    ):
        run = runs["root"] / "adaptive"
        (row,) = json.loads(aptvit("evaluate", run, "--rounds", 1, "--json"))
        expected = runs["adaptive"]["evaluations"][-1]
        for key in (name, "kept", "kept_content"):
            # the evaluation of the training pads images to the same size
            assert row[key] == pytest.approx(expected[key], abs=1e-3)
        assert row["speedup"] > 0 and row["images_per_second"] > 0
        (on_data,) = json.loads(aptvit("evaluate", data, "--task", task, "--run", run, "--rounds", 1, "--json"))
        assert on_data[name] == row[name]
    run, unsplit = segmenters["root"] / "adaptive", shapes.unsplit(streets.with_name("unsplit"), 3)
    command = ["evaluate", unsplit, "--task", "segmentation", "--run", run, "--rounds", 1, "--json"]
    (whole,) = json.loads(aptvit(*command))
    assert whole["images"] == 3  # none of them is held back
    (one,) = json.loads(aptvit(*command, "--val", streets / "val"))
    assert one["images"] == 6
    with pytest.raises(ValueError, match="does detection, not segmentation"):
        aptvit("evaluate", streets, "--task", "segmentation", "--run", detectors["root"] / "adaptive")


def test_the_model_is_that_of_the_start(detectors: dict[str, Any], cells: Path, tmp_path: Path) -> None:
    """Without --model, which is another by default."""
    start = ("--start", detectors["root"] / "uniform", "--recipe", "detector-short", "--keep", 0.7)
    aptvit("train-detector", cells, *start, *as_options({**BOXES, "max_steps": 1}), "--out", tmp_path / "out")
    origin, before = (read_origin(run) for run in (tmp_path / "out", detectors["root"] / "uniform"))
    assert origin["model"] == before["model"] and origin["checkpoint"] == before["checkpoint"]


def test_evaluate_tells_what_is_left_out(detectors: dict[str, Any], cells: Path, tmp_path: Path) -> None:
    shutil.copytree(cells, tmp_path / "cells")
    sorted((tmp_path / "cells").rglob("*.xml"))[-1].write_text("<annotation>")  # of the evaluation split
    words = ("evaluate", tmp_path / "cells", "--task", "detection", "--run", detectors["root"] / "uniform")
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0 and "left out: " in result.stderr and ".xml is no annotation" in result.stderr


@pytest.mark.slow
def test_evaluate_compares_with_smaller_images(
    segmenters: dict[str, Any], detectors: dict[str, Any], streets: Path, cells: Path
) -> None:
    for runs, data, task, name in (
        (segmenters, streets, "segmentation", "miou"),
        (detectors, cells, "detection", "map"),
    ):
        options = ("--task", task, "--run", runs["root"] / "adaptive", "--rounds", 1, "--json")
        rows = json.loads(aptvit("evaluate", data, *options, "--methods", "downscale", "--keeps", "0.4"))
        assert [row["method"] for row in rows] == ["uniform", "downscale@0.4", "adaptive"]
        (single,) = json.loads(aptvit("evaluate", data, *options))
        assert rows[2][name] == single[name] and rows[2]["kept"] == single["kept"] < 1
        assert rows[0]["kept"] == rows[0]["speedup"] == 1
        assert rows[1]["kept"] == pytest.approx(0.4)
        dense = from_pretrained(runs["root"] / "adaptive")
        dense.model.thresholds = (-1.0,) * (dense.model.num_scales - 1)
        if task == "segmentation":
            dense = replace(dense, inference={**dense.inference, "longer_side": round(160 * 0.4**0.5)})
        else:
            transform = dense.network.transform
            transform.min_size, transform.max_size = (round(128 * 0.4**0.5),), round(128 * 0.4**0.5)
        _, evaluation = sources_of(str(data), read_recipe(runs["root"] / "adaptive"))
        assert rows[1][name] == pytest.approx(evaluate_dense(dense, evaluation, rounds=1)["adaptive"][name])
        with pytest.raises(ValueError, match=r"'tome'.*'downscale'"):
            aptvit("evaluate", data, *options, "--methods", "tome")
        with pytest.raises(ValueError, match="between 0 and 1, not 1"):
            aptvit("evaluate", data, *options, "--methods", "downscale", "--keeps", "1")


def test_detect_and_segment_draw_their_results(
    segmenters: dict[str, Any], detectors: dict[str, Any], tmp_path: Path
) -> None:
    image, mask, drawn = shapes.draw(100)
    file = tmp_path / "images" / "image.png"
    file.parent.mkdir()
    Image.fromarray(image).save(file)
    (file.parent / "broken.png").write_bytes(b"nothing")
    common = [file.parent, "--out", tmp_path / "out", "--json"]
    (row,) = json.loads(aptvit("detect", *common, "--run", detectors["root"] / "uniform", code=1))
    assert row["tokens"] == row["uniform_tokens"] == 56
    assert {box["class"] for box in row["boxes"]} == {"red", "blue"}
    for kind, corners in drawn:
        boxes = [box["box"] for box in row["boxes"] if box["class"] == ("red", "blue")[kind]]
        assert box_iou(torch.tensor(boxes), torch.tensor([corners]).float()).max() > 0.5
    (row,) = json.loads(aptvit("detect", *common, "--run", detectors["root"] / "adaptive", code=1))
    assert row["tokens"] < row["uniform_tokens"]
    assert Image.open(row["drawing"]).width > 1500
    shutil.rmtree(tmp_path / "out")
    (row,) = json.loads(aptvit("segment", *common, "--run", segmenters["root"] / "adaptive" / "model", code=1))
    assert (np.array(Image.open(row["mask"])) == mask).mean() > 0.9
    with pytest.raises(ValueError, match="use aptvit segment"):
        aptvit("detect", file, "--run", segmenters["root"] / "adaptive", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no model"):
        aptvit("detect", file, "--run", tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize("kind", ["boxes", "pixels"])
def test_an_interrupted_training_continues_bit_for_bit(
    kind: str, streets: Path, cells: Path, checkpoint: Path, tmp_path: Path
) -> None:
    values = {**(BOXES if kind == "boxes" else PIXELS), "epochs": 2, "keep": 0.6, "ema": 0.9, "micro_batch_size": 2}
    values |= {"batch_size": 6, "drop_path": 0.1, "size": 64}
    find = find_boxes if kind == "boxes" else find_masks

    def make(run: Path) -> Training:
        train, _ = find(cells if kind == "boxes" else streets)
        return Training(recipe_of(values), load_host(MODEL, checkpoint), train.only(range(12)), None, run)

    make(tmp_path / "whole").run()
    interrupted = make(tmp_path / "cut")
    update = interrupted._update

    def update_and_stop(*arguments: Any) -> Any:
        values = update(*arguments)
        interrupted.stop.requested = interrupted.update == 3
        return values

    interrupted._update = update_and_stop  # type: ignore[method-assign]
    assert not interrupted.run()["finished"]
    assert make(tmp_path / "cut").run(resume=True)["finished"]
    whole, cut = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole) and whole.keys() == cut.keys()


def test_files_that_cannot_be_read_have_no_weight(cells: Path, streets: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(cells, tmp_path / "cells")
    shutil.copytree(streets, tmp_path / "streets")
    (tmp_path / "cells" / "JPEGImages" / "03.png").write_bytes(b"nothing")
    (tmp_path / "streets" / "trainannot" / "03.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((5, 5), dtype=np.uint8)).save(tmp_path / "streets" / "trainannot" / "04.png")
    for values, (train, evaluation) in (
        ({**BOXES, "epochs": 1}, find_boxes(tmp_path / "cells")),
        ({**PIXELS, "epochs": 1, "ignore": (255,)}, find_masks(tmp_path / "streets", num_classes=3)),
    ):
        run = tmp_path / values["objective"]
        training = Training(
            recipe_of({**values, "method": "uniform"}), load_host(MODEL, checkpoint), train, evaluation, run
        )
        assert training.run()["finished"]
        log = read_log(run)
        problems = [line["message"] for line in log if line["what"] == "problem"]
        assert any("03.png" in problem for problem in problems)
        assert all(np.isfinite(line["loss"]) for line in log if line["what"] == "train")
    assert any("04.png" in problem and "5x5" in problem for problem in problems)


def test_a_batch_without_weight_has_no_gradients(cells: Path, checkpoint: Path, tmp_path: Path) -> None:
    train, _ = find_boxes(cells)
    training = Training(recipe_of({**BOXES, "keep": 0.5}), load_host(MODEL, checkpoint), train, None, tmp_path)
    (batch,) = make_loader(training.task.images, [[0, 1]], 0)
    unweighted = Batch(batch.images, batch.targets, torch.zeros(2, dtype=torch.bool), batch.index, [])
    training._prepare_shares()
    training._start(None)
    training.shares.set(0.5)
    losses = training.task.losses(training.learner, unweighted, training.processes.accelerator)
    assert losses.per_image.shape == (2,) and losses.tokens is not None and losses.tokens[1] == 0
    (losses.per_image * unweighted.valid).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in training.network.parameters())


class PreparedOutputs(torch.nn.Module):
    """A learner that returns prepared outputs."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, *_: Any) -> Any:
        return next(self.outputs)


def test_scores_are_those_of_the_definition(
    segmenters: dict[str, Any], detectors: dict[str, Any], streets: Path, cells: Path
) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    dense = from_pretrained(segmenters["root"] / "adaptive")
    _, files = find_masks(streets)
    assert files is not None
    truth = [files.load(i)[1] for i in range(len(files))]
    rng = torch.Generator().manual_seed(0)
    guesses = [torch.where(torch.rand(mask.shape, generator=rng) < 0.3, (mask + 1) % 3, mask) for mask in truth]
    logits = [torch.nn.functional.one_hot(mask, 3).permute(2, 0, 1)[None] * 9.0 for mask in guesses]
    loader = make_loader(MaskDataset(files), [[i] for i in range(len(files))], 0)
    whole = {**dense.inference, "slide": False}
    metrics = score_segmenter(PreparedOutputs(logits), dense.network, loader, accelerator, whole)
    a, b = torch.cat([mask.flatten() for mask in truth]), torch.cat([mask.flatten() for mask in guesses])
    ious = [float(((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum()) for k in range(3)]
    assert metrics["miou"] == pytest.approx(np.mean(ious), abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(float((a == b).float().mean()), abs=1e-5)

    detector = from_pretrained(detectors["root"] / "adaptive").network
    _, boxed = find_boxes(cells)
    assert boxed is not None
    detections = []
    for i in range(len(boxed)):
        image, corners, labels = boxed.load(i)
        transformed, _ = detector.transform([torch.zeros(3, image.height, image.width)])
        scale = transformed.image_sizes[0][1] / image.width
        right = labels == 0  # all objects of class 0 are detected, none of class 1
        scores = torch.full((int(right.sum()),), 0.9)
        detections.append([{"boxes": corners[right] * scale, "labels": labels[right] + 1, "scores": scores}])
    loader = make_loader(BoxDataset(boxed), [[i] for i in range(len(boxed))], 0)
    metrics = score_detector(PreparedOutputs(detections), detector, loader, accelerator)
    assert metrics["map"] == pytest.approx(0.5) and metrics["map_50"] == pytest.approx(0.5)


@torch.no_grad()
def test_learners_are_the_networks(segmenters: dict[str, Any], detectors: dict[str, Any]) -> None:
    image = torch.as_tensor(shapes.draw(50)[0]).permute(2, 0, 1).float() / 255
    segmenter = from_pretrained(segmenters["root"] / "adaptive").network
    x = image[None] * 2 - 1
    layout = segmenter.backbone.model.layout(x)
    torch.testing.assert_close(SegmentationLearner(segmenter)(x, None, layout), segmenter(x))
    detector = from_pretrained(detectors["root"] / "adaptive").network
    transformed, _ = detector.transform([image])
    layout = detector.backbone.model.layout(transformed.tensors)
    boxes = DetectionLearner(detector)(transformed, None, layout)
    boxes = detector.transform.postprocess(boxes, transformed.image_sizes, [(128, 160)])
    torch.testing.assert_close(boxes, detector([image]))


def test_errors_of_inputs_that_do_not_fit(
    segmenters: dict[str, Any], cells: Path, streets: Path, checkpoint: Path
) -> None:
    root, host = segmenters["root"], load_host(MODEL, checkpoint)
    with pytest.raises(ValueError, match="does not fit this network"):
        command = ["train-segmenter", streets, "--model", MODEL, "--checkpoint", checkpoint, *as_options(PIXELS)]
        aptvit(*command, "--start", root / "uniform", "--set", "channels=24", "--out", root / "other")
    with pytest.raises(ValueError, match="needs images with masks"):
        Training(recipe_of(PIXELS), host, find_boxes(cells)[0], None, root)
    with pytest.raises(ValueError, match="needs images with boxes"):
        Training(recipe_of(BOXES), host, find_masks(streets)[0], None, root)
    with pytest.raises(ValueError, match="method=tome has no feature maps"):
        DetectionRecipe(method="tome")
    with pytest.raises(ValueError, match="trains the maps of an adaptive network"):
        DetectionRecipe(method="uniform", from_maps=True)
    with pytest.raises(ValueError, match="needs window"):
        DetectionRecipe(global_blocks=(1,))
    with pytest.raises(ValueError, match="the smallest and the largest"):
        SegmentationRecipe(jitter=(2.0, 0.5))
