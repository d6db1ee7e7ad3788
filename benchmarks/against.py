"""Two checkouts of aptvit beside each other on the CPU: did a change of the code cost time, or did it save some?

    git worktree add ../before main~1
    python benchmarks/against.py ../before
    python benchmarks/against.py ../before --cases 1-float32 8-float32 --rounds 15

Each checkout has a process that stays until the end; only one of the two works at a time. In each round every side
runs once in both processes, one process after the other, in an order that is turned round from one round to the next.
Sides are timm's own model, the adaptive model with nothing merged (keep=1.0), and with 55 % of the tokens; all from
normalised images in memory to logits. Weights are random, images are made from photos of scikit-image and scikit-learn.
The uniform side is the same code in both processes: how far its ratio is from 1 is the noise of the machine.

What merging nothing costs is also measured outside the blocks, where whole forwards hide it in their noise: the
difference between both sides of a model without blocks, as a share of the uniform forward.

Needs only what both checkouts have in common: aptvit.adapt, model(images) and model.layout(images).
Writes against.{json,md}.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CASES = {f"{batch}-{dtype}": {"batch": batch, "dtype": dtype} for dtype in ("float32", "bfloat16") for batch in (1, 8)}
NUM_SINGLE = 4  # images of a round where each is a batch of its own
NUM_OUTSIDE = 10  # runs without blocks in a round
KEEP = 0.55
SIDES = {"uniform": None, "nothing merged": 1.0, f"keep {KEEP:g}": KEEP}
UNIFORM, NOTHING, MERGED = SIDES
# glibc keeps freed memory, as aptvit.measuring.timing.keep_freed_memory makes it, here for any checkout.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
PAUSE = 0.02  # seconds from the end of one process's work to the other's: threads go to sleep

Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="batch size and precision")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", default="vit_base_patch16_384", help="a name of timm")
    parser.add_argument("--name", default="against")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    checkouts = {"this": ROOT, "other": options.other.resolve()}
    for path in checkouts.values():
        if not (path / "src" / "aptvit" / "__init__.py").is_file():
            parser.error(f"{path} is no checkout of aptvit: there is no src/aptvit in it")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    workers: dict[str, Worker] = {}
    try:
        for name, path in checkouts.items():
            workers[name] = Worker(path, options.threads)
        environments = {name: worker.ask("start", "starting") for name, worker in workers.items()}
        cases = []
        for case in options.cases:
            cases.append(measure(workers, case, options.model, options.rounds))
            print(json.dumps(cases[-1]["summary"]), flush=True)
    except WorkerError as error:
        raise SystemExit(str(error)) from None
    finally:
        for worker in workers.values():
            worker.stop()
    record = {
        "command": f"python benchmarks/against.py {shlex.join(sys.argv[1:])}",
        "environment": environments["this"],
        "checkouts": {name: revision(path) for name, path in checkouts.items()},
        "model": options.model,
        "rounds": options.rounds,
        "cases": cases,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    text = as_markdown(record)
    (options.out / f"{options.name}.md").write_text(text)
    print(text)


def revision(path: Path) -> str:
    """The commit of a checkout, and whether files differ from it."""
    git = partial(subprocess.run, cwd=path, capture_output=True, text=True)
    commit = git(["git", "log", "-1", "--format=%h"])
    if commit.returncode:
        return "no git repository"
    changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", "src"]).stdout.strip()
    return commit.stdout.strip() + (" and changes" if changed else "")


# The process that asks


class WorkerError(RuntimeError):
    """A worker failed, or ended before it was told to."""


class Worker:
    """A process that imports aptvit from one checkout and does one thing at a time.

    Args:
        checkout: Whose ``src`` is imported.
        threads: Of its matrix products.
        script: What it runs, with ``--worker``.
    """

    def __init__(self, checkout: Path, threads: int, script: Path = Path(__file__)) -> None:
        self.checkout = checkout
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed in stop()
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            # -P: the folder of this script holds modules with names of their own, which nothing is to import.
            [sys.executable, "-P", str(script.resolve()), "--worker"],
            env={**os.environ, **ALLOCATOR, **counts, "PYTHONPATH": str(checkout / "src")},
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, method: str, doing: str, **arguments: Any) -> Any:
        """Let the worker do something, and wait for the answer.

        Args:
            method: Of what the worker runs, as of `CaseRunner`.
            doing: The same in words, for messages.
            arguments: Of the method.

        Raises:
            WorkerError: If it failed, or the worker ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process of {self.checkout} {self._end()} while {doing}{self._last_error()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"the process of {self.checkout} failed while {doing}: {answer['error']}")
        return answer["value"]

    def _end(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "was killed (signal 9, as when memory runs out)"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with suppress(BrokenPipeError):  # of a request that nobody read
                stream.close()


def measure(workers: dict[str, Worker], case: str, model: str, rounds: int) -> dict[str, Any]:
    """Seconds of all sides in both processes, and what follows from them.

    Args:
        workers: By the name of the checkout.
        case: A key of `CASES`.
        model: timm's name.
        rounds: Timed rounds.
    """
    prepared = {
        name: worker.ask("prepare", f"preparing {case}", model=model, **CASES[case]) for name, worker in workers.items()
    }
    seconds: dict[str, Seconds] = {name: {side: [] for side in SIDES} for name in workers}
    outside: dict[str, list[float]] = {name: [] for name in workers}
    for step in range(rounds):
        names = list(workers) if step % 2 == 0 else list(reversed(workers))
        for side in SIDES if step % 2 == 0 else reversed(SIDES):
            for name in names:
                time.sleep(PAUSE)
                seconds[name][side].append(workers[name].ask("run", f"timing {case}, {side}", side=side))
        for name in names:
            time.sleep(PAUSE)
            outside[name].append(workers[name].ask("outside", f"timing {case} without blocks"))
    images = NUM_SINGLE if CASES[case]["batch"] == 1 else CASES[case]["batch"]
    logits = [prepared[name].pop("logits") for name in workers]
    return {
        "case": case,
        **CASES[case],
        "images": images,
        "prepared": prepared,
        "seconds": seconds,
        "outside": outside,
        "largest_difference": {
            side: max(abs(a - b) for a, b in zip(*(values[side] for values in logits), strict=True)) for side in SIDES
        },
        "summary": summary(prepared, seconds, outside),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """The middle one, the smallest and the largest."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summary(
    prepared: dict[str, dict[str, Any]], seconds: dict[str, Seconds], outside: dict[str, list[float]]
) -> dict[str, Any]:
    """Ratios within a round, over all rounds.

    Args:
        prepared: What `CaseRunner.prepare` answered, by checkout.
        seconds: Of each round, by checkout and side.
        outside: What merging nothing costs outside the blocks in each round, in seconds, by checkout.
    """
    found: dict[str, Any] = {}
    for name, sides in seconds.items():
        uniform, flops = sides[UNIFORM], prepared[name]["gflops"]
        flop_ratio = flops[UNIFORM] / flops[MERGED]
        speedups = [before / after for before, after in zip(uniform, sides[MERGED], strict=True)]
        whole = statistics.median(uniform)
        found[name] = {
            "seconds": {
                side: {"least": min(times), "median": statistics.median(times)} for side, times in sides.items()
            },
            "overhead": spread([after / before - 1 for before, after in zip(uniform, sides[NOTHING], strict=True)]),
            "overhead_outside": spread([extra / whole for extra in outside[name]]),
            "speedup": spread(speedups),
            "flop_ratio": flop_ratio,
            "eta": spread([speedup / flop_ratio for speedup in speedups]),
            "eta_of_fastest": min(uniform) / min(sides[MERGED]) / flop_ratio,
        }
    found["this / other"] = {
        side: {
            **spread([ours / old for ours, old in zip(seconds["this"][side], seconds["other"][side], strict=True)]),
            "fastest": min(seconds["this"][side]) / min(seconds["other"][side]),
        }
        for side in SIDES
    }
    return found


def as_markdown(record: dict[str, Any]) -> str:
    """The record as one table."""
    lines = ["# Two checkouts beside each other on the CPU", "", "```", record["command"], "```", ""]
    lines += [f"- {key}: {value}" for key, value in record["environment"].items()]
    lines += [f"- {name}: {commit}" for name, commit in record["checkouts"].items()]
    lines += [
        f"- {record['model']}, random weights, {record['rounds']} rounds",
        "",
        "Seconds for each image: median (fastest). Shares and ratios are medians over rounds, with the smallest and",
        "the largest; those of the fastest rounds stand after a semicolon. eta = (time uniform / time adaptive) /",
        "(FLOPs uniform / FLOPs adaptive). The uniform model is the same code in both: its ratio shows the noise.",
        "",
        "| batch, precision | checkout | uniform | nothing merged | "
        f"{MERGED} | overhead, nothing merged | overhead outside the blocks | speed-up | FLOP ratio | eta |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in record["cases"]:
        label = f"{case['batch']}, {case['dtype']}"
        for name in record["checkouts"]:
            lines.append(f"| {label} | {name} | {_row(case['summary'][name], case['images'])} |")
        cells = [
            f"{_spread(ratio, '.3f')}; {ratio['fastest']:.3f}" for ratio in case["summary"]["this / other"].values()
        ]
        lines.append(f"| {label} | this / other | {' | '.join(cells)} | | | | | |")
    differences = [value for case in record["cases"] for value in case["largest_difference"].values()]
    lines += ["", f"Logits of the two checkouts differ by {max(differences):.2g} at most."]
    return "\n".join(lines) + "\n"


def _row(found: dict[str, Any], images: int) -> str:
    times = [f"{times['median'] / images:.4f} ({times['least'] / images:.4f})" for times in found["seconds"].values()]
    cells = [
        *times,
        _spread(found["overhead"], "+.2%"),
        _spread(found["overhead_outside"], "+.2%"),
        _spread(found["speedup"], ".3f"),
        f"{found['flop_ratio']:.3f}",
        f"{_spread(found['eta'], '.3f')}; {found['eta_of_fastest']:.3f}",
    ]
    return " | ".join(cells)


def _spread(found: dict[str, float], form: str) -> str:
    return f"{found['median']:{form}} ({found['least']:{form}} to {found['most']:{form}})"


# The processes that measure. Heavy libraries are imported there alone.


def work(make_runner: Callable[[], Any]) -> None:
    """Answer requests, one line of JSON each, until there are no more.

    Args:
        make_runner: Makes the object whose methods are asked for.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        runner: Any
        try:
            runner = make_runner()
        except Exception as error:
            runner = error
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if isinstance(runner, Exception):
                    raise runner
                answer = {"value": getattr(runner, request["method"])(**request["arguments"])}
            except Exception as error:  # whatever it is, the process that asked tells it
                first_line = next(iter(str(error).strip().splitlines()), "")
                answer = {"error": f"{type(error).__name__}: {first_line}"}
            print(json.dumps(answer), file=answers, flush=True)


@dataclass(frozen=True)
class Batches:
    """The images of a case, and the models that read them.

    Attributes:
        images: Normalised batches (B, 3, H, W), float32.
        sides: What runs a batch, by the name of the side.
        outside: The uniform model, and the adaptive one with nothing merged, without their blocks.
    """

    images: list[Any]
    sides: dict[str, Callable[[Any], Any]]
    outside: tuple[Callable[[Any], Any], Callable[[Any], Any]]


class CaseRunner:
    """The models of one case at a time, with aptvit as the checkout has it."""

    def __init__(self) -> None:
        import_checkout()  # both processes do it at the same time, before anything is asked
        import torch

        torch.set_grad_enabled(False)
        self._current: Batches | None = None

    def start(self) -> dict[str, str]:
        """Machine and versions, by label."""
        return environment()

    def prepare(self, model: str, batch: int, dtype: str) -> dict[str, Any]:
        """Build the models of a case, and run each once.

        Args:
            model: timm's name.
            batch: Images of a batch.
            dtype: Name of the precision.

        Returns:
            Operations of each side for an image, in 10^9; its tokens, the prefix included; the logits.
        """
        import timm
        import torch

        import aptvit

        self._current = None
        gc.collect()
        precision = getattr(torch, dtype)
        torch.manual_seed(0)
        # Counting operations fails on parameters that want a gradient.
        host = timm.create_model(model).eval().to(precision).requires_grad_(False)
        config = timm.data.resolve_model_data_config(host)
        images = _images(NUM_SINGLE if batch == 1 else batch, config)
        sides: dict[str, Callable[[Any], Any]] = {UNIFORM: lambda inputs: host(inputs.to(precision))}
        adaptive = {side: aptvit.adapt(host, keep=keep) for side, keep in SIDES.items() if keep is not None}
        sides.update(adaptive)
        stem = timm.create_model(model, depth=0).eval().to(precision).requires_grad_(False)
        outside = (lambda inputs: stem(inputs.to(precision)), aptvit.adapt(stem, keep=1.0))
        self._current = Batches(list(images.split(batch)), sides, outside)
        gflops, logits, tokens = {}, {}, {}
        for side, run in sides.items():
            run(self._current.images[0])  # what is derived from weights once is no part of an image's cost
            counts, outputs = zip(
                *(_count_flops(run, batch_images) for batch_images in self._current.images), strict=True
            )
            gflops[side] = sum(counts) / len(images) / 1e9
            logits[side] = torch.cat(outputs).float().flatten().tolist()
            self.run(side)
        for side, adapted in adaptive.items():
            layouts = [adapted.layout(batch_images) for batch_images in self._current.images]
            tokens[side] = sum(sum(layout.seqlens) for layout in layouts) / len(images)
        self.outside()
        return {"gflops": gflops, "tokens": tokens, "logits": logits}

    def run(self, side: str) -> float:
        """Seconds that a side takes for all batches."""
        assert self._current is not None
        return _seconds(self._current.sides[side], self._current.images)

    def outside(self) -> float:
        """Seconds for all batches that merging nothing takes outside the blocks: the median of some runs in turn."""
        assert self._current is not None
        uniform, adaptive = self._current.outside
        differences = []
        for number in range(NUM_OUTSIDE):
            if number % 2 == 0:
                before = _seconds(uniform, self._current.images)
                differences.append(_seconds(adaptive, self._current.images) - before)
            else:
                after = _seconds(adaptive, self._current.images)
                differences.append(after - _seconds(uniform, self._current.images))
        return statistics.median(differences)


def import_checkout() -> None:
    """Import the libraries, with aptvit of the checkout that this worker is for.

    Raises:
        ImportError: If it is another aptvit.
    """
    import timm  # noqa: F401
    import torch

    import aptvit

    checkout = Path(os.environ["PYTHONPATH"])
    assert aptvit.__file__ is not None
    if checkout not in Path(aptvit.__file__).resolve().parents:
        raise ImportError(f"aptvit comes from {aptvit.__file__}, not from {checkout}")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def environment() -> dict[str, str]:
    """Machine and versions, by label."""
    import timm
    import torch

    return {
        "device": f"cpu ({torch.get_num_threads()} threads)",
        "allocator": f"freed memory is kept ({' '.join(f'{key}={value}' for key, value in ALLOCATOR.items())})",
        "machine": f"{_processor()}, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _seconds(run: Callable[[Any], Any], batches: Sequence[Any]) -> float:
    start = time.perf_counter()
    for images in batches:
        run(images)
    return time.perf_counter() - start


def _count_flops(run: Callable[[Any], Any], images: Any) -> tuple[int, Any]:
    """Operations of one call, a multiply and an add are two; and what it returns."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # PyTorch does not count fused attention on the CPU.
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        output = run(images)
    return counter.get_total_flops(), output


def _images(count: int, config: dict[str, Any]) -> Any:
    """The middle squares of photos, as a model reads them. (count, 3, H, W) float32

    Args:
        count: How many.
        config: timm's data configuration of the model.
    """
    import numpy as np
    import torch
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    photos = [getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field")]
    photos += [*load_sample_images().images, np.stack([data.camera()] * 3, axis=-1)]
    side = config["input_size"][-1]
    images = []
    for number in range(count):
        photo = photos[number % len(photos)]
        length = min(photo.shape[:2])
        top, left = ((whole - length) // 2 for whole in photo.shape[:2])
        square = Image.fromarray(photo[top : top + length, left : left + length]).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return (torch.stack(images).float() / 255 - mean) / std


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work(CaseRunner)
    else:
        main()
