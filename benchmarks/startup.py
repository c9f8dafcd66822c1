"What one waits for at the start: imports, and the first training step, over the size of the corpus."
import os
import re
import subprocess
import sys
import tempfile
import termios
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import (
    FLAGS,
    Setup,
    make_parser,
    make_setup,
    megabytes,
    peak_memory,
    positive,
    print_table,
    save,
    seconds_of,
    take_turns,
    write_random,
)
from tqdm import tqdm

from seqgpt.encoding import read_corpus
from seqgpt.tokenizer import make_tokenizer

ENDLESS = 100_000 # steps: nobody waits for the end
SHORT = 66 # tokens in the sequences of the growing corpus


def first_step(
    *flags, # Of `seqgpt train`
) -> tuple[float, float | None]: # Seconds; MB of memory
    "How long it takes from the command to the first training step; raises `RuntimeError` if there is none."
    command = [sys.executable, "-m", "seqgpt.cli", "train", *map(str, flags), "--max_steps", str(ENDLESS),
               "--eval_steps", str(ENDLESS)]
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    terminal, its_end = os.openpty() # elsewhere no progress bar is shown
    termios.tcsetwinsize(its_end, (24, 80))
    shown = b""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=its_end, env=env)
    os.close(its_end)
    try:
        while not re.search(rb"\D[1-9]\d*/%d \[" % ENDLESS, shown):
            try: shown += os.read(terminal, 10_000)
            except OSError: # it has ended
                raise RuntimeError(f"seqgpt train failed: {shown.decode()[-200:]}") from None
        return time.perf_counter() - start, peak_memory(process.pid)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def bench_data(
    folder: str | Path, # To work in
    most_sequences: int, # Of the largest corpus
) -> dict: # `rows`, one for each number of sequences
    "Time and memory over the size of the corpus, with a model so small that only the data counts."
    rows = []
    folder = Path(folder)
    for n in tqdm([10**k for k in range(3, 10) if 10**k <= most_sequences], desc="Data", leave=False):
        data = folder/f"{n}"
        tokens = n*SHORT
        write_random(data, n, SHORT)
        tokenizer = make_tokenizer(data/"vocab.json")
        encode = seconds_of(partial(read_corpus, data, tokenizer, SHORT, cache_dir=data/"encoded"))
        flags = ["--data_path", data, "--cache_dir", data/"cache", "--max_length", SHORT, "--n_layer", 1,
                 "--n_head", 1, "--n_embd", 8, "--output_dir"]
        cold, memory = first_step(*flags, folder/f"runs/{n}_cold")
        warm, _ = first_step(*flags, folder/f"runs/{n}_warm")
        rows.append({"sequences": n, "tokens": tokens, "encode": encode, "tokens_per_second": tokens/encode,
                     "first_step": cold, "first_step_cached": warm, "memory": memory})
    return {"rows": rows}


def python(*args: str):
    "Runs Python with these arguments."
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)


def bench_startup(
    setup: Setup, # With a corpus
    rounds: int, # How often each has its turn
) -> dict: # `rows`
    "How long imports and the first training step take."
    def train():
        first_step("--data_path", f"{setup.folder}/data", "--cache_dir", f"{setup.folder}/cache",
                   "--max_length", setup.length, "--batch_size", setup.batch_size, "--n_layer", setup.n_layer,
                   "--n_head", setup.n_head, "--n_embd", setup.n_embd,
                   "--output_dir", tempfile.mkdtemp(dir=setup.folder))

    calls = {"seqgpt --help": partial(python, "-m", "seqgpt.cli", "--help"),
             "import seqgpt": partial(python, "-c", "import seqgpt"),
             "import torch": partial(python, "-c", "import torch"),
             "import Trainer": partial(python, "-c", "from transformers import Trainer"),
             "seqgpt train: first step": train}
    seconds = take_turns(calls, rounds, title="Start")
    return {"rows": [{"name": name, "median": float(np.median(s)), "seconds": s} for name, s in seconds.items()]}


def show_startup(found: dict):
    "Prints it as a table."
    rows = [[row["name"], *(f"{t:.2f}" for t in (row["median"], min(row["seconds"]), max(row["seconds"])))]
            for row in found["rows"]]
    print_table(["start", "seconds", "from", "to"], rows)


def show_data(found: dict):
    "Prints it as a table."
    columns = ["sequences", "tokens", "encoding", "tokens/s", "first step", "from the cache", "memory"]
    rows = [[f"{row['sequences']:,}", f"{row['tokens']:,}", f"{row['encode']:.2f} s",
             f"{row['tokens_per_second']:,.0f}", f"{row['first_step']:.1f} s", f"{row['first_step_cached']:.1f} s",
             megabytes(row["memory"])] for row in found["rows"]]
    print_table(columns, rows)


def main(argv: list[str] | None = None):
    parser = make_parser(__file__, __doc__, *(name for name in FLAGS if name != "steps"))
    parser.add_argument("--most_sequences", type=positive, default=1_000_000,
                        help="of the largest corpus (a million take 1 GB in the temporary folder)")
    args = parser.parse_args(argv)
    with make_setup(args) as setup:
        found = {"startup": bench_startup(setup, args.rounds),
                 "data": bench_data(f"{setup.folder}/grow", args.most_sequences)}
    show_startup(found["startup"])
    print()
    show_data(found["data"])
    save(args, found)


if __name__ == "__main__": main()
