#!/usr/bin/env python3
"""The whole job, side by side: Offshoot's two processes against Transformers + PEFT in one.

    python benches/whole_job.py [--python PYTHON_WITH_PEFT] [--rounds 3] [--steps 10] [...]

Both train LoRA (rank 8, all linear layers) on SmolLM2-135M-Instruct, on the same cores, with the
same text, in batches of 4 x 128 tokens. They run in turn, never at the same time, and the order
changes from round to round, so that a slow minute of the machine hits both. Offshoot runs as its
users run it: `offshoot serve` with layers 0 to 20 of 30 and `offshoot train`, over loopback.

Writes benches/runs/DATE-whole-job/: result.md (the table, the command, the machine) and raw.jsonl
(one line a run). Needs a release build and only the standard library; PEFT's side needs a Python
with torch, transformers and peft: `.venv` is made with the pinned versions unless --python names
one.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEMO = ROOT / ".demo"
PINNED = ["torch==2.11.0", "transformers==5.23.0", "peft==0.21.2", "gguf==0.19.0"]
SPLIT = ["--split-point-1=0", "--split-point-2=20"]
MB = 1e6


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--python", help="has torch, transformers, peft and gguf (default: .venv)")
    a.add_argument("--offshoot", default=str(ROOT / "target/release/offshoot"))
    a.add_argument("--dtypes", default="f32,bf16")
    a.add_argument("--rounds", type=int, default=3)
    a.add_argument("--steps", type=int, default=10, help="measured steps of one run")
    a.add_argument("--warm", type=int, default=3, help="steps before these")
    a.add_argument("--batch", type=int, default=4)
    a.add_argument("--seq", type=int, default=128)
    a.add_argument("--threads", type=int, default=2, help="cores, and threads of each process")
    a.add_argument("--out", help="folder for the record (default: benches/runs/DATE-whole-job)")
    return a.parse_args()


def python_with_peft(args):
    if args.python:
        return args.python
    python = ROOT / ".venv/bin/python"
    if not python.exists():
        print("making .venv with", ", ".join(PINNED))
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINNED], check=True)
    return str(python)


def prepare(python):
    """The model as a GGUF file and as the same weights for Transformers, and one long text."""
    gguf = subprocess.run(["cargo", "xtask", "fetch"], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE).stdout.strip().splitlines()[-1]
    folder = DEMO / "smollm2-hf"
    if not (folder / "config.json").exists():
        partial = DEMO / "smollm2-hf.partial"
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([python, "-W", "ignore", ROOT / "benches/peft_whole.py", "convert", gguf,
                        partial], check=True)
        partial.rename(folder)
    # It has no blank line, so that every sample but the last is full.
    return gguf, folder, DEMO / "scribe.txt"


class Process:
    """A process with a log, whose memory is read while it runs."""

    def __init__(self, command, cores, environment, folder, stdout=None):
        self.log = tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=stdout or self.log,
            stderr=self.log, env={**os.environ, **environment}, cwd=folder, text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores))

    def memory(self, field):
        try:
            status = pathlib.Path(f"/proc/{self.child.pid}/status").read_text()
        except OSError:
            return 0
        found = re.search(rf"^{field}:\s+(\d+) kB", status, re.M)
        return int(found[1]) * 1024 if found else 0

    def tail(self):
        self.log.seek(0)
        return self.log.read()[-3000:]

    def check(self):
        assert self.child.poll() in (None, 0), f"{self.child.args[:2]} failed:\n{self.tail()}"

    def stop(self):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(60)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


def run_peft(args, python, folder, text, dtype, cores):
    process = Process(
        [python, "-W", "ignore", ROOT / "benches/peft_whole.py", "train", "--model", folder,
         "--text", text, "--dtype", dtype, "--batch", args.batch, "--seq", args.seq,
         "--warm", args.warm, "--steps", args.steps, "--threads", args.threads],
        cores, {"OMP_NUM_THREADS": str(args.threads)}, ROOT, subprocess.PIPE)
    out, _ = process.child.communicate()
    process.check()
    return json.loads(out.strip().splitlines()[-1])


def wait_ready(server):
    """The port in the server's ready line."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        server.check()
        found = re.search(r"^ready grpc=\S+:(\d+)$", server.tail(), re.M)
        if found:
            return int(found[1])
        time.sleep(0.05)
    raise TimeoutError("the server was not ready within 120 s:\n" + server.tail())


