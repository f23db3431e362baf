"""Reads a run's event files with TensorBoard itself and compares them with its metrics.jsonl.

    pip install tensorboard
    python tests/development/read_tensorboard.py RUN [RUN ...]

RUN is the --output-dir of `offshoot train`, of a run that ended, was resumed or was killed, not of
one that is going on. Every
scalar of every step must come back, once, with the value that metrics.jsonl has, from both of
TensorBoard's readers: EventAccumulator, which is its Python one, and the program `tensorboard`
itself, which is started for the folder and asked over HTTP.
"""

import json
import struct
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Of a step and of an evaluation: TensorBoard's tag, and the field of metrics.jsonl.
STEP = {
    "Loss/train": "loss",
    "LR/learning_rate": "learning_rate",
    "Gradient/norm": "grad_norm",
    "Throughput/tokens_per_second": "tokens_per_second",
    "Throughput/steps_per_second": "steps_per_second",
    "Time/wait_seconds": "wait_seconds",
    "Time/epoch": "epoch",
}
EVAL = {"Loss/eval": "loss", "Loss/eval_best": "best"}
EVERYTHING = {"scalars": 0, "tensors": 0}


def f32(value):
    """As event files have it."""
    return struct.unpack("f", struct.pack("f", value))[0]


def expected(run):
    """Tag to its points, from metrics.jsonl."""
    curves = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        tags = {"step": STEP, "eval": EVAL}.get(event["event"], {})
        named = [(tag, event[field]) for tag, field in tags.items()]
        prefix = "eval_" if event["event"] == "eval" else ""
        named += [(prefix + name, value) for name, value in event.get("extra", {}).items()]
        for tag, value in named:
            curves.setdefault(tag, []).append((event["step"], f32(value)))
    return curves


def accumulated(folder):
    reader = EventAccumulator(str(folder), size_guidance=EVERYTHING).Reload()
    curves = {
        tag: [(point.step, point.value) for point in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }
    texts = {
        tag.removesuffix("/text_summary"): [point.tensor_proto.string_val[0].decode() for point in reader.Tensors(tag)]
        for tag in reader.Tags()["tensors"]
    }
    return curves, texts


def served(folder, tags):
    """What the web pages of TensorBoard would show."""
    board = program.TensorBoard()
    # Without sampling: by default 1000 points of a curve are shown.
    everything = "--samples_per_plugin=scalars=1000000"
    board.configure([None, f"--logdir={folder}", "--port=0", everything])
    url = board.launch()

    def points(tag):
        query = urllib.parse.urlencode({"run": ".", "tag": tag})
        with urllib.request.urlopen(f"{url}data/plugin/scalars/scalars?{query}") as answer:
            return [(step, value) for _, step, value in json.load(answer)]

    return {tag: points(tag) for tag in tags}


def compare(run):
    want = expected(run)
    assert want, f"{run}: no step and no evaluation in metrics.jsonl"
    found, texts = accumulated(run / "tensorboard")
    for reader, curves in (
        ("EventAccumulator", found),
        ("tensorboard", served(run / "tensorboard", want)),
    ):
        assert sorted(curves) == sorted(want), (reader, sorted(curves), sorted(want))
        for tag, points in want.items():
            assert curves[tag] == points, (reader, tag, curves[tag], points)
        n = sum(len(points) for points in curves.values())
        print(f"{run}: {reader} shows the {n} values of metrics.jsonl, in {len(curves)} curves")
    n_files = len(list((run / "tensorboard").iterdir()))
    print(f"{run}: {n_files} event files; last step {want['Loss/train'][-1]}; texts {texts}")


if __name__ == "__main__":
    runs = [Path(run) for run in sys.argv[1:]]
    if not runs:
        sys.exit(__doc__)
    for run in runs:
        compare(run)
