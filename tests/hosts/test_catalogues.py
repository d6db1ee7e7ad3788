"""Lists of models: what they say of a model is what `aptvit.adapt` does with it."""

from __future__ import annotations

import json
import sys
from typing import Any

import open_clip
import pytest
import torch
from models.around_hosts import HOSTS, make
from transformers.utils import logging

import aptvit
from aptvit import cli
from aptvit.hosts.catalogue_open_clip import describe_open_clip, open_clip_names
from aptvit.hosts.catalogue_transformers import class_names_of_transformers, describe_class


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["aptvit", "models", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_classes_that_are_compared_in_tests_are_listed() -> None:
    listed = class_names_of_transformers()
    for name in HOSTS:
        kind = type(make(name).host).__name__
        if kind in listed:
            assert describe_class(kind).reason is None, kind
    # Towers inside of larger models, and a class without a task of its own, have no place in transformers' lists.
    assert len({type(make(name).host).__name__ for name in HOSTS} & set(listed)) >= 28


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("YolosForObjectDetection", "another order"),
        ("SwinForImageClassification", "full grid"),
        ("Cohere2VisionModel", "aptvit.vlm.adapt"),
        ("ResNetForImageClassification", "no ViT inside"),
        ("ViTMAEModel", "load the checkpoint as ViTModel"),
    ],
)
def test_others_are_listed_with_the_reason(name: str, reason: str) -> None:
    before = logging.get_verbosity()
    entry = describe_class(name)
    assert entry.reason is not None and reason in entry.reason and entry.traits == {}
    assert logging.get_verbosity() == before


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-S-16-alt", "ViT-B-16-SigLIP", "ViT-B-16-plus-240"])
def test_open_clip(name: str) -> None:
    entry = describe_open_clip(name)
    with torch.device("meta"):
        host: Any = open_clip.create_model(name, device="meta")
    assert entry.reason is None and entry.library == "open_clip"
    adapted = aptvit.adapt(host).aptvit
    assert entry.traits["patch"] == str(adapted.patch_size) and entry.traits["width"] == str(adapted.embed_dim)


@pytest.mark.parametrize("name", ["RN50", "coca_ViT-B-32", "ViTamin-B", "convnext_base"])
def test_of_open_clip_only_vits(name: str) -> None:
    entry = describe_open_clip(name)
    assert entry.reason is not None
    with torch.device("meta"):
        host = open_clip.create_model(name, device="meta")
    with pytest.raises(ValueError, match="cannot adapt"):
        aptvit.adapt(host)


def test_the_command_lists_all_libraries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "*vit*b*32*", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["library"] for row in rows} == {"timm", "open_clip"}
    assert run(monkeypatch, "depthanything", "--json") == 0
    (first, *_), _ = json.loads(capsys.readouterr().out), capsys.readouterr()
    assert first["library"] == "transformers" and first["adaptable"] and first["patch"] == "14"
    assert run(monkeypatch, "no such", "--library", "open_clip") == 2
    assert "no Vision Transformer of open_clip matches" in capsys.readouterr().err
    assert run(monkeypatch, "Yolos", "--all") == 0
    assert "transformers: 0 of 2 models can be adapted" in capsys.readouterr().out
    assert len(open_clip_names()) > 100 and len(class_names_of_transformers()) > 150