def run_offshoot(args, gguf, text, dtype, cores):
    with tempfile.TemporaryDirectory(dir=DEMO) as scratch:
        scratch = pathlib.Path(scratch)
        environment = {"OMP_NUM_THREADS": str(args.threads)}
        server = Process(
            [args.offshoot, "serve", "--model-name", gguf, *SPLIT, "--dtype", dtype,
             "--host=127.0.0.1", "--port=0"],
            cores, environment, scratch)
        client = None
        try:
            port = wait_ready(server)
            n_steps = args.warm + args.steps
            command = [
                args.offshoot, "train", "--model-name", gguf, *SPLIT, "--server-host=127.0.0.1",
                f"--server-port={port}", "--lora-rank=8", "--lora-alpha=16", "--lora-dropout=0",
                f"--batch-size={args.batch}", f"--max-seq-length={args.seq}",
                "--learning-rate=1e-4", f"--max-steps={n_steps}", "--log-interval=1",
                f"--train-file={text}", f"--output-dir={scratch / 'out'}",
                f"--dtype={dtype}", f"--wire-dtype={dtype}"]
            client = Process(command, cores, environment, scratch)
            return watch(args, dtype, server, client, scratch / "out/metrics.jsonl")
        finally:
            if client:
                client.stop()
            server.stop()


def watch(args, dtype, server, client, metrics):
    """Notes when each step was written, by this process's clock, and both processes' memory."""
    came, losses, resident = [], [], {"server": [], "client": []}
    peak = {"server": 0, "client": 0}
    position, rest, read_memory_at = 0, "", 0.0
    while True:
        ended = client.child.poll() is not None
        if metrics.exists():
            with metrics.open() as f:
                f.seek(position)
                rest += f.read()
                position = f.tell()
            *lines, rest = rest.split("\n")
            now = time.perf_counter()
            for event in map(json.loads, lines):
                if event["event"] == "step":
                    came.append(now)
                    losses.append(event["loss"])
        if time.perf_counter() >= read_memory_at:
            read_memory_at = time.perf_counter() + 0.1
            for name, process in (("server", server), ("client", client)):
                # Zero once it ended: the last readings stand.
                peak[name] = max(peak[name], process.memory("VmHWM"))
                now_resident = process.memory("VmRSS")
                if now_resident and len(came) > args.warm:
                    resident[name].append(now_resident)
        if ended:
            break
        server.check()
        time.sleep(0.005)
    client.check()
    assert len(came) == args.warm + args.steps, f"{len(came)} steps were written:\n{client.tail()}"
    seconds = [b - a for a, b in zip(came, came[1:])][args.warm - 1:]
    return dict(
        side="offshoot", dtype=dtype, batch=args.batch, seq=args.seq, rank=8, threads=args.threads,
        step_seconds=[round(s, 4) for s in seconds], losses=[round(x, 4) for x in losses],
        memory={name: dict(resident=int(statistics.median(resident[name])), peak=peak[name])
                for name in resident})


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.M)
    total = re.search(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())
    flags = set(re.search(r"^flags\s*:\s*(.*)$", info, re.M)[1].split())
    wanted = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return (f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores "
            f"({', '.join(wanted)}), {int(total[1]) / 2**20:.0f} GiB, {platform.system()}")


