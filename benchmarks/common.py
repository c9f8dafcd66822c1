"What the benchmarks share: flags, a corpus, taking turns, memory, tables and the results file."
import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import GPT2Config

from seqgpt.checks import InputError
from seqgpt.devices import pick_precision
from seqgpt.encoding import read_corpus
from seqgpt.model import make_config, new_model
from seqgpt.tokenizer import make_tokenizer

RESULTS = Path(__file__).parent/"results"
SYMBOLS = [f"s{k:03d}" for k in range(512)]
VOCAB = {s: i for i, s in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *SYMBOLS])}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------------------------------
# flags

FLAGS = {
    "rounds": (5, "how often each has its turn"),
    "steps": (5, "training steps in a turn"),
    "batch_size": (8, "sequences in a training batch"),
    "length": (258, "tokens in a sequence, <bos> and <eos> included"),
    "n_layer": (6, "blocks of the model"),
    "n_head": (8, "attention heads in a block; must divide n_embd"),
    "n_embd": (384, "dimensions of a token"),
}
ASKING = ("rounds", "length", "n_layer", "n_head", "n_embd") # flags of scripts that train nothing
SIZES = ("batch_size", "length", "n_layer", "n_head", "n_embd")


def positive(text: str) -> int:
    "The number that a flag gives; raises what argparse expects if it is below 1."
    value = int(text)
    if value < 1: raise argparse.ArgumentTypeError("must be at least 1")
    return value


def make_parser(
    script: str, # `__file__` of the script
    description: str,
    *names: str, # Of FLAGS
    **defaults: int, # Other defaults than those of FLAGS
) -> argparse.ArgumentParser:
    "A parser for some of the shared flags, and for the results file."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name in names:
        default, help_text = FLAGS[name]
        parser.add_argument(f"--{name}", type=positive, default=defaults.get(name, default), help=help_text)
    output = RESULTS/f"{Path(script).stem}.json"
    parser.add_argument("--output", type=Path, default=output, help="the results file, which is overwritten")
    return parser

# ---------------------------------------------------------------------------------------------------------------------
# what is trained and asked


@dataclass
class Setup:
    "The sizes that all share, and a folder for the corpus and for what they write."
    folder: str
    batch_size: int = 8 # Sequences in a batch
    length: int = 258 # Tokens in a sequence, <bos> and <eos> included
    n_layer: int = 6 # Blocks of the model
    n_head: int = 8 # Attention heads in a block
    n_embd: int = 384 # Dimensions of a token

    @property
    def tokens(self) -> int: return self.batch_size*self.length # in a batch
    @property
    def shape(self) -> dict: return {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd}

    def write(self):
        "Writes a corpus of a hundred batches; raises `InputError` if there is no model of this shape."
        if self.length < 3: raise InputError(f"length is {self.length}. It must be at least 3: <bos>, a symbol, <eos>.")
        make_config(self.tokenizer(), self.length, **self.shape)
        write_random(f"{self.folder}/data", 100*self.batch_size, self.length)
        return self

    def tokenizer(self): return make_tokenizer(VOCAB)

    def corpus(self):
        return read_corpus(f"{self.folder}/data", self.tokenizer(), self.length, cache_dir=f"{self.folder}/cache")

    def ids(self) -> torch.Tensor: # (sequences, length)
        return torch.tensor(np.array(self.corpus().dataset["input_ids"][:]), dtype=torch.long)

    def config(self, **fields) -> GPT2Config:
        "GPT-2 of this shape with Transformers' defaults."
        special = {"bos_token_id": 1, "eos_token_id": 2}
        return GPT2Config(vocab_size=len(SYMBOLS) + 4, n_positions=self.length, **self.shape, **special, **fields)

    def model(self):
        "seqgpt's model of this shape, untrained."
        return new_model(make_config(self.tokenizer(), self.length, **self.shape), 0)


def write_random(
    folder: str | Path, # Made if it is not there
    n: int, # Sequences
    length: int, # Tokens in each, <bos> and <eos> included
):
    "Writes a corpus of random sequences, in which the k-th symbol is k times as rare as the first."
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder/"vocab.json").write_text(json.dumps(VOCAB))
    weights = 1/np.arange(1, len(SYMBOLS) + 1)
    rng = np.random.default_rng(0)
    with open(folder/"sequences.jsonl", "w") as f:
        for start in range(0, n, 1000):
            rows = rng.choice(SYMBOLS, (min(1000, n - start), length - 2), p=weights/weights.sum())
            f.writelines(json.dumps({"tokens": row}) + "\n" for row in rows.tolist())


