"Tokens encoded in a second of the processor: seqgpt and `datasets`, with the same check of each line, to disk or not."
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
from common import make_parser, megabytes, peak_memory, positive, print_table, rate, save, speed, write_random
from datasets import Features, List, Value, load_dataset
from tqdm import tqdm

from seqgpt.encoding import read_corpus
from seqgpt.rows import EncodingOptions, encode_line, encoding_options
from seqgpt.sources import corpus_files
from seqgpt.streaming import Stream
from seqgpt.tokenizer import make_tokenizer

FEATURES = Features({"input_ids": List(Value("uint16")), "label": Value("string"), "begins": Value("bool"),
                     "digest": Value("int64"), "length": Value("int32")})


def encode_batch(
    batch: dict, # Columns, of which `lines` is made
    options: EncodingOptions,
) -> dict: # Columns of `FEATURES`
    "What `map` of `datasets` calls: seqgpt's rows of some lines, or of what some lines hold."
    lines = [text.encode() for text in batch["text"]] if "text" in batch else [{"tokens": t} for t in batch["tokens"]]
    rows = [row for line in lines for row in encode_line(line, options, Counter())]
    ids, *others = zip(*rows)
    columns = [[np.frombuffer(i, options.dtype) for i in ids], *map(list, others)]
    return dict(zip(FEATURES, columns))


def seqgpt_encodes(data, cache, options, tokenizer): return len(read_corpus(data, tokenizer, cache_dir=cache).dataset)


def map_encodes(kind, data, cache, options):
    found = load_dataset(kind, data_files=str(data/"sequences.jsonl"), split="train", cache_dir=cache)
    keywords = {"batched": True, "fn_kwargs": {"options": options}, "features": FEATURES}
    return len(found.map(encode_batch, remove_columns=found.column_names, **keywords))


def text_encodes(data, cache, options, tokenizer): return map_encodes("text", data, cache, options)


def json_encodes(data, cache, options, tokenizer): return map_encodes("json", data, cache, options)


def seqgpt_streams(data, cache, options, tokenizer):
    return sum(1 for _ in Stream(corpus_files(data), options, fraction=0).epoch(0))


def text_streams(data, cache, options, tokenizer):
    found = load_dataset("text", data_files=str(data/"sequences.jsonl"), split="train", streaming=True)
    found = found.shuffle(seed=0, buffer_size=1600)
    found = found.map(encode_batch, batched=True, remove_columns=["text"], fn_kwargs={"options": options})
    return sum(1 for _ in found)


CONTENDERS = {"seqgpt": seqgpt_encodes, 'datasets, "text" and map': text_encodes,
              'datasets, "json" and map': json_encodes, "seqgpt, streaming": seqgpt_streams,
              'datasets, "text", streaming': text_streams}


def processor_seconds() -> float:
    "What this process and those that it started have used so far."
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(
    name: str, # Of `CONTENDERS`
    data: Path, # The folder of a corpus
) -> dict[str, float]: # Sequences; seconds, of the processor and of the clock; MB of memory and on disk
    "One turn, in a process of its own."
    datasets.disable_progress_bars()
    tokenizer = make_tokenizer(json.loads((data/"vocab.json").read_text()))
    options = encoding_options(tokenizer)
    with tempfile.TemporaryDirectory(dir=data.parent) as cache:
        used = processor_seconds()
        start = time.perf_counter()
        sequences = CONTENDERS[name](data, cache, options, tokenizer)
        seconds = time.perf_counter() - start
        used = processor_seconds() - used
        disk = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())/1e6
    return {"sequences": sequences, "processor_seconds": used, "seconds": seconds,
            "memory": peak_memory(os.getpid()), "disk": disk}


def bench_encoding(
    data: Path, # The folder of a corpus
    tokens: int, # In it
    rounds: int, # How often each has its turn
) -> dict: # `corpus`, its size in MB; `rows`
    "Measures all by turns."
    turns = {name: [] for name in CONTENDERS}
    context = multiprocessing.get_context("spawn")
    for name in tqdm([*turns]*rounds, desc="Encoding", unit="turn", leave=False):
        with ProcessPoolExecutor(1, context) as alone: turns[name].append(alone.submit(measure, name, data).result())
    rows = []
    for name, found in turns.items():
        seconds = [turn["processor_seconds"] for turn in found]
        memory = max((turn["memory"] for turn in found if turn["memory"]), default=None)
        rows.append({"name": name, "sequences": found[0]["sequences"], "tokens_per_second": rate(seconds, tokens),
                     "memory": memory, "disk": found[0]["disk"], "processor_seconds": seconds,
                     "seconds": [turn["seconds"] for turn in found]})
    return {"corpus": (data/"sequences.jsonl").stat().st_size/1e6, "rows": rows}


def show_encoding(found: dict):
    "Prints it as a table."
    rows = [[row["name"], *speed(row["tokens_per_second"]), megabytes(row["memory"]), megabytes(row["disk"])]
            for row in found["rows"]]
    print_table(["encoding", "tokens/s", "quartiles", "memory", "on disk"], rows)
    print(f"The corpus itself has {megabytes(found['corpus'])}. Seconds are those of the processor.")


def main(argv: list[str] | None = None):
    parser = make_parser(__file__, __doc__, "rounds", "length", rounds=3, length=26)
    parser.add_argument("--sequences", type=positive, default=200_000, help="in the corpus")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)/"data"
        write_random(data, args.sequences, args.length)
        found = bench_encoding(data, args.sequences*args.length, args.rounds)
    show_encoding(found)
    save(args, found)


if __name__ == "__main__": main()
