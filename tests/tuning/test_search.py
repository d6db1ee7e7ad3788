"""The search on made-up images where the answer is known, and what it stores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import aptvit
from aptvit.evaluation.methods import Conditions
from aptvit.hosts.pretrained import Host
from aptvit.tuning.record import Trial, TrialRecord
from aptvit.tuning.search import Search, nearness, split_images, survivors
from aptvit.tuning.space import Candidate, Goal, default_candidates
from aptvit.tuning.verdict import as_markdown, judge, write_tuned

Load = Callable[[int | None], Host]
QUICK = Conditions(batch_size=4, timed_images=4, rounds=2)
SIDE, PATCH = 128, 8
CANDIDATES = [
    Candidate("downscale", SIDE),
    Candidate("apt-entropy", SIDE, area_bias=1.0),
    Candidate("apt-embedding", SIDE),
]


@pytest.fixture(scope="module")
def load() -> Load:
    torch.manual_seed(0)
    vit: Any = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": SIDE, "patch_size": PATCH, "embed_dim": 48, "num_heads": 3, "depth": 4, "num_classes": 10},
    )
    with torch.no_grad():
        vit.head.weight.normal_(std=1.0)
        vit.pos_embed.zero_()  # with area_bias=1 a merge of equal patches changes nothing
        for block in vit.blocks:
            block.mlp.fc2.weight.mul_(10)
    data = {"input_size": (3, SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    data |= {"crop_pct": 1.0, "crop_mode": "center"}

    def at(size: int | None) -> Host:
        model = copy.deepcopy(vit).eval()
        if size is not None:
            model.set_input_size(img_size=size)
        return Host(model, "made up", {**data, "input_size": (3, size or SIDE, size or SIDE)})

    return at


def write(folder: Path, images: np.ndarray) -> list[Path]:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:03}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def small_things(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Flat images with a few dots that are smaller than a patch, which a smaller image blurs."""
    random = np.random.default_rng(0)
    images = np.full((36, SIDE, SIDE, 3), 90.0)
    for image in images:
        for _ in range(8):
            y, x = random.integers(0, SIDE // 16, 2) * 16
            image[y : y + 16, x : x + 16] = random.integers(0, 2, (16, 16, 1)) * 255
    return write(tmp_path_factory.mktemp("small") / "images", images)


@pytest.fixture(scope="module")
def enlarged(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images without detail at the size of a pixel, but different everywhere: a smaller image loses nothing."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(36):
        small = Image.fromarray(random.integers(0, 256, (16, 16, 3)).astype(np.uint8))
        images.append(np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return write(tmp_path_factory.mktemp("enlarged") / "images", np.stack(images))


def search(load: Load, files: list[Path], goal: Goal, output: Path | None = None, **options: Any) -> Search:
    paths, held_out = split_images(files, 1000)
    return Search(load, "made up", paths, held_out, goal, output, candidates=CANDIDATES, conditions=QUICK, **options)


def test_adaptive_patches_win_where_what_matters_is_small(load: Load, small_things: list[Path]) -> None:
    result = search(load, small_things, Goal("gflops", 0.05)).run()
    assert {trial.candidate.name for trial in result.finalists} == {"downscale", "apt-entropy"}
    assert all(trial.held_out and len(trial.distances) == 12 for trial in result.finalists)
    for trial in result.finalists:
        assert trial.gflops <= 0.05 * 1.1
    verdict = judge(result)
    assert verdict.kind == "adaptive" and "the distance of a smaller image" in verdict.sentence
    assert verdict.trial is not None and verdict.trial.distance.mean < 1e-4


def test_a_smaller_image_wins_where_images_are_enlarged(load: Load, enlarged: list[Path]) -> None:
    result = search(load, enlarged, Goal("gflops", 0.05)).run()
    verdict = judge(result)
    assert verdict.kind == "downscale" and verdict.sentence.startswith("Take a smaller image")


def test_an_agreement_is_reached_at_the_least_cost(load: Load, small_things: list[Path]) -> None:
    result = search(load, small_things, Goal("agreement", 0.8)).run()
    trials = [trial for trial in result.record.measured if trial.images == 24 and not trial.held_out and trial.rounds]
    reached = [trial for trial in trials if trial.agreement.mean >= 0.8]
    assert reached
    first = result.finalists[0]
    assert any(trial.candidate == first.candidate and trial.share == first.share for trial in reached)


def test_what_saves_nothing_is_left_as_it_is(load: Load, small_things: list[Path], tmp_path: Path) -> None:
    result = search(load, small_things, Goal("gflops", 10.0)).run()
    verdict = judge(result)
    assert verdict.kind == "uniform" and verdict.sentence.startswith("Leave the model as it is")


def with_cost(trial: Trial, ratio: float) -> Trial:
    values = {"seconds": [ratio, ratio], "seconds_uniform": [1.0, 1.0], "gflops": ratio, "gflops_uniform": 1.0}
    return Trial.from_dict({**trial.to_dict(), **values})


@pytest.mark.parametrize("kind", ["adaptive", "downscale", "tome", "uniform"])
def test_the_folder_is_the_model_of_the_verdict(
    load: Load, small_things: list[Path], tmp_path: Path, kind: str
) -> None:
    one = search(load, small_things, Goal("gflops", 0.05))
    candidates = {"adaptive": "apt-entropy", "downscale": "downscale", "tome": "tome", "uniform": "downscale"}
    one.candidates = [Candidate(candidates[kind], SIDE)]
    result = one.run()
    ratio = 1.0 if kind == "uniform" else 0.5
    result.finalists[:] = [with_cost(trial, ratio) for trial in result.finalists]
    verdict = judge(result)
    assert verdict.kind == kind
    code = write_tuned(one, result, verdict, tmp_path / "tuned")
    model = aptvit.from_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "tuned.md").read_text().count(verdict.sentence) == 1
    size = result.finalists[0].setting.split()[0] if kind == "downscale" else SIDE
    images = torch.rand(2, 3, int(size), int(size))
    with torch.no_grad():
        expected = one.prepared(result.finalists[0]).model(images) if kind == "adaptive" else None
        if kind == "downscale":
            expected = load(int(size)).model(images)
        if kind in ("tome", "uniform"):
            expected = load(None).model(images)
        assert expected is not None and torch.allclose(model(images), expected, atol=1e-5)
    assert bool(code) == (kind == "tome") and code.startswith("aptvit.merging.tome(vit, r=[" if code else "")


def test_an_interrupted_search_continues(load: Load, small_things: list[Path], tmp_path: Path) -> None:
    output, goal = tmp_path / "tune.json", Goal("gflops", 0.05)

    class Stop(Exception):
        pass

    def stop(_trial: Trial) -> None:
        if len(TrialRecord.load(output).rows) == 5:
            raise Stop

    with pytest.raises(Stop):
        search(load, small_things, goal, output, done=stop).run()
    before = TrialRecord.load(output).rows
    new: list[Trial] = []
    result = search(load, small_things, goal, output, done=new.append).run()
    assert result.record.rows[:5] == before and len(result.record.rows) == 5 + len(new)
    whole = search(load, small_things, goal).run()
    assert [(trial.candidate, trial.share) for trial in whole.finalists] == [
        (trial.candidate, trial.share) for trial in result.finalists
    ]
    with pytest.raises(ValueError, match="another goal"):
        search(load, small_things, Goal("gflops", 0.04), output)


def test_the_verdict_reads_only_held_out_images(load: Load, small_things: list[Path]) -> None:
    paths, held_out = split_images(small_things, 1000)
    assert not set(paths) & set(held_out) and sorted(paths + held_out) == small_things
    assert len(held_out) == 12
    one = search(load, small_things, Goal("gflops", 0.05))
    inputs, read = one.inputs, []

    def noted(count: int, is_held_out: bool) -> Any:
        files = inputs(count, is_held_out)
        read.append((is_held_out, set(files.files.paths)))
        return files

    one.inputs = noted  # type: ignore[assignment]
    result = one.run()
    for is_held_out, files in read:
        assert files <= set(held_out if is_held_out else paths)
    # The first look at held-out images is after the last trial of the search.
    trials = [trial.held_out for trial in result.record.rows]
    assert trials == sorted(trials) and sum(trials) == len(result.finalists)
    assert not any(flag for flag, _ in read[: len(trials) - sum(trials)])
    page = as_markdown(result, judge(result))
    assert "could not run" not in page and "by entropy" in page


def test_what_cannot_run_is_told(load: Load, small_things: list[Path]) -> None:
    one = search(load, small_things, Goal("gflops", 0.05))
    one.candidates = [Candidate("apt-spread", SIDE), Candidate("apt-entropy", SIDE)]
    page = as_markdown(result := one.run(), judge(result))
    assert "could not run: adaptive patches by spread: the network of this scorer is not trained" in page
    one.candidates = one.candidates[:1]
    with pytest.raises(
        ValueError, match=r"nothing that was tried can run on this model\. adaptive patches by spread: the network"
    ):
        one.run()


def test_distances_are_those_of_pytorch() -> None:
    outputs, reference = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    agreements, distances = nearness(outputs, reference, True)
    p, q = reference.softmax(1), outputs.softmax(1)
    assert np.allclose(distances, (p * (p / q).log()).sum(1), atol=1e-5)
    assert agreements == tuple((outputs.argmax(1) == reference.argmax(1)).double().tolist())
    agreements, distances = nearness(outputs, reference, False)
    cosine = (outputs * reference).sum(1) / outputs.norm(dim=1) / reference.norm(dim=1)
    assert np.allclose(agreements, cosine, atol=1e-5) and np.allclose(distances, 1 - cosine, atol=1e-5)


def test_the_best_of_each_kind_survives() -> None:
    names = ["apt-entropy", "apt-embedding", "tome", "downscale", "random", "tome"]
    trials = [Trial(Candidate(name, 64 + i), 0.5, 1, 0) for i, name in enumerate(names)]
    assert survivors(trials, 2) == [trials[0], trials[1], trials[2], trials[3], trials[4]]
    assert survivors(trials, 0) == [trials[0], *trials[2:5]]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("time", 1.5, "time=1.5 must be above 0 and at most 1"),
        ("gflops", 0.0, "must be above 0"),
        ("agreement", -1, ""),
    ],
)
def test_goals_out_of_range_are_refused(kind: Any, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Goal(kind, value)


def test_few_images_and_random_weights_are_refused(load: Load, small_things: list[Path]) -> None:
    with pytest.raises(ValueError, match="11 images are too few to choose by"):
        split_images(small_things[:11], 100)

    def untrained(size: int | None) -> Host:
        host = load(size)
        return Host(host.model, "random", host.data)

    with pytest.raises(ValueError, match="random weights: give trained weights with --checkpoint"):
        search(untrained, small_things, Goal("time", 0.5))


def test_ways_are_of_the_size_of_the_model() -> None:
    candidates = default_candidates(224, 16)
    assert {candidate.size for candidate in candidates} == {224, 192} and len(set(candidates)) == len(candidates)
    assert {"downscale", "tome", "apt-glance"} <= {candidate.name for candidate in candidates}
