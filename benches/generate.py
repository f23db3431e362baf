#!/usr/bin/env python3
"""Time per token of generation: split through a server, whole in one process, and Transformers.

    python benches/generate.py [--python PYTHON_WITH_TRANSFORMERS] [--rounds 3] [...]

All three continue the same prompts of about 32 tokens by 64 tokens of SmolLM2-135M-Instruct, greedily
in float32, with key/value caches, on the same cores. They run in turn, never at the same time, and the
order changes from round to round. Split means `offshoot serve` with layers 2 to 26 of 30 and `offshoot
generate --server` over loopback. Each run's first prompt warms up and does not count.

Then 1, 4 and 8 clients generate at once through one server, one thread each: tokens per second of all
together, which the engine's batches of decode jobs decide. And once through a proxy that counts: the
bytes that a token costs on the socket, framing and all.

Writes benches/runs/DATE-generate/: result.md and raw.jsonl. Needs a release build, and for the peer
what whole_job.py needs.
"""

import argparse
import datetime
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading

from whole_job import DEMO, PINNED, ROOT, Process, machine, prepare, python_with_peft, wait_ready

SPLIT = ["--split-point-1=2", "--split-point-2=26"]
HIDDEN = 576
ROW_BYTES = 4 * HIDDEN


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--python", help="has torch and transformers (default: .venv)")
    a.add_argument("--offshoot", default=str(ROOT / "target/release/offshoot"))
    a.add_argument("--rounds", type=int, default=3)
    a.add_argument("--prompts", type=int, default=5, help="of one run, the first to warm up")
    a.add_argument("--tokens", type=int, default=64)
    a.add_argument("--clients", default="1,4,8")
    a.add_argument("--threads", type=int, default=2, help="cores, and threads of each process")
    a.add_argument("--out", help="folder for the record (default: benches/runs/DATE-generate)")
    return a.parse_args()


def read_prompts(text, n):
    """Passages of 25 words, some 32 tokens, from different places."""
    words = text.read_text(encoding="utf-8").split()
    stride = len(words) // n
    return [" ".join(words[i * stride:i * stride + 25]) for i in range(n)]


