"Requests answered in a second, and how long clients wait: `seqgpt serve` and `transformers serve`, by turns."
import csv
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from common import (
    ASKING,
    SYMBOLS,
    Setup,
    device,
    make_parser,
    make_setup,
    megabytes,
    peak_memory,
    print_left_out,
    print_table,
    rate,
    save,
)
from generation import endless_model, has_onnx, on_onnx_runtime
from tqdm import tqdm

from seqgpt.tokenizer import save_tokenizer

CLIENTS = (1, 32) # at once
TRANSFORMERS = "transformers serve, continuous batching"
LOCUSTFILE = """import json
from locust import FastHttpUser, task

class Client(FastHttpUser):
    @task
    def ask(self): self.client.post("/v1/completions", json=json.loads({body!r}), timeout=120)
"""


def last_line(log) -> str:
    "What a process wrote last."
    log.seek(0)
    return (log.read().strip().splitlines() or ["no message"])[-1][:200]


@contextmanager
def served(
    *command: str, # Of Python; `{port}` becomes a port that is free
    health: str, # Path that answers when it is ready
): # Its address and the number of its process
    "A server in a process of its own; raises `RuntimeError` with its last words if it ends."
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    words = [sys.executable, *(word.format(port=port) for word in command)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(words, stdout=log, stderr=log, env=env) as process:
        try:
            while not answers(f"http://127.0.0.1:{port}/{health}"):
                if process.poll() is not None: raise RuntimeError(last_line(log))
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", process.pid
        finally: process.kill()


def answers(url: str) -> bool:
    "Whether something is there."
    try: urlopen(url, timeout=60).close() # noqa: S310 (our own address)
    except OSError: return False
    return True


def ask_once(address: str, body: dict):
    "One request, as a warm-up."
    headers = {"Content-Type": "application/json"}
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), headers) # noqa: S310 (our own address)
    urlopen(request, timeout=120).read() # noqa: S310


def load(
    address: str, # Of the server
    body: dict, # Of the requests
    clients: int, # At once
    seconds: float,
) -> dict: # `requests` and `errors`, `requests_per_second`, and seconds: `p50` and `p99`
    "Has clients ask a server, each of them again as soon as it has its answer."
    how = ["--headless", "--csv", "found", "--exit-code-on-error", "0"]
    how += ["--host", address, "-u", str(clients), "-r", str(clients), "-t", f"{seconds:g}s"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder)/"ask.py").write_text(LOCUSTFILE.format(body=json.dumps(body)))
        command = [sys.executable, "-m", "locust", "-f", "ask.py", *how]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        with open(f"{folder}/found_stats.csv") as f: row = [*csv.DictReader(f)][-1]
    if not int(row["Request Count"]): raise RuntimeError(f"no answer within {seconds:g} seconds")
    return {"requests": int(row["Request Count"]), "errors": int(row["Failure Count"]),
            "requests_per_second": float(row["Requests/s"]), "p50": float(row["50%"])/1e3, "p99": float(row["99%"])/1e3}


def server_commands(
    setup: Setup, # With a corpus
) -> dict[str, tuple]: # Name to words of Python's command line, path of health, and body of a request
    "The servers, each started as a user does it."
    folder = f"{setup.folder}/served"
    onnx = f"{setup.folder}/onnx"
    model = endless_model(setup)
    body = {"prompt": f"<bos> {SYMBOLS[0]}", "max_tokens": setup.length - 2, "temperature": 0}
    paths = {"seqgpt": folder}
    model.save_pretrained(folder)
    save_tokenizer(setup.tokenizer(), folder)
    if has_onnx():
        save_tokenizer(setup.tokenizer(), onnx)
        paths |= {name: str(m.file) for name, m in on_onnx_runtime(model, onnx).items()}
    ours = ("-m", "seqgpt.cli", "serve", "--port", "{port}", "--model_path")
    theirs = ("-m", "transformers.cli.transformers", "serve", folder, "--device", device().type, "--host", "127.0.0.1",
              "--port", "{port}", "--continuous-batching", "--cb-max-memory-percent", "0.1") # its default: nearly all
    commands = {name: ((*ours, path), "healthz", body) for name, path in paths.items()}
    return commands | {TRANSFORMERS: (theirs, "health", body | {"model": folder})}


def summary(
    turns: list[dict], # Of `load`
    new: int, # Tokens in an answer
) -> dict:
    "The medians of what a server did in several turns, and how many requests there were in total."
    medians = {key: float(np.median([t[key] for t in turns])) for key in ("requests_per_second", "p50", "p99")}
    totals = {key: sum(t[key] for t in turns) for key in ("requests", "errors")}
    return {"tokens_per_second": rate([1/t["requests_per_second"] for t in turns], new), **medians, **totals}


def bench_serving(
    setup: Setup, # With a corpus
    rounds: int, # How often each server has its turn
    seconds: float, # A turn
    clients: tuple[int, ...] = CLIENTS, # At once
    names: list[str] | None = None, # Of servers; default: all
) -> dict: # `rows`, one for each server and number of clients; `left_out`, name to reason
    "Starts the servers, and has clients ask them by turns."
    if not importlib.util.find_spec("locust"):
        return {"rows": [], "left_out": {"serving": "not installed: pip install locust"}}
    rows = []
    running = {}
    left_out = {}
    if not has_onnx(): left_out["ONNX Runtime"] = "not installed: pip install 'seqgpt[onnx]'"
    with ExitStack() as stack:
        for name, (command, health, body) in tqdm(server_commands(setup).items(), desc="Serving, start", leave=False):
            if names and name not in names: continue
            try:
                address, process = stack.enter_context(served(*command, health=health))
                ask_once(address, body)
                running[name] = address, process, body
            except (RuntimeError, OSError) as e: left_out[name] = str(e)
        turns = {(name, n): [] for n in clients for name in running}
        with tqdm(total=rounds*len(turns), desc="Serving", unit="turn", leave=False) as bar:
            for _ in range(rounds):
                for name, n in turns:
                    address, _, body = running[name]
                    turns[name, n].append(load(address, body, n, seconds))
                    bar.update()
        for (name, n), found in turns.items():
            memory = peak_memory(running[name][1])
            rows.append({"name": name, "clients": n, **summary(found, setup.length - 2), "memory": memory})
    one = {row["name"]: row["requests_per_second"] for row in rows if row["clients"] == clients[0]}
    for row in rows: row["times_one"] = row["requests_per_second"]/one[row["name"]]
    return {"rows": rows, "left_out": left_out}


def show_serving(found: dict):
    "Prints it as a table."
    columns = ["serving", "clients", "requests/s", "× one client", "tokens/s", "p50", "p99", "errors", "memory"]
    rows = [[row["name"], row["clients"], f"{row['requests_per_second']:.2f}", f"{row['times_one']:.2f}",
             f"{row['tokens_per_second']['median']:,.0f}", f"{row['p50']:.2f} s", f"{row['p99']:.2f} s",
             f"{row['errors']} of {row['requests']}", megabytes(row["memory"])] for row in found["rows"]]
    print_table(columns, rows)
    print_left_out(found)


def main(argv: list[str] | None = None):
    parser = make_parser(__file__, __doc__, *ASKING, rounds=1)
    parser.add_argument("--seconds", type=float, default=30, help="of each turn")
    args = parser.parse_args(argv)
    with make_setup(args) as setup: found = bench_serving(setup, args.rounds, args.seconds)
    show_serving(found)
    save(args, found)


if __name__ == "__main__": main()
