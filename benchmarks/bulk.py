"""`aptvit embed` on many images: killed again and again, broken files among them, its memory and its speed.

    python benchmarks/bulk.py photos/                  # 20,000 images cut out of these photos, 1 % broken; half an hour
    python benchmarks/bulk.py photos/ --only speed

Kills: one process, and Ray with two actors; SIGKILL at random times, of the process that was started and of its
workers; the rows beside those of a run that nobody disturbed. Speed: tokens per second beside a loop over the bare
model, on images that are decoded and packed already. Writes results/bulk-cpu.{json,md}.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from aptvit.bulk import Embedder, Job, Options, list_images
from aptvit.data import TokenBudgetBatcher
from aptvit.files.images import find_images, open_image
from aptvit.files.sample_photos import sample_photos
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.record import plain
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.measuring.tables import Columns, markdown_page, section
from aptvit.storage.writing import write_json

RESULTS = Path(__file__).parent / "results"
SMALL = "test_vit"  # timm's smallest: what is tried is not the model
PART = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, help="scikit-image's and scikit-learn's unless some are given")
    parser.add_argument("--only", choices=("kills", "speed"))
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10, help="of each of the two ways")
    parser.add_argument("--model", default="vit_base_patch16_224", help="whose speed is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("build") / "bulk")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    environment = prepare_machine("cpu")
    file = options.out / "bulk-cpu.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"commands": []}
    command = shlex.join(["python", "benchmarks/bulk.py", *sys.argv[1:]])
    record["commands"] = list(dict.fromkeys([*record["commands"], command]))
    record["environment"] = environment
    images = options.work / f"images-{options.images}"
    broken = make_images(options.photos, images, options.images)
    for name in (SMALL, options.model):
        write_weights(name, options.work)
    if options.only != "speed":
        record["kills"] = kills(images, options.work, options.kills, broken)
        write_json(file, record, indent=1)
    if options.only != "kills":
        record["speed"] = speed(images, options.work, options.model, options.rounds)
        write_json(file, record, indent=1)
    (options.out / "bulk-cpu.md").write_text(as_markdown(record), encoding="utf-8")
    print(as_markdown(record))


def write_weights(model: str, work: Path) -> None:
    """Random ones, but the same after each start."""
    torch.manual_seed(0)
    save_file(timm.create_model(model).state_dict(), work / f"{model}.safetensors")


def make_images(photos: list[Path], folder: Path, number: int) -> dict[str, int]:
    """Write images cut out of photos, one in a hundred broken; how many in which way."""
    told = folder.with_suffix(".json")
    if told.is_file():
        return dict(json.loads(told.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(0)
    opened = map(open_image, find_images(photos)) if photos else map(Image.fromarray, sample_photos().values())
    whole = [one.copy() for one in opened if min(one.size) > 300]
    broken: dict[str, int] = {}
    for i in range(number):
        image, side = rng.choice(whole), rng.randint(100, 300)
        left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
        content = io.BytesIO()
        image.crop((left, top, left + side, top + rng.randint(80, side))).save(content, "JPEG", quality=85)
        place = folder / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        way, break_it = WAYS[i // 100 % len(WAYS)] if i % 100 == 50 else ("", None)
        if break_it is None:
            place.write_bytes(content.getvalue())
        else:
            break_it(place, content.getvalue())
            broken[way] = broken.get(way, 0) + 1
    told.write_text(json.dumps(broken))
    return broken


def _dangling(place: Path, _content: bytes) -> None:
    place.symlink_to("nowhere.jpg")


def _written(made: Callable[[bytes], bytes]) -> Callable[[Path, bytes], None]:
    return lambda place, content: place.write_bytes(made(content)) and None


WAYS: list[tuple[str, Callable[[Path, bytes], None]]] = [
    ("empty", lambda place, _: place.touch()),
    ("cut in half", _written(lambda content: content[: len(content) // 2])),
    ("only a header", _written(lambda content: content[:20])),
    ("without its header", _written(lambda content: content[20:])),
    ("text", _written(lambda _: b"<html>404 Not Found</html>")),
    ("zeros", _written(lambda content: bytes(len(content)))),
    ("noise", _written(lambda content: random.Random(1).randbytes(len(content)))),
    ("gigantic", _written(lambda _: b"P6 40000 40000 255\n")),
    ("a link to nowhere", _dangling),
    ("an archive", _written(lambda content: b"PK\x03\x04" + content)),
]


@dataclass
class Watched:
    """What a command cost and how it fared.

    Attributes:
        seconds: Until it was done, kills and new starts included.
        starts: How often it was started.
        failed_starts: How often it gave up by itself.
        killed: SIGKILLs of the process that was started, and of its workers.
        memory: Resident memory of its processes together in MB, over time.
    """

    seconds: float = 0.0
    starts: int = 0
    failed_starts: int = 0
    killed: dict[str, int] = field(default_factory=lambda: {"driver": 0, "worker": 0})
    memory: list[float] = field(default_factory=list)


def kills(images: Path, work: Path, number: int, broken: dict[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {"images": len(list_images(str(images))), "broken": broken, "ways": {}}
    undisturbed = run_and_kill(images, work / "plain", [], 0)
    expected = rows(work / "plain")
    errors = expected["error"].notna()
    found["errors"], found["model"] = int(errors.sum()), SMALL
    found["undisturbed"] = {"seconds": undisturbed.seconds, "memory_mb": memory_over_time(undisturbed.memory)}
    for name, more in (("one process", []), ("Ray, two actors", ["--actors", "2"])):
        watched = run_and_kill(images, work / name.replace(", ", "-").replace(" ", "-"), more, number)
        ours = rows(work / name.replace(", ", "-").replace(" ", "-"))
        found["ways"][name] = {**vars(watched), "memory": max(watched.memory), **compare(ours, expected)}
    return found


def memory_over_time(samples: list[float]) -> list[float]:
    """The most in each fifth of the time."""
    return [float(max(part)) for part in np.array_split(np.array(samples), 5) if len(part)]


def run_and_kill(images: Path, out: Path, more: list[str], number: int) -> Watched:
    """Start the command until it is done; SIGKILL it, or one of its workers, at random times."""
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "aptvit", "embed", str(images), "--model", SMALL, "--thresholds", "5.0"]
    words += [
        "--checkpoint",
        str(out.with_name(f"{SMALL}.safetensors")),
        "--part-size",
        str(PART),
        "--out",
        str(out),
        *more,
    ]
    rng, watched, started = random.Random(0), Watched(), time.perf_counter()
    victims = ["driver", "worker"] * number if more else ["driver"] * number
    victims = victims[:number]
    parts, log = -(-len(list_images(str(images))) // PART), out.with_suffix(".log")
    while True:
        with log.open("wb") as said:
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        watched.starts += 1
        before = len(list(out.glob("part-*")))
        with _sampling(process.pid, watched.memory):
            while process.poll() is None:
                time.sleep(rng.uniform(0.2, 0.6))
                done = len(list(out.glob("part-*")))
                # spread over the job: each kill waits for its share of the parts
                due = victims and done >= before and done * (number + 1) >= parts * (number - len(victims) + 1)
                if due and process.poll() is None:
                    time.sleep(rng.uniform(0.0, 1.5))
                    victim = victims.pop(0)
                    pid = process.pid if victim == "driver" else _worker(process.pid, rng)
                    if pid is None:
                        victims.insert(0, victim)
                        continue
                    os.kill(pid, signal.SIGKILL)
                    watched.killed[victim] += 1
                    print(f"killed a {victim} at {done} of {parts} parts", file=sys.stderr, flush=True)
        if process.returncode in (0, 1) and len(list(out.glob("part-*"))) == parts:  # 1: some images are broken
            break
        if process.returncode != -signal.SIGKILL:  # Ray gives up if it needs more than 30 s to start
            watched.failed_starts += 1
            said = log.read_text(errors="replace")
            print(said.splitlines()[-1:], file=sys.stderr)
            if watched.failed_starts > 3:
                raise SystemExit(f"{shlex.join(words)} ended with {process.returncode}: {said}")
    watched.seconds = time.perf_counter() - started
    return watched


def _worker(pid: int, rng: random.Random) -> int | None:
    """One of Ray's processes that read or hold the model."""
    busy = [one for one in _family(pid) if b"ray::Map" in _command(one)]
    return rng.choice(busy) if busy else None


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _family(pid: int) -> list[int]:
    """A process and all below it; Ray's workers are below the processes that Ray starts."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


class _sampling:
    """Adds the resident memory of a process and all below it to a list, in MB, twice a second."""

    def __init__(self, pid: int, samples: list[float]) -> None:
        self._pid, self._samples, self._over = pid, samples, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._over.wait(0.5):
            total = 0
            for pid in _family(self._pid):
                try:
                    resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
                except OSError:
                    continue
                total += page * (int(resident) - int(shared))
            self._samples.append(total / 1e6)


def rows(out: Path) -> Any:
    table = pyarrow.dataset.dataset(str(out)).to_table()
    return table.to_pandas().sort_values("file").reset_index(drop=True)


def compare(ours: Any, expected: Any) -> dict[str, Any]:
    """Rows that are missing, doubled or different, and how different features are."""
    names, others = list(ours["file"]), list(expected["file"])
    same = names == others
    told: dict[str, Any] = {
        "missing": len(set(others) - set(names)),
        "doubled": len(names) - len(set(names)),
        "other_errors_or_tokens": None,
        "largest_difference": None,
    }
    if same:
        kept = ["width", "height", "tokens", "uniform_tokens", "error"]
        other = (ours[kept] != expected[kept]) & ~(ours[kept].isna() & expected[kept].isna())
        told["other_errors_or_tokens"] = int(other.any(axis=1).sum())
        good = expected["error"].isna() & ours["error"].isna()
        a, b = (np.stack(list(one["feature"][good])) for one in (ours, expected))
        told["largest_difference"] = float(np.abs(a - b).max())
    return told


def speed(images: Path, work: Path, model: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of a job in one process, beside the bare model on packs that lie ready."""
    options = Options(model, str((work / f"{model}.safetensors").resolve()), {"keep": 0.5})
    entries = [entry for entry in list_images(str(images)) if Path(entry.name).is_file()][: max(64 * rounds, 640)]
    embedder = Embedder(options)
    times: tuple[list[float], list[float]] = ([], [])
    tokens = 0
    shutil.rmtree(work / "speed", ignore_errors=True)
    listed = work / "speed.txt"
    sides = (lambda pair: _bare(embedder, pair[0]), lambda pair: _whole(embedder, pair[1]))
    for step in range(rounds + 1):  # the first warms up
        some = entries[64 * (step % rounds) : 64 * (step % rounds) + 64]
        listed.write_text("\n".join(entry.name for entry in some))
        job = Job(str(listed), options, str(work / "speed" / str(step)), 64)
        ready = [torch.from_numpy(image.pixels) for image in embedder.decoded(some, 2) if image.pixels is not None]
        with torch.inference_mode():
            packs = list(TokenBudgetBatcher(embedder.model, ready, options.max_tokens))
        seconds = interleaved([partial(side, (packs, job)) for side in sides], 1, "cpu", first=step)
        if step:
            for of_side, (taken,) in zip(times, seconds, strict=True):
                of_side.append(taken)
            tokens += sum(pack.layout.num_tokens for pack in packs)
    bare, whole = times
    return {
        "model": model,
        "images": 64 * rounds,
        "tokens_per_second_bare": tokens / sum(bare),
        "tokens_per_second": tokens / sum(whole),
        "share": plain(Ratio.of_rounds(bare, whole)),
        "on_ray": on_ray(entries, options, work, tokens / sum(bare)),
    }