class Bench:
    def __init__(self, args, python, gguf, folder, prompts, scratch):
        self.args, self.python, self.gguf, self.folder = args, python, gguf, folder
        self.prompts, self.scratch = prompts, scratch
        self.cores = set(sorted(os.sched_getaffinity(0))[:args.threads])
        self.prompt_file = scratch / "prompts.json"
        self.prompt_file.write_text(json.dumps(prompts))

    def serve(self, threads, more=()):
        server = Process(
            [self.args.offshoot, "serve", "--model-name", self.gguf, *SPLIT, "--dtype=f32",
             "--host=127.0.0.1", "--port=0", f"--store-dir={self.scratch / 'store'}", *more],
            self.cores, {"OMP_NUM_THREADS": str(threads)}, self.scratch)
        try:
            return server, wait_ready(server)
        except BaseException:
            server.stop()
            raise

    def client(self, threads, more):
        prompts = [f"--prompt={prompt}" for prompt in self.prompts]
        n = self.args.tokens
        return Process(
            [self.args.offshoot, "generate", "--model-name", self.gguf, "--greedy", "--json",
             f"--min-tokens={n}", f"--max-tokens={n}", *prompts, *more],
            self.cores, {"OMP_NUM_THREADS": str(threads)}, self.scratch, subprocess.PIPE)

    def lines(self, process):
        out, _ = process.child.communicate()
        process.check()
        lines = [json.loads(line) for line in out.strip().splitlines()]
        assert len(lines) == len(self.prompts), process.tail()
        return lines

    def whole(self):
        return self.lines(self.client(self.args.threads, []))

    def split(self):
        server, port = self.serve(self.args.threads)
        try:
            return self.lines(self.client(self.args.threads, [f"--server=127.0.0.1:{port}"]))
        finally:
            server.stop()

    def peer(self):
        return self.lines(Process(
            [self.python, "-W", "ignore", ROOT / "benches/generate_peer.py", "--model", self.folder,
             "--prompts", self.prompt_file, "--tokens", self.args.tokens,
             "--threads", self.args.threads],
            self.cores, {"OMP_NUM_THREADS": str(self.args.threads)}, ROOT, subprocess.PIPE))

    def at_once(self, n):
        """Tokens per second of `n` clients together. First and last prompts do not count: not all
        clients are at work then."""
        server, port = self.serve(self.args.threads)
        clients = []
        try:
            clients = [self.client(1, [f"--server=127.0.0.1:{port}"]) for _ in range(n)]
            # Read beside each other: a full pipe would hold one back.
            results = [None] * n
            readers = [threading.Thread(target=lambda i=i: results.__setitem__(
                i, self.lines(clients[i]))) for i in range(n)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            assert all(results), "a client failed"
            return results
        finally:
            for client in clients:
                client.stop()
            server.stop()

    def bytes_on_the_socket(self):
        """What a token costs there and back, from the difference of a long and a short text."""
        server, port = self.serve(self.args.threads)
        try:
            counted = []
            for tokens in (1, self.args.tokens + 1):
                with Counter(port) as counter:
                    client = Process(
                        [self.args.offshoot, "generate", "--model-name", self.gguf, "--greedy",
                         "--json", f"--prompt={self.prompts[0]}", f"--min-tokens={tokens}",
                         f"--max-tokens={tokens}", f"--server=127.0.0.1:{counter.port}"],
                        self.cores, {"OMP_NUM_THREADS": str(self.args.threads)}, self.scratch,
                        subprocess.PIPE)
                    client.child.communicate()
                    client.check()
                counted.append(list(counter.bytes))
            return [(b - a) / self.args.tokens for a, b in zip(*counted)]
        finally:
            server.stop()


class Counter:
    """A proxy to a port of loopback that counts bytes each way: to the server, and from it."""

    def __init__(self, upstream):
        self.upstream, self.bytes = upstream, [0, 0]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.threads = []

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.close()
        for thread in self.threads:
            thread.join()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.upstream))
            for way, (a, b) in enumerate([(near, far), (far, near)]):
                a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                thread = threading.Thread(target=self.pump, args=(way, a, b), daemon=True)
                self.threads.append(thread)
                thread.start()

    def pump(self, way, source, target):
        try:
            while data := source.recv(1 << 16):
                self.bytes[way] += len(data)
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def milliseconds(lines):
    """Of each token after the first, without the prompt that warms up."""
    return [1000 / line["tokens_per_second"] for line in lines[1:]]


def compare(bench, raw):
    args, runs = bench.args, []
    for round_ in range(args.rounds):
        sides = ["split", "whole", "peer"]
        for side in sides[::-1] if round_ % 2 else sides:
            load = os.getloadavg()[0]
            lines = getattr(bench, side)()
            run = dict(round=round_, side=side, load_before=round(load, 2), lines=lines)
            runs.append(run)
            raw.write(json.dumps(run) + "\n")
            raw.flush()
            print(f"round {round_} {side:6} {statistics.median(milliseconds(lines)):.1f} ms a token",
                  flush=True)
    return runs


def table(runs, tokens):
    names = dict(split="split: server and client", whole="whole: one offshoot process",
                 peer="Transformers, uncut, with cache")
    rows = ["| | ms a token | by round | ms to the first token | tokens/s |", "|---|---|---|---|---|"]
    median = {}
    for side in ("split", "whole", "peer"):
        mine = [r for r in runs if r["side"] == side]
        median[side] = statistics.median([t for r in mine for t in milliseconds(r["lines"])])
        by_round = ", ".join(f"{statistics.median(milliseconds(r['lines'])):.1f}" for r in mine)
        first = statistics.median(
            [1000 * line["seconds_to_first_token"] for r in mine for line in r["lines"][1:]])
        rows.append(f"| {names[side]} | {median[side]:.1f} | {by_round} | {first:.0f} | "
                    f"{1000 / median[side]:.1f} |")
    ids = {side: [line["ids"] for r in runs if r["side"] == side for line in r["lines"]]
           for side in median}
    same = all(ids[side] == ids["peer"] for side in ids)
    rows += ["", "| ratio of the time per token | |", "|---|---|",
             f"| whole / Transformers | {median['whole'] / median['peer']:.2f} |",
             f"| split / Transformers | {median['split'] / median['peer']:.2f} |",
             f"| split / whole | {median['split'] / median['whole']:.2f} |", "",
             f"All three have drawn the same {tokens} tokens after each prompt: "
             f"{'yes' if same else 'NO'}."]
    return "\n".join(rows)


