"""Hostile models, checkpoints, configurations and recipes."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .case import Case, Payload, pickle_that_runs
from .images import names_and_places

__all__ = ["models"]

_WEIGHTS = "model.safetensors"
_REPLACED = ("batch_size", "workers")  # settings that the commands replace


def models(seed: int) -> Iterator[Case]:
    """All hostile models; those of the kind "model" are made from a copy of a good folder."""
    for kind, inner in (("model", ""), ("detector", "model"), ("segmenter", "model")):
        for name, change in _configurations(dense=kind != "model"):
            yield Case(f"{kind} {name}", kind, "hostile", _changed(change, inner))
        for name, content in _texts():
            yield Case(f"{kind} config.json {name}", kind, "hostile", _written(content, inner, "config.json"))
        for name, content in _safetensors():
            yield Case(f"{kind} {_WEIGHTS} {name}", kind, "hostile", _written(content, inner, _WEIGHTS))
        yield Case(f"{kind} config.json pipe", kind, "hostile", _pipe(inner, "config.json"))
        yield Case(f"{kind} {_WEIGHTS} pipe", kind, "hostile", _pipe(inner, _WEIGHTS))
        yield Case(f"{kind} {_WEIGHTS} sparse", kind, "hostile", _sparse(inner, _WEIGHTS))
    yield from _depth_models()
    for name, content in _safetensors():
        yield Case(f"checkpoint safetensors {name}", "checkpoint", "hostile.safetensors", _bytes(content))
    yield from _pickles()
    for name, content in _texts():
        yield Case(f"configuration {name}", "configuration", "hostile.json", _bytes(content))
    for name, options in _options():
        text = json.dumps({"architecture": "test_vit", "aptvit": options})
        yield Case(f"configuration {name}", "configuration", "hostile.json", _bytes(text.encode()))
    for name, text in _recipes():
        yield Case(f"recipe {name}", "recipe", "hostile.yaml", _bytes(text.encode()), not name.startswith(_REPLACED))
    for case in names_and_places(b"epochs: many", "recipe", "yaml"):
        if "named" not in case.name and "folder" not in case.name:
            yield Case(f"recipe {case.name}", "recipe", case.file, case.make)


def _bytes(content: bytes) -> Callable[[Path, Payload], Any]:
    return lambda path, payload: path.write_bytes(content)


def _written(content: bytes, *place: str) -> Callable[[Path, Payload], Any]:
    return lambda path, payload: path.joinpath(*place).write_bytes(content)


def _pipe(*place: str) -> Callable[[Path, Payload], Any]:
    def make(path: Path, payload: Payload) -> None:
        path.joinpath(*place).unlink()
        os.mkfifo(path.joinpath(*place))

    return make


def _sparse(*place: str) -> Callable[[Path, Payload], Any]:
    """A header that promises a tensor of 40 GB, and a file as large."""

    def make(path: Path, payload: Payload) -> None:
        header = json.dumps({"x": {"dtype": "U8", "shape": [40_000_000_000], "data_offsets": [0, 40_000_000_000]}})
        file = path.joinpath(*place)
        file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
        os.truncate(file, 8 + len(header) + 40_000_000_000)

    return make


Change = Callable[[dict[str, Any], Payload], None]


def _depth_models() -> Iterator[Case]:
    """Of a model of transformers around a ViT: its own files, its processor, and what makes it adaptive."""
    files = {
        "aptvit.json": [
            *_options_of_depth(),
            *_entries("architecture", ("pipeline", "DPTModel", 5, None, "os.system")),
        ],
        "config.json": [
            *_entries("architectures", (["Trainer"], ["os.system"], 5, [])),
            *_entries("model_type", ("dpt", "owner/name", 5)),
            *_entries("auto_map", ({"AutoModelForDepthEstimation": "evil.Evil"},)),
            *_entries("use_pretrained_backbone", (True,)),
            *_entries("backbone_config", (None, 5, {"model_type": "owner/name"}, {"model_type": "dinov2"})),
            *_entries("patch_size", (0, 10**9, "x")),
            *_entries("reassemble_hidden_size", (10**9, -1)),
            *_entries("neck_hidden_sizes", ([], [10**9] * 4)),
            *_entries("fusion_hidden_size", (10**8,)),
        ],
        "preprocessor_config.json": [
            *_entries("image_processor_type", ("os.system", "AutoModel", 5)),
            *_entries("size", ({"height": 10**6, "width": 10**6}, {"height": -5, "width": 3}, 0, "x", {"height": 1})),
            *_entries("image_mean", ("x", [], [1e300] * 3, [0.5])),
            *_entries("image_std", ([0, 0, 0], [float("nan")] * 3, None)),
            *_entries("rescale_factor", (0, 1e300, "x")),
            *_entries("auto_map", ({"AutoImageProcessor": "evil.Evil"},)),
        ],
    }
    for file, changes in files.items():
        for name, change in changes:
            yield Case(f"depth {file} {name}", "depth", "hostile", _changed(change, name=file), must_tell=False)
        for name, content in _texts():
            # A processor without a single setting of its own has the defaults of its class.
            is_told = (file, name) != ("preprocessor_config.json", "of names of a class")
            yield Case(f"depth {file} {name}", "depth", "hostile", _written(content, file), must_tell=is_told)
        yield Case(f"depth {file} pipe", "depth", "hostile", _pipe(file))
    for file in (_WEIGHTS, "aptvit.safetensors"):
        for name, content in _safetensors():
            # A processor without a single setting of its own has the defaults of its class.
            is_told = (file, name) != ("preprocessor_config.json", "of names of a class")
            yield Case(f"depth {file} {name}", "depth", "hostile", _written(content, file), must_tell=is_told)
        yield Case(f"depth {file} pipe", "depth", "hostile", _pipe(file))
    yield Case(f"depth {_WEIGHTS} sparse", "depth", "hostile", _sparse(_WEIGHTS))


def _entries(key: str, values: Sequence[Any]) -> Iterator[tuple[str, Change]]:
    for number, value in enumerate(values):
        yield f"{key} {number}", lambda config, payload, value=value: config.update({key: value})


def _options_of_depth() -> Iterator[tuple[str, Change]]:
    for name, value in _options():
        yield name, lambda config, payload, value=value: config.update(options=value)


def _changed(change: Change, *place: str, name: str = "config.json") -> Callable[[Path, Payload], Any]:
    def make(path: Path, payload: Payload) -> None:
        file = path.joinpath(*place) / name
        config = json.loads(file.read_text())
        change(config, payload)
        file.write_text(json.dumps(config))

    return make


def _configurations(dense: bool) -> Iterator[tuple[str, Change]]:
    def setting(*keys: str, value: Any) -> Change:
        def change(config: dict[str, Any], payload: Payload) -> None:
            for key in keys[:-1]:
                config = config.setdefault(key, {})
            config[keys[-1]] = value

        return change

    def removed(*keys: str) -> Change:
        def change(config: dict[str, Any], payload: Payload) -> None:
            for key in keys[:-1]:
                config = config[key]
            config.pop(keys[-1], None)

        return change

    if dense:
        for name, value in (("task", "exec"), ("classes", 5), ("classes", []), ("options", 5), ("inference", None)):
            yield f"dense {name}={value!r}", setting("dense", name, value=value)
        for name, value in (("num_classes", 10**9), ("num_classes", -1), ("masks", "yes"), ("image_size", 10**9)):
            yield f"option {name}={value!r}", setting("dense", "options", name, value=value)
        for name, value in (("backbone", "hf-hub:a/b"), ("out_channels", 10**8), ("channels", 10**8)):
            yield f"option {name}={value!r}", setting("dense", "options", name, value=value)
        yield "dense missing", removed("dense")
        return
    for name in ("architecture", "model_args", "pretrained_cfg", "aptvit"):
        yield f"without {name}", removed(name)
        yield f"{name} a list", setting(name, value=[1, 2])
        yield f"{name} a number", setting(name, value=5)
    for value in ("hf-hub:owner/name", "local-dir:/etc", "https://example.org/x", "resnet18", "../../etc", "x" * 5000):
        yield f"architecture {value[:30]}", setting("architecture", value=value)
    yield "architecture at the server", lambda config, payload: config.update(architecture=f"hf-hub:{payload.url}")
    for name, value in (("depth", 10**9), ("embed_dim", 10**9), ("img_size", 10**9), ("img_size", -5), ("depth", 1.5)):
        yield f"model_args {name}={value}", setting("model_args", name, value=value)
    for name, value in (("num_heads", 0), ("checkpoint_path", "/etc/passwd"), ("pretrained", True), ("x", {"y": 1})):
        yield f"model_args {name}={value!r}", setting("model_args", name, value=value)
    for name, value in (("mean", "abc"), ("mean", [0.5] * 2), ("std", [0, 0, 0]), ("input_size", [3, 10**6, 10**6])):
        yield f"pretrained_cfg {name}={value!r}", setting("pretrained_cfg", name, value=value)
    for name, value in (("crop_pct", 1e-9), ("interpolation", "exec"), ("mean", [float("nan")] * 3)):
        yield f"pretrained_cfg {name}={value!r}", setting("pretrained_cfg", name, value=value)
    for name, value in _options():
        yield name, setting("aptvit", value=value)
    for name, value in (("library", "transformers"), ("dtype", "load"), ("num_classes", 10**9), ("id2label", {"0": 1})):
        yield f"{name}={value!r}", setting(name, value=value)
    backbone = {"backbone": "owner/name", "use_pretrained_backbone": True, "model_type": "dpt"}

    def of_transformers(config: dict[str, Any], payload: Payload) -> None:
        config.update(library="transformers", architecture="DPTForDepthEstimation", host=backbone)

    yield "around a backbone of the hub", of_transformers
    yield (
        "of a class that is no model",
        lambda config, payload: config.update(library="transformers", architecture="pipeline", host={}),
    )


def _options() -> Iterator[tuple[str, Any]]:
    values: dict[str, Any] = {
        "scales": (10**9, -1, "many", 2.5, None),
        "thresholds": ([float("nan")], "abc", [1.0] * 10_000, [{}]),
        "keep": (float("nan"), -1, 1e300, "half"),
        "scorer": ("os.system", 5, ["entropy"], "x" * 10_000),
        "window_size": (10**9, 0),
        "max_tokens": (-5, "x"),
        "mean": ([1] * 1000, "x"),
        "unknown": (1,),
        "global_blocks": ([10**9],),
        "area_bias": (float("inf"),),
    }
    for name, wrong in values.items():
        for number, value in enumerate(wrong):
            if (name, value) != ("scales", None):
                yield f"option {name} {number}", {"keep": 0.5, "scales": 2, "scorer": "entropy", name: value}


def _texts() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "cut", b'{"architecture": "test_v'
    yield "of noise", bytes(range(256))
    yield "in UTF-16 without a mark", '{"a": 1}'.encode("utf-16-le")
    yield "nested", b"[" * 100_000 + b"]" * 100_000
    yield "a number of 10000 digits", b'{"aptvit": {"keep": ' + b"9" * 10_000 + b"}}"
    yield "a list", b"[1, 2, 3]"
    yield "null", b"null"
    yield "of names of a class", b'{"aptvit": {"__class__": "x"}}'


def _safetensors() -> Iterator[tuple[str, bytes]]:
    def header(entries: Any, data: bytes = b"") -> bytes:
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + data

    yield "empty", b""
    yield "of 7 bytes", b"1234567"
    yield "with a header of 2^63 bytes", struct.pack("<Q", 2**63) + b"{}"
    yield "with a header of 90 MB", struct.pack("<Q", 90_000_000) + b"{" + b" " * 1000
    yield "of no JSON", struct.pack("<Q", 5) + b"hello"
    yield "of nothing", header({})
    yield "of a list", header([1, 2])
    yield "of an unknown type", header({"x": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    yield "of a negative shape", header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4))
    yield "of an endless shape", header({"x": {"dtype": "F32", "shape": [2**40] * 3, "data_offsets": [0, 4]}}, bytes(4))
    yield (
        "of tensors that overlap",
        header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)),
    )
    yield "that ends early", header({"x": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}, bytes(4))
    yield "that is a pickle", pickle.dumps({"x": 1})
    yield "of another model", header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))


def _pickles() -> Iterator[Case]:
    def torch_zip(value: Callable[[Payload], bytes], compression: int = zipfile.ZIP_STORED, extra: int = 0) -> Any:
        def make(path: Path, payload: Payload) -> None:
            with zipfile.ZipFile(path, "w", compression) as file:
                file.writestr("archive/data.pkl", value(payload))
                file.writestr("archive/byteorder", "little")
                file.writestr("archive/version", "3\n")
                if extra:
                    file.writestr("archive/data/0", bytes(extra))

        return make

    def bare(path: Path, payload: Payload) -> None:
        path.write_bytes(pickle.dumps(pickle_that_runs(payload), protocol=2))

    def inside(payload: Payload) -> bytes:
        return pickle.dumps({"head.weight": pickle_that_runs(payload)}, protocol=2)

    def bomb(path: Path, payload: Payload) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save({"head.weight": torch.zeros(10, 100)}, buffer)
        with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name in good.namelist():
                large = bytes(3_000_000_000) if name.endswith("data/0") else good.read(name)
                file.writestr(name, large)

    def plain(value: Any) -> Any:
        def make(path: Path, payload: Payload) -> None:
            import torch

            torch.save(value, path)

        return make

    cases: dict[str, Any] = {
        "that runs code, bare": bare,
        "that runs code": torch_zip(inside),
        "that is a bomb": bomb,
        "that is a number": plain(5),
        "that is a list": plain([1, 2]),
        "of numbers": plain({"head.weight": 5}),
        "of text": plain({"state_dict": {"head.weight": "x"}}),
        "that is empty": _bytes(b""),
        "that is cut": _bytes(b"PK\x03\x04" + bytes(100)),
        "of noise": _bytes(bytes(range(256)) * 8),
        "of endless memos": _bytes(b"\x80\x02" + b"(" * 200_000 + b"."),
    }
    for name, make in cases.items():
        yield Case(f"checkpoint pth {name}", "checkpoint", "hostile.pth", make)
        if name != "that is a bomb":
            yield Case(f"state.pt {name}", "state", "state.pt", make, must_tell=False)


def _recipes() -> Iterator[tuple[str, str]]:
    yield "that runs code", "!!python/object/apply:os.system ['touch canary']"
    yield (
        "of aliases without end",
        "a: &a [x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)),
    )
    yield "that contains itself", "a: &a\n  b: *a\n"
    yield "nested", "[" * 20_000
    yield "that is a list", "- 1\n- 2\n"
    yield "that is text", "hello"
    yield "of noise", "\x00\x01\x02"
    yield "of tabs", "\t\ta:\n\t- b"
    for word in ("epochs: 1.0e+400", "epochs: -1", "epochs: .nan", "batch_size: 1000000000000", "scales: 1000000000"):
        yield word, word
    for word in ("lr: .inf", "optimizer: os.system", "objective: exec", "thresholds: [.nan]", "keep: {a: b}"):
        yield word, word
    for word in ("workers: 1000000000", "precision: float7", "drop_path: 5", "seed: 1e99", "crop: 7", "mixup: -3"):
        yield word, word