@torch.inference_mode()
def _bare(embedder: Embedder, packs: list[Any]) -> None:
    """Blocks, embedding, scoring and head; nothing is read, decoded or written."""
    for pack in packs:
        embedder.model.forward_head(embedder.model.forward_features(pack.images), pre_logits=True)


def _whole(embedder: Embedder, job: Job) -> None:
    job.write(0, embedder.rows(embedder.decoded(job.part(0), 2)))


def on_ray(entries: list[Any], options: Options, work: Path, bare: float) -> dict[str, Any]:
    """Two actors, from when both are at work to the end."""
    import ray

    from aptvit.bulk import run_on_ray

    listed = work / "ray.txt"
    listed.write_text("\n".join(one.name for one in entries))
    job = Job(str(listed), options, str(work / "speed" / "ray"), 16)
    times: list[float] = []
    run_on_ray(job, actors=2, done=lambda _: times.append(time.perf_counter()))
    ray.shutdown()
    told = job.summary()
    first = len(times) // 4  # Ray starts its actors one after the other
    share = 1 - (first + 1) / len(times)
    rate = (told["tokens"] + told["images"]) * share / (times[-1] - times[first])
    return {"actors": 2, "tokens_per_second": rate, "share_of_bare": rate / bare}


def as_markdown(record: dict[str, Any]) -> str:
    columns: Columns = (
        ("", lambda row: row["name"]),
        ("SIGKILLs (driver, workers)", lambda row: f"{row['killed']['driver']}, {row['killed']['worker']}"),
        ("starts (given up)", lambda row: f"{row['starts']} ({row['failed_starts']})"),
        ("seconds", lambda row: f"{row['seconds']:.0f}"),
        ("memory, MB", lambda row: f"{row['memory']:.0f}"),
        ("missing", lambda row: str(row["missing"])),
        ("doubled", lambda row: str(row["doubled"])),
        ("other tokens or errors", lambda row: str(row["other_errors_or_tokens"])),
        ("largest difference of a feature", lambda row: f"{row['largest_difference']:.1e}"),
    )
    killed = speeds = ""
    if "kills" in record:
        found = record["kills"]
        ways = ", ".join(f"{name} {count}" for name, count in found["broken"].items())
        memory = ", ".join(f"{part:.0f}" for part in found["undisturbed"]["memory_mb"])
        about = (
            f"{found['images']:,} images, {sum(found['broken'].values())} of them broken ({ways}): {found['errors']} "
            f"rows with an error. {found['model']}, parts of {PART} images. Nothing disturbed the first run: "
            f"{found['undisturbed']['seconds']:.0f} s; the most memory of each fifth of that time was {memory} MB."
        )
        killed = section("Killed", about, columns, [{"name": name, **row} for name, row in found["ways"].items()])
    if "speed" in record:
        found, share = record["speed"], Ratio(**record["speed"]["share"])
        ray = found["on_ray"]
        speeds = (
            f"## Speed\n\n{found['model']}, half of the tokens, {found['images']} images, float32: the bare model on "
            f"images that are decoded and packed, {found['tokens_per_second_bare']:.0f} tokens/s; a job in one process "
            f"with reading, decoding and writing, {found['tokens_per_second']:.0f} tokens/s: {share:.1%} of it, "
            f"rounds in turn. Ray, {ray['actors']} actors, the last three quarters of 640 images: "
            f"{ray['tokens_per_second']:.0f} tokens/s, {ray['share_of_bare']:.1%}."
        )
    return markdown_page("Many images", record["commands"], record["environment"], killed, speeds)


if __name__ == "__main__":
    main()
