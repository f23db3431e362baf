"""Writes events.tfevents, a small event file as TensorBoard's own writer makes it.

    pip install tensorboard==2.21.0
    python make_events.py

The messages are built from TensorBoard's own protocol buffers and framed by its RecordWriter, so
that the test that compares them with ours, byte by byte, rests on nothing of ours.
"""

from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

WALL_TIME = 1790000000.25


def event(step, **what):
    return event_pb2.Event(wall_time=WALL_TIME, step=step, **what)


def scalars(step, values):
    summary = summary_pb2.Summary()
    for tag, value in values:
        summary.value.add(tag=tag, simple_value=value)
    return event(step, summary=summary)


def text(step, tag, content):
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[content.encode()])
    tensor.tensor_shape.dim.add(size=1)
    plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=plugin, data_class=summary_pb2.DATA_CLASS_TENSOR
    )
    value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
    return event(step, summary=summary_pb2.Summary(value=[value]))


EVENTS = [
    event(0, file_version="brain.Event:2"),
    event(5, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)),
    scalars(
        5,
        [
            ("Loss/train", 2.0625),
            ("LR/learning_rate", 1e-4),
            ("Gradient/norm", 0.7),
            ("Throughput/tokens_per_second", 107.5),
            ("Throughput/steps_per_second", 0.5),
            ("Time/wait_seconds", 1.5),
            ("Time/epoch", 0.25),
            ("rewards/margins", -0.125),
        ],
    ),
    scalars(5, [("Loss/eval", 1.75), ("Loss/eval_best", 1.5), ("eval_rewards/margins", 0.5)]),
    text(5, "Sample/Why is the sky blue?", "    Why is the sky\n    blue?\n\n**goes on with**\n\n     Größe.\n"),
]

if __name__ == "__main__":
    path = Path(__file__).with_name("events.tfevents")
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for message in EVENTS:
            writer.write(message.SerializeToString(deterministic=True))
    print(path.name, path.stat().st_size, "bytes")
