#!/usr/bin/env python3
"""Four teams on one machine: four times Transformers + PEFT, or one trunk server and four clients.

    python benches/four_teams.py [--python PYTHON_WITH_PEFT] [--rounds 2] [--steps 6] [...]

Each team trains LoRA (rank 8, all linear layers) on SmolLM2-135M-Instruct with the same text, in
batches of 4 x 128 tokens, all teams at the same time and on the same cores. One side is a PEFT
process with the uncut model for each team; the other is one `offshoot serve` and an `offshoot
train` for each team, with all layers in the trunk (0..30) and with the usual split (2..20). The
sides run in turn, never at the same time, and their order changes from round to round.

Where there are more processes than cores every process gets one thread (OMP_NUM_THREADS=1), on both
sides: several busy thread pools on few cores are ruinous for either.

Tokens per second are those of all teams together, from when the last team has done its warm-up to
when the first has done its steps. Memory is the sum of the processes' PSS: pages that several map
count once. Writes benches/runs/DATE-four-teams/: result.md and raw.jsonl (one line a run). Needs a
release build; PEFT's side as in whole_job.py.
"""

import argparse
import bisect
import datetime
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from whole_job import DEMO, MB, PINNED, ROOT, Process, machine, prepare, python_with_peft, wait_ready

PSS_INTERVAL = 0.25


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--python", help="has torch, transformers, peft and gguf (default: .venv)")
    a.add_argument("--offshoot", default=str(ROOT / "target/release/offshoot"))
    a.add_argument("--teams", type=int, default=4)
    a.add_argument("--dtypes", default="f32,bf16")
    a.add_argument("--splits", default="0..30,2..20", help="the server's layers, one row each")
    a.add_argument("--rounds", type=int, default=2)
    a.add_argument("--steps", type=int, default=6, help="measured steps of each team in one run")
    a.add_argument("--warm", type=int, default=2, help="steps before these")
    a.add_argument("--batch", type=int, default=4)
    a.add_argument("--seq", type=int, default=128)
    a.add_argument("--cores", type=int, default=2)
    a.add_argument("--server-threads", type=int,
                   help="of the server, which computes for all teams (default: as many as cores)")
    a.add_argument("--threads", type=int,
                   help="of each process (default: 1 if there are more processes than cores)")
    a.add_argument("--out", help="folder for the record (default: benches/runs/DATE-four-teams)")
    return a.parse_args()


def pss(processes):
    """Bytes of all processes together; a page that several of them map counts once."""
    total = 0
    for process in processes:
        try:
            rollup = pathlib.Path(f"/proc/{process.child.pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) for line in rollup.splitlines()
                     if line.startswith("Pss:")) * 1024
    return total


class Team:
    """A trainer, and when its steps ended by the clock that all processes share."""

    def __init__(self, process, metrics=None):
        self.process = process
        self.metrics = metrics
        self.ends = []
        self.position, self.rest = 0, ""

    def poll(self):
        """Notes steps that were written since the last time. True once the process has ended."""
        ended = self.process.child.poll() is not None
        if self.metrics is not None and self.metrics.exists():
            with self.metrics.open() as f:
                f.seek(self.position)
                self.rest += f.read()
                self.position = f.tell()
            *lines, self.rest = self.rest.split("\n")
            now = time.monotonic()
            self.ends += [now for line in lines if json.loads(line)["event"] == "step"]
        return ended

    def finish(self):
        self.process.check()
        if self.metrics is None:
            self.process.log.seek(0)
            last = self.process.log.read().strip().splitlines()[-1]
            self.ends = json.loads(last)["step_ends"]


def progress(ends, at):
    """Steps done at a time between the first and the last end, with the share of the running one."""
    i = bisect.bisect_left(ends, at)
    if i == 0:
        return 1.0
    if i == len(ends):
        return float(len(ends))
    return i + (at - ends[i - 1]) / (ends[i] - ends[i - 1])


def watch(args, teams, others):
    """Waits for all teams. Gives tokens per second of all, and bytes while all were training."""
    processes = [team.process for team in teams] + others
    readings, read_at = [], 0.0
    while True:
        all_ended = all([team.poll() for team in teams])
        now = time.monotonic()
        if now >= read_at:
            read_at = now + PSS_INTERVAL
            readings.append((now, pss(processes)))
        if all_ended:
            break
        for process in processes:
            process.check()
        time.sleep(0.005)
    for team in teams:
        team.finish()
        assert len(team.ends) == args.warm + args.steps, \
            f"{len(team.ends)} steps were counted:\n{team.process.tail()}"
    begin = max(team.ends[args.warm - 1] for team in teams)
    end = min(team.ends[-1] for team in teams)
    steps = [progress(team.ends, end) - progress(team.ends, begin) for team in teams]
    assert end > begin and min(steps) >= 1, \
        f"the teams hardly trained at the same time ({steps} steps): use more --steps"
    while_training = [size for at, size in readings if begin <= at <= end]
    return dict(
        seconds=round(end - begin, 3), steps_by_team=[round(s, 2) for s in steps],
        tokens_per_second=sum(steps) * args.batch * args.seq / (end - begin),
        pss=int(statistics.median(while_training)), pss_peak=max(size for _, size in readings))


def run_peft(args, python, folder, text, dtype, threads, cores):
    command = [python, "-W", "ignore", ROOT / "benches/peft_whole.py", "train", "--model", folder,
               "--text", text, "--dtype", dtype, "--batch", args.batch, "--seq", args.seq,
               "--warm", args.warm, "--steps", args.steps, "--threads", threads]
    environment = {"OMP_NUM_THREADS": str(threads)}
    teams = [Team(Process(command, cores, environment, ROOT)) for _ in range(args.teams)]
    try:
        return dict(side="peft", dtype=dtype, threads=threads, **watch(args, teams, []))
    finally:
        for team in teams:
            team.process.stop()


