"Time until a model is good: a race for a validation perplexity, in which everything but the goal is free."
import math
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from common import make_parser, print_table, save
from transformers import TrainerCallback

from seqgpt.baselines import source_scores
from seqgpt.config import Config, preset, read_config
from seqgpt.corpora import write_digits
from seqgpt.markov import load_source, make_markov, write_markov
from seqgpt.resolving import load_data, load_vocab
from seqgpt.training import train

SOURCE = {"symbols": 64, "branching": 2, "concentration": 1.0, "max_length": 256} # its lowest perplexity is known
SEQUENCES = 10_000 # of that source

RECIPES = { # corpus to name to flags of `seqgpt train`
    "digits": {
        "the defaults": {},
        "quick": {"config": "quick", "eval_steps": 90},
        "record": {"config": "quick", "n_layer": 1, "n_embd": 256, "max_steps": 80, "eval_steps": 80},
    },
    "markov": {
        "the defaults": {"eval_steps": 200},
        "quick": {"config": "quick", "num_epochs": 1, "eval_steps": 100},
        "record": {"config": "quick", "n_layer": 2, "max_steps": 700, "eval_steps": 700},
    },
}


class StopAt(TrainerCallback):
    "Stops a training when it is good enough, and keeps what it has taken until then, or until the last validation."
    def __init__(self, target: float): self.target = target # a validation perplexity

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()
        self.processor_start = time.process_time()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        perplexity = metrics["eval_perplexity"]
        reached = perplexity <= self.target
        control.should_training_stop |= reached
        self.found = {"reached": reached, "seconds": time.perf_counter() - self.start,
                      "processor_seconds": time.process_time() - self.processor_start, "steps": state.global_step,
                      "tokens": state.num_input_tokens_seen, "perplexity": perplexity}


def write_source(
    corpus: str, # "digits" or "markov"
    folder: Path, # To write to
) -> str: # The command that writes the same
    "Writes one of the two corpora."
    if corpus == "digits":
        write_digits(folder)
        return in_shell("seqgpt corpus digits", {"out_dir": corpus})
    write_markov(folder, make_markov(**SOURCE), SEQUENCES)
    return in_shell("seqgpt corpus markov", {"out_dir": corpus, "num_sequences": SEQUENCES, **SOURCE})


def markov_target(
    config: Config, # Of a training on the sequences of the known source
) -> float:
    "A perplexity 2 % above the lowest possible one on the validation sequences."
    tokenizer = load_vocab(config)
    validation = load_data(config, tokenizer)[1].validation
    nats, _, tokens = source_scores(load_source(Path(config.data_path)), tokenizer, validation)["class inferred"].total
    return 1.02*math.exp(nats/tokens)


def bench_quality(
    folder: str | Path, # To work in
    recipes: dict = RECIPES, # Corpus to name to flags of `seqgpt train`
) -> dict: # `rows`, one for each corpus and recipe
    "Trains each recipe until it is good enough, or has come to its end."
    rows = []
    folder = Path(folder)
    for corpus, ways in recipes.items():
        written = write_source(corpus, folder/corpus)
        common = {"data_path": str(folder/corpus), "validation_fraction": 0.2 if corpus == "digits" else 0.05}
        for name, flags in ways.items():
            start = read_config(preset(flags["config"])) if "config" in flags else Config()
            own = {key: value for key, value in flags.items() if key != "config"}
            config = replace(start, **common, **own, output_dir=str(folder/f"{corpus}-{name}"),
                             cache_dir=str(folder/"cache"))
            target = 1.28 if corpus == "digits" else markov_target(config)
            stop = StopAt(target)
            train(config, [stop])
            command = in_shell("seqgpt train", {**flags, **common, "data_path": corpus})
            rows.append({"date": f"{datetime.now():%Y-%m-%d}", "threads": torch.get_num_threads(), "corpus": corpus,
                         "target": target, "name": name, "data": written, "command": command, **stop.found})
    return {"rows": rows}


def in_shell(command: str, flags: dict) -> str:
    "What to type."
    return " ".join([command, *(f"--{name} {value}" for name, value in flags.items())])


def clock(row: dict, key: str) -> str:
    "Minutes and seconds; `>` if the target had not been reached by then."
    more = "" if row["reached"] else "> "
    return f"{more}{int(row[key]//60)}:{row[key] % 60:04.1f}"


def show_quality(found: dict):
    "Prints it as a table for each corpus, with the commands."
    for corpus in dict.fromkeys(row["corpus"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["corpus"] == corpus]
        columns = [f"{corpus}, until PPL {rows[0]['target']:.4g}", "threads", "time", "of processors",
                   "times as soon", "steps", "tokens", "PPL"]
        slowest = rows[0]["processor_seconds"]
        print_table(columns, [[row["name"], row["threads"], clock(row, "seconds"), clock(row, "processor_seconds"),
                               f"{slowest/row['processor_seconds']:.0f}", f"{row['steps']:,}", f"{row['tokens']:,}",
                               f"{row['perplexity']:.4g}"] for row in rows])
        print(f"  {rows[0]['data']}")
        for row in rows: print(f"  {row['date']}, {row['name']}: {row['command']}")


def main(argv: list[str] | None = None):
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--corpora", nargs="+", choices=RECIPES, default=[*RECIPES], help="which races to run")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        found = bench_quality(folder, {corpus: RECIPES[corpus] for corpus in args.corpora})
    show_quality(found)
    save(args, found)


if __name__ == "__main__": main()