def table(runs, tokens):
    """Medians over all measured steps of all rounds, and the ratio of the tokens per second."""
    rows = ["| dtype | side | steps/s | tokens/s | tokens/s by round | resident MB | peak MB |",
            "|---|---|---|---|---|---|---|"]
    speed = {}
    for dtype in dict.fromkeys(r["dtype"] for r in runs):
        for side in ("peft", "offshoot"):
            mine = [r for r in runs if (r["dtype"], r["side"]) == (dtype, side)]
            median = statistics.median([s for r in mine for s in r["step_seconds"]])
            rounds = [tokens / statistics.median(r["step_seconds"]) for r in mine]
            speed[dtype, side] = tokens / median
            parts = list(mine[0]["memory"])
            memory = {kind: " + ".join(
                f"{statistics.median([r['memory'][p][kind] for r in mine]) / MB:.0f}"
                for p in parts) for kind in ("resident", "peak")}
            label = side if len(parts) == 1 else f"{side} ({' + '.join(parts)})"
            rows.append(f"| {dtype} | {label} | {1 / median:.3f} | {tokens / median:.0f} | "
                        f"{', '.join(f'{x:.0f}' for x in rounds)} | {memory['resident']} | "
                        f"{memory['peak']} |")
    lines = ["", "| ratio of tokens per second | |", "|---|---|"]
    for dtype in dict.fromkeys(r["dtype"] for r in runs):
        lines.append(f"| offshoot / peft, {dtype} | "
                     f"{speed[dtype, 'offshoot'] / speed[dtype, 'peft']:.2f} |")
    if {("f32", "offshoot"), ("bf16", "offshoot")} <= speed.keys():
        lines.append(f"| offshoot bf16 / offshoot f32 | "
                     f"{speed['bf16', 'offshoot'] / speed['f32', 'offshoot']:.2f} |")
    return "\n".join(rows + lines)


def main():
    args = arguments()
    # A plain kill must not leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    python = python_with_peft(args)
    gguf, folder, text = prepare(python)
    assert pathlib.Path(args.offshoot).exists(), \
        f"no {args.offshoot}: run `cargo build --release -p offshoot` first"
    cores = set(sorted(os.sched_getaffinity(0))[:args.threads])
    date = datetime.date.today().isoformat()
    out = pathlib.Path(args.out or ROOT / f"benches/runs/{date}-whole-job")
    out.mkdir(parents=True, exist_ok=True)

    runs = []
    with (out / "raw.jsonl").open("w") as raw:
        for round_ in range(args.rounds):
            for dtype in args.dtypes.split(","):
                sides = [lambda: run_peft(args, python, folder, text, dtype, cores),
                         lambda: run_offshoot(args, gguf, text, dtype, cores)]
                for side in sides[::-1] if round_ % 2 else sides:
                    load = os.getloadavg()[0]
                    run = dict(round=round_, load_before=round(load, 2), **side())
                    runs.append(run)
                    raw.write(json.dumps(run) + "\n")
                    raw.flush()
                    median = statistics.median(run["step_seconds"])
                    print(f"round {round_} {run['side']:8} {dtype}: {median:.3f} s a step, "
                          f"{args.batch * args.seq / median:.0f} tokens/s, loss "
                          f"{run['losses'][0]} to {run['losses'][-1]}", flush=True)

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE).stdout.strip()
    options = " ".join(f"--{k} {v}" for k, v in vars(args).items()
                       if k in ("dtypes", "rounds", "steps", "warm", "batch", "seq", "threads"))
    result = f"""# The whole job against Transformers + PEFT, {date}

{table(runs, args.batch * args.seq)}

- Command: `python benches/whole_job.py {options}`
- Commit: {commit}
- Machine: {machine()}; both sides pinned to {args.threads} cores, {args.threads} threads a process
- Peer: {", ".join(PINNED)}
- Speeds are medians over the measured steps ({args.steps} of each run, {args.rounds} rounds in
  turn, after {args.warm} steps of warm-up). Resident is read during these steps, peak over the
  whole process.
- raw.jsonl has every step.
"""
    (out / "result.md").write_text(result)
    print("\n" + result)


if __name__ == "__main__":
    main()