@contextmanager
def make_setup(
    args: argparse.Namespace, # With some of SIZES
): # A `Setup` with its corpus
    "The setup that the flags describe; its folder is gone at the end. Exits where there is no such model."
    sizes = {name: value for name, value in vars(args).items() if name in SIZES}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        setup = Setup(folder, **sizes)
        print(" ".join(f"{name}={value}" for name, value in sizes.items()), "\n")
        try: setup.write()
        except InputError as e: sys.exit(f"{Path(sys.argv[0]).name}: {e}")
        yield setup

# ---------------------------------------------------------------------------------------------------------------------
# the machine


def device() -> torch.device:
    "Where everything is measured: on the GPU if there is one."
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def precisions() -> list[str]: # fp32, and bf16 if the hardware has it
    "What can be measured here."
    return ["fp32", "bf16"] if pick_precision() == "bf16" else ["fp32"]


def processor() -> str:
    "The name of the processor."
    try: cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError: cpuinfo = ""
    named = re.search(r"^model name\s*:\s*(.+)", cpuinfo, re.M)
    return named[1] if named else platform.processor() or platform.machine()


def machine() -> dict[str, str | int]:
    "What it was measured on, and when."
    versions = {}
    for name in ("seqgpt", "torch", "transformers", "accelerate", "lightning", "x-transformers"):
        try: versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError: pass
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else device().type
    return {"processor": processor(), "accelerator": accelerator, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "system": platform.system(),
            "date": datetime.now().isoformat(" ", "minutes"), "python": platform.python_version(), **versions}


def peak_memory(
    process: int, # Its number
) -> float | None: # MB, or None if the system does not say
    "The most memory that a running process has had."
    try: status = Path(f"/proc/{process}/status").read_text()
    except OSError: return None
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])/1e3

# ---------------------------------------------------------------------------------------------------------------------
# time


def seconds_of(
    call, # A function without arguments
) -> float:
    "How long `call` takes."
    start = time.perf_counter()
    call()
    if torch.accelerator.is_available(): torch.accelerator.synchronize()
    return time.perf_counter() - start


def take_turns(
    calls: dict, # Name to function without arguments
    rounds: int, # How often each has its turn
    steps: int = 1, # Calls in a turn
    title: str = "", # Of the progress bar
) -> dict[str, list[float]]: # Name to the seconds of each call
    "Measures several functions by turns, so that what happens to the machine happens to all of them."
    seconds = {name: [] for name in calls}
    with tqdm(total=rounds*len(calls), desc=title, unit="turn", leave=False) as bar:
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name] += [seconds_of(call) for _ in range(steps)]
                bar.update()
    return seconds


def rate(
    seconds: list[float], # Of each call
    amount: float = 1, # What a call gets done, such as tokens
) -> dict[str, float]: # `median`, and the quartiles `low` and `high`
    "How much is done in a second."
    low, median, high = np.quantile(amount/np.array(seconds), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high}

# ---------------------------------------------------------------------------------------------------------------------
# tables and results


def print_table(
    columns: list[str],
    rows: list[list], # Of cells, as many as there are columns
):
    "Prints a table, the first column aligned left and the others right."
    rows = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print("  ".join(cells))


def print_left_out(found: dict):
    "Prints what could not be measured, and why."
    for name, why in found["left_out"].items(): print(f"{name}: {why}")


def speed(rate: dict[str, float]) -> list[str]:
    "The cells of a rate: median and quartiles."
    return [f"{rate['median']:,.0f}", f"{rate['low']:,.0f}-{rate['high']:,.0f}"]


def megabytes(amount: float | None) -> str: return "" if amount is None else f"{amount:,.0f} MB"


def save(
    args: argparse.Namespace, # Of the script
    found: dict,
):
    "Writes the machine, the flags and what was found to `args.output`."
    flags = {name: value for name, value in vars(args).items() if name != "output"}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"machine": machine(), "settings": flags, **found}, indent=1) + "\n")
    print(f"\nWrote {args.output}.")