def run_offshoot(args, gguf, text, dtype, split, threads, cores):
    server_threads = args.server_threads or len(cores)
    first, last = split.split("..")
    layers = [f"--split-point-1={first}", f"--split-point-2={last}"]
    environment = {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(dir=DEMO) as scratch:
        scratch = pathlib.Path(scratch)
        server = Process(
            [args.offshoot, "serve", "--model-name", gguf, *layers, "--dtype", dtype,
             "--host=127.0.0.1", "--port=0"], cores,
            {"OMP_NUM_THREADS": str(server_threads)}, scratch)
        teams = []
        try:
            port = wait_ready(server)
            for i in range(args.teams):
                out = scratch / f"team{i}"
                command = [
                    args.offshoot, "train", "--model-name", gguf, *layers,
                    "--server-host=127.0.0.1", f"--server-port={port}", "--lora-rank=8",
                    "--lora-alpha=16", "--lora-dropout=0", f"--batch-size={args.batch}",
                    f"--max-seq-length={args.seq}", "--learning-rate=1e-4",
                    f"--max-steps={args.warm + args.steps}", "--log-interval=1",
                    f"--train-file={text}", f"--output-dir={out}", f"--dtype={dtype}",
                    f"--wire-dtype={dtype}"]
                process = Process(command, cores, environment, scratch)
                teams.append(Team(process, out / "metrics.jsonl"))
            return dict(side=f"offshoot {split}", dtype=dtype, threads=threads,
                        **watch(args, teams, [server]))
        finally:
            for team in teams:
                team.process.stop()
            server.stop()


def table(runs):
    """Medians over the rounds, and what they are of PEFT's."""
    rows = ["| dtype | side | tokens/s in all | by round | PSS MB | peak PSS MB "
            "| tokens/s against PEFT | PSS against PEFT |", "|---|---|---|---|---|---|---|---|"]
    for dtype in dict.fromkeys(r["dtype"] for r in runs):
        mine = [r for r in runs if r["dtype"] == dtype]
        median = {}
        for side in sorted({r["side"] for r in mine}, key=lambda side: (side != "peft", side)):
            of_side = [r for r in mine if r["side"] == side]
            median[side] = {field: statistics.median(r[field] for r in of_side)
                            for field in ("tokens_per_second", "pss", "pss_peak")}
            m, peft = median[side], median["peft"]
            rounds = ", ".join(f"{r['tokens_per_second']:.0f}" for r in of_side)
            rows.append(
                f"| {dtype} | {side} | {m['tokens_per_second']:.0f} | {rounds} | "
                f"{m['pss'] / MB:.0f} | {m['pss_peak'] / MB:.0f} | "
                f"{m['tokens_per_second'] / peft['tokens_per_second']:.2f} | "
                f"{m['pss'] / peft['pss']:.2f} (peak {m['pss_peak'] / peft['pss_peak']:.2f}) |")
    return "\n".join(rows)


def main():
    args = arguments()
    # A plain kill must not leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    python = python_with_peft(args)
    gguf, folder, text = prepare(python)
    assert pathlib.Path(args.offshoot).exists(), \
        f"no {args.offshoot}: run `cargo build --release -p offshoot` first"
    cores = set(sorted(os.sched_getaffinity(0))[:args.cores])
    threads = args.threads or (1 if args.teams > len(cores) else len(cores))
    date = datetime.date.today().isoformat()
    out = pathlib.Path(args.out or ROOT / f"benches/runs/{date}-four-teams")
    out.mkdir(parents=True, exist_ok=True)

    def sides(dtype):
        yield lambda: run_peft(args, python, folder, text, dtype, threads, cores)
        for split in args.splits.split(","):
            yield lambda split=split: run_offshoot(args, gguf, text, dtype, split, threads, cores)

    runs = []
    with (out / "raw.jsonl").open("w") as raw:
        for round_ in range(args.rounds):
            for dtype in args.dtypes.split(","):
                for side in list(sides(dtype))[::-1 if round_ % 2 else 1]:
                    load = os.getloadavg()[0]
                    run = dict(round=round_, load_before=round(load, 2), **side())
                    runs.append(run)
                    raw.write(json.dumps(run) + "\n")
                    raw.flush()
                    print(f"round {round_} {run['side']:15} {dtype}: "
                          f"{run['tokens_per_second']:.0f} tokens/s in all, "
                          f"{run['pss'] / MB:.0f} MB", flush=True)

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE).stdout.strip()
    options = " ".join(f"--{k} {v}" for k, v in vars(args).items()
                       if v is not None and k not in ("python", "offshoot", "out"))
    result = f"""# {args.teams} teams on one machine, {date}

{table(runs)}

- Command: `python benches/four_teams.py {options}`
- Commit: {commit}
- Machine: {machine()}; all processes of a side pinned to the same {len(cores)} cores, {threads}
  threads a process on both sides, but {args.server_threads or len(cores)} for the server
- Peer: {", ".join(PINNED)}
- Every team has batches of {args.batch} x {args.seq} tokens of the same text. Tokens per second are
  those of all teams, while all of them were training; medians over {args.rounds} rounds in turn.
  PSS is the median of the sum over all processes in that time, peak that of the whole run.
- raw.jsonl has every run.
"""
    (out / "result.md").write_text(result)
    print("\n" + result)


if __name__ == "__main__":
    main()