def many(bench, raw):
    rows = ["| clients at once | tokens/s together | tokens/s of one | against one client |",
            "|---|---|---|---|"]
    first = None
    for n in map(int, bench.args.clients.split(",")):
        results = bench.at_once(n)
        raw.write(json.dumps(dict(clients=n, results=[[
            {k: line[k] for k in ("tokens_per_second", "seconds_to_first_token", "seconds")}
            for line in lines] for lines in results])) + "\n")
        raw.flush()
        each = [statistics.median([line["tokens_per_second"] for line in lines[1:-1]])
                for lines in results]
        first = first or sum(each)
        rows.append(f"| {n} | {sum(each):.1f} | {statistics.median(each):.1f} | "
                    f"{sum(each) / first:.2f} |")
        print(f"{n} clients: {sum(each):.1f} tokens/s together", flush=True)
    return "\n".join(rows)


def main():
    args = arguments()
    assert args.prompts >= 3, "the first and the last prompt do not count"
    # A plain kill must not leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    python = python_with_peft(args)
    gguf, folder, text = prepare(python)
    assert pathlib.Path(args.offshoot).exists(), \
        f"no {args.offshoot}: run `cargo build --release -p offshoot` first"
    date = datetime.date.today().isoformat()
    out = pathlib.Path(args.out or ROOT / f"benches/runs/{date}-generate")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "raw.jsonl").open("w") as raw, tempfile.TemporaryDirectory(dir=DEMO) as scratch:
        bench = Bench(args, python, gguf, folder, read_prompts(text, args.prompts),
                      pathlib.Path(scratch))
        runs = compare(bench, raw)
        together = many(bench, raw)
        there, back = bench.bytes_on_the_socket()
        raw.write(json.dumps(dict(socket_bytes_there=there, socket_bytes_back=back)) + "\n")
    of_split = [line for r in runs if r["side"] == "split" for line in r["lines"]]
    payload = {way: statistics.median(
        [line[way] / (line["prompt_tokens"] + args.tokens - 1) for line in of_split])
        for way in ("sent_bytes", "received_bytes")}
    lengths = sorted({line["prompt_tokens"] for line in of_split})
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE).stdout.strip()
    options = " ".join(f"--{k} {v}" for k, v in vars(args).items()
                       if k in ("rounds", "prompts", "tokens", "clients", "threads"))
    result = f"""# Generation: split, whole, and Transformers, {date}

{table(runs, args.tokens)}

Several clients at once through one server, each with bottom and top of its own in one thread, the
trunk's decode jobs batched by the engine:

{together}

| bytes of a token (f32, H {HIDDEN}) | there | back |
|---|---|---|
| hidden states: one row is {ROW_BYTES} | {payload['sent_bytes']:.0f} | {payload['received_bytes']:.0f} |
| on the socket, framing and all | {there:.0f} | {back:.0f} |

- Command: `python benches/generate.py {options}`
- Commit: {commit}
- Machine: {machine()}; all pinned to {args.threads} cores, {args.threads} threads a process (clients at
  once: one thread each)
- Peer: {", ".join(PINNED)}
- Medians over {args.prompts - 1} prompts ({lengths[0]} to {lengths[-1]} tokens) of each of {args.rounds} rounds in
  turn; the first prompt of a run does not count. Greedy, float32, {args.tokens} tokens after each prompt.
- raw.jsonl has every text.
"""
    (out / "result.md").write_text(result)
    print("\n" + result)


if __name__ == "__main__":
    main()
