#!/usr/bin/env python3
"""What several microbatches in flight give over a slow network, without a trainer.

    python benches/overlap.py [--model MODEL] [--sizes 1x32,4x128] [--steps 3] [...]

One `offshoot serve`, and for each link (latency x bandwidth) one session of `offshoot bench` with 1,
2 and 4 of the 4 microbatches of each step in flight. The link is the bench's own proxy: it delays
every byte by the latency in each direction and lets no more through than the bandwidth. The client
computes nothing, so what is hidden is the wire alone; a trainer hides its own layers as well.

Writes benches/runs/DATE-overlap/: result.md and raw.jsonl (the JSON of each run). Needs a release
build and `cargo xtask fetch` (or --model), and only the standard library.
"""

import argparse
import datetime
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile

from whole_job import ROOT, Process, machine, wait_ready

ACCUMULATE = 4


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--offshoot", default=str(ROOT / "target/release/offshoot"))
    a.add_argument("--model", help="default: the demo's")
    a.add_argument("--split", default="2..20", help="the server's layers")
    a.add_argument("--dtype", default="f32", help="the trunk's")
    a.add_argument("--wire-dtype", default="bf16")
    a.add_argument("--sizes", default="1x32,4x128", help="sequences x tokens of a microbatch")
    a.add_argument("--latencies", default="0,5,50", help="ms, each way")
    a.add_argument("--bandwidths", default="0,1000,100", help="Mbit/s; 0: no bound")
    a.add_argument("--in-flight", default="1,2,4")
    a.add_argument("--rounds", type=int, default=1)
    a.add_argument("--steps", type=int, default=3, help=f"of {ACCUMULATE} microbatches")
    a.add_argument("--out", help="folder for the record (default: benches/runs/DATE-overlap)")
    return a.parse_args()


def measure(args, port, size, latency, bandwidth, in_flight, file):
    sequences, tokens = size.split("x")
    command = [args.offshoot, "bench", "--server", f"127.0.0.1:{port}", "--sessions=1",
               f"--sequences={sequences}", f"--tokens={tokens}", f"--in-flight={in_flight}",
               f"--accumulate={ACCUMULATE}", f"--latency-ms={latency}",
               f"--wire-dtype={args.wire_dtype}", f"--steps={args.steps}", "--warm-up=1",
               "--json", file]
    if float(bandwidth) > 0:
        command.append(f"--bandwidth-mbit={bandwidth}")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(pathlib.Path(file).read_text())


def table(args, runs):
    """One row for each link."""
    counts = args.in_flight.split(",")
    rows = ["| microbatch | Mbit/s | ms each way | "
            + " | ".join(f"{k} in flight, tokens/s" for k in counts) + " | "
            + " | ".join(f"{k} against {counts[0]}" for k in counts[1:]) + " |",
            "|" + "---|" * (2 + 2 * len(counts))]
    links = dict.fromkeys((r["size"], r["bandwidth"], r["latency"]) for r in runs)
    for size, bandwidth, latency in links:
        speed = {k: statistics.median(
            r["bench"]["tokens_per_second"] for r in runs
            if (r["size"], r["bandwidth"], r["latency"], r["in_flight"])
            == (size, bandwidth, latency, k)) for k in counts}
        name = "unbounded" if float(bandwidth) == 0 else bandwidth
        rows.append(f"| {size} | {name} | {latency} | "
                    + " | ".join(f"{speed[k]:.0f}" for k in counts) + " | "
                    + " | ".join(f"{speed[k] / speed[counts[0]]:.2f}" for k in counts[1:]) + " |")
    return "\n".join(rows)


def main():
    args = arguments()
    # A plain kill must not leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    assert pathlib.Path(args.offshoot).exists(), \
        f"no {args.offshoot}: run `cargo build --release -p offshoot` first"
    model = args.model or subprocess.run(
        ["cargo", "xtask", "fetch"], cwd=ROOT, check=True, text=True,
        stdout=subprocess.PIPE).stdout.strip().splitlines()[-1]
    first, last = args.split.split("..")
    date = datetime.date.today().isoformat()
    out = pathlib.Path(args.out or ROOT / f"benches/runs/{date}-overlap")
    out.mkdir(parents=True, exist_ok=True)
    cores = os.sched_getaffinity(0)
    runs = []
    with tempfile.TemporaryDirectory() as scratch, (out / "raw.jsonl").open("w") as raw:
        server = Process(
            [args.offshoot, "serve", "--model-name", model, f"--split-point-1={first}",
             f"--split-point-2={last}", "--dtype", args.dtype, "--host=127.0.0.1", "--port=0"],
            cores, {}, scratch)
        try:
            port = wait_ready(server)
            for _ in range(args.rounds):
                for size in args.sizes.split(","):
                    for bandwidth in args.bandwidths.split(","):
                        for latency in args.latencies.split(","):
                            for in_flight in args.in_flight.split(","):
                                bench = measure(args, port, size, latency, bandwidth, in_flight,
                                                os.path.join(scratch, "bench.json"))
                                run = dict(size=size, bandwidth=bandwidth, latency=latency,
                                           in_flight=in_flight, bench=bench)
                                runs.append(run)
                                raw.write(json.dumps(run) + "\n")
                                raw.flush()
                                print(f"{size}, {bandwidth} Mbit/s, {latency} ms, {in_flight} in "
                                      f"flight: {bench['tokens_per_second']:.0f} tokens/s",
                                      flush=True)
        finally:
            server.stop()

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE).stdout.strip()
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(args).items()
                       if v is not None and k not in ("offshoot", "model", "out"))
    result = f"""# Microbatches in flight over slow links, {date}

{table(args, runs)}

- Command: `python benches/overlap.py {options}`
- Commit: {commit}
- Machine: {machine()}
- One session, {ACCUMULATE} microbatches a step; the trunk has layers {args.split} in {args.dtype},
  {args.wire_dtype} travels. Latency is one way: a forward or backward takes two of them.
- raw.jsonl has the bench's JSON of every run.
"""
    (out / "result.md").write_text(result)
    print("\n" + result)


if __name__ == "__main__":
    main()
