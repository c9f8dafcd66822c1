"""Numbers that go wrong, that repeat, and that take no more memory: training stops with advice, says what fits, and
gives the same numbers again."""
import contextlib
import gc
import json
import math
import re
import sys
import threading
import tracemalloc
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import psutil
import pytest
import torch
from conftest import NOTES, seqgpt, write_lines
from transformers import TrainerCallback

import seqgpt.training as T
from seqgpt.callbacks import Diverged
from seqgpt.checks import out_of_memory
from seqgpt.config import Config
from seqgpt.corpora import write_digits
from seqgpt.decoding import Decoder
from seqgpt.evaluation import evaluate
from seqgpt.inference import generate
from seqgpt.loading import load_model
from seqgpt.markov import make_markov, write_markov
from seqgpt.model import make_config, new_model
from seqgpt.resolving import load_data, load_vocab

SMALL = dict(n_layer=2, n_head=2, n_embd=32, batch_size=16, max_steps=60, eval_steps=30, precision="fp32")


@pytest.fixture
def undrawn(monkeypatch):
    "The curves of a training take longer than most of these trainings."
    monkeypatch.setattr(T, "save_curves", lambda *_: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    "Digits of 8x8 pixels, and a small model."
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder/"data", 8, 8)
    return Config(str(folder/"data"), output_dir=str(folder/"run"), cache_dir=str(folder/"cache"), max_length=66,
                    **SMALL)


@pytest.fixture(scope="module")
def sequences(config, tmp_path_factory):
    "The same for sequences of unequal lengths from a Markov source."
    folder = tmp_path_factory.mktemp("markov")
    source = make_markov(symbols=16, branching=3, classes=4, min_length=8, max_length=64)
    write_markov(folder/"data", source, 300)
    return replace(config, data_path=str(folder/"data"))


# --- a learning rate far too high

TOO_HIGH = [
    dict(learning_rate=1.0, max_steps=200),
    dict(learning_rate=10.0, optimizer="muon", precision="bf16"),
    dict(learning_rate=10.0, task="classification", logging_steps=1),
    dict(learning_rate=10.0, logging_steps=20, lr_scheduler_type="constant"),
    dict(learning_rate=1e3),
]


@pytest.mark.parametrize("settings", TOO_HIGH, ids=str)
def test_a_rate_far_too_high_is_stopped_early(settings, sequences, tmp_path, undrawn):
    config = replace(sequences, output_dir=str(tmp_path/"run"), **settings)
    with pytest.raises(Diverged, match="There was no good model yet") as e: T.train(config)
    # the writer of curves has been closed
    assert not [t for t in threading.enumerate() if "tensorboard" in type(t).__module__]
    advised = float(re.search(r"it was .*; try ([\d.e+-]+)\)", str(e.value))[1])
    assert len(str(e.value).splitlines()) == 2 and advised <= settings["learning_rate"]/10
    if "max_steps" not in settings: return
    T.train(replace(sequences, output_dir=config.output_dir, overwrite=True, learning_rate=advised, max_steps=100))


COMES_DOWN = [
    dict(learning_rate=0.1),
    dict(learning_rate=0.3, optimizer="muon"),
    dict(learning_rate=0.3, logging_steps=1),
    dict(learning_rate=0.1, task="classification", logging_steps=1, batch_size=1),
    dict(learning_rate=1e-2, model={"initializer_range": 2.0}, logging_steps=1),
]

@pytest.mark.parametrize("settings", COMES_DOWN, ids=str)
def test_what_comes_down_again_goes_on(settings, sequences, tmp_path, undrawn):
    T.train(replace(sequences, output_dir=str(tmp_path/"run"), **settings))


def test_the_best_model_is_kept_when_the_rate_rises_too_high(sequences, tmp_path, undrawn):
    class Raise(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step >= 40:
                for group in optimizer.param_groups: group["lr"] = 3.0
    config = replace(sequences, output_dir=str(tmp_path), learning_rate=1e-2, max_steps=200, eval_steps=20,
                     logging_steps=5)
    with pytest.raises(Diverged, match="The best model so far is kept"): T.train(config, [Raise()])
    assert json.loads((tmp_path/"best_model/metrics.json").read_text())["step"] == 40


def test_a_model_of_other_data_begins_high_and_may_go_on(sequences, tmp_path, undrawn):
    """Trained to be sure of one order, it warms up for long on data of the opposite order: far above blind guessing,
    but not above its beginning."""
    for name, notes in (("up", NOTES), ("down", NOTES[::-1])):
        write_lines(tmp_path/name, [{"tokens": (notes*4)[k % 5:k % 5 + 10]} for k in range(40)])
    first = replace(sequences, data_path=str(tmp_path/"up/data.jsonl"), output_dir=str(tmp_path/"first"),
                    max_length=16, learning_rate=1e-2, max_steps=100)
    T.train(first)
    other = replace(first, data_path=str(tmp_path/"down/data.jsonl"), init_from=str(tmp_path/"first/best_model"),
                    output_dir=str(tmp_path/"other"), learning_rate=1e-4, max_steps=70, warmup_steps=1000,
                    logging_steps=1)
    losses = [log["loss"] for log in T.train(other).history if "loss" in log]
    assert min(losses) > 2*math.log(9)
    high = replace(other, output_dir=str(tmp_path/"high"), learning_rate=30.0, warmup_steps=0)
    with pytest.raises(Diverged): T.train(high)


def test_sequences_learned_by_heart_are_no_divergence(tmp_path, undrawn):
    rng = np.random.default_rng(0)
    write_lines(tmp_path, [{"tokens": rng.choice(NOTES, 12).tolist()} for _ in range(10)])
    config = Config(str(tmp_path/"data.jsonl"), output_dir=str(tmp_path/"run"), cache_dir=str(tmp_path/"cache"),
                      max_length=16, learning_rate=1e-2, n_layer=2, n_head=2, n_embd=32, logging_steps=1,
                      num_epochs=300, eval_steps=100, validation_fraction=0.5)
    run = T.train(config)
    assert run.history[-2]["eval_loss"] > 2*math.log(9) # the validation loss is far above blind guessing


# --- memory that runs out

OUT = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = "" # the memory of a GPU would not run out
import contextlib, re, resource, sys, tempfile, psutil
from seqgpt.cli import main
import seqgpt.training as T
from seqgpt.config import Config

def child(call):
    "Exit code and standard error of a process of its own, which has what is loaded here."
    with tempfile.TemporaryFile("w+") as said:
        if (pid := os.fork()) == 0:
            with contextlib.redirect_stderr(said): code = call()
            said.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return code, said.read()

config = Config("data", cache_dir="cache", output_dir="first", max_length=66, precision="fp32", max_steps=2,
                  n_layer=2, n_head=2, n_embd=64, batch_size=2)
T.save_curves = lambda *_: None # to draw takes long
T.train(config) # everything is loaded
limit = psutil.Process().memory_info().vms + 150*2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
flags = ("train --data_path data --cache_dir cache --max_length 66 --precision fp32 --max_steps 2 "
         "--n_layer 2 --n_head 2").split()
large = "--n_embd 64 --batch_size 160 --gradient_accumulation_steps 3".split()
code, said = child(lambda: main([*flags, *large]))
assert code == 1 and len(said.strip().splitlines()) == 2, said
size, parts = map(int, re.search(r"--batch_size (\\d+) --gradient_accumulation_steps (\\d+):", said).groups())
assert 1 < size < 160 and size*parts == 480, said
code, said = child(lambda: main([*flags, "--batch_size", "1", "--n_embd", "1024", "--overwrite"]))
assert code == 1 and "--batch_size 1 is the least there is" in said and "--n_embd" in said, said
"""


def test_out_of_memory_says_what_to_lower(config, tmp_path, forks):
    (tmp_path/"data").symlink_to(config.data_path)
    ran = forks(cwd=tmp_path, code=OUT)
    assert ran["passed"], ran["printed"]


def no_memory_on_cpu():
    "PyTorch's own error."
    with pytest.raises(RuntimeError) as e: torch.empty(2**60, dtype=torch.uint8)
    return e.value


NO_MEMORY = {
    "python": MemoryError(), "cpu": no_memory_on_cpu(),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "oneDNN": RuntimeError("could not create a primitive"),
}


@pytest.mark.parametrize("verb, setting", {"evaluate": "--batch_size", "infer": "--num_samples"}.items())
@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_out_of_memory_names_the_setting_of_the_verb(verb, setting, error, monkeypatch, tmp_path):
    def run_out(*args): raise error
    monkeypatch.setattr("seqgpt.cli.run_verb", run_out)
    result = seqgpt(verb, "--model_path", "x", cwd=tmp_path)
    assert result.returncode == 1 and out_of_memory(error)
    assert f"seqgpt {verb}: out of memory" in result.stderr and setting in result.stderr


# --- the same numbers again

def numbers(run):
    "What was logged, without the times."
    return [{k: v for k, v in log.items() if not re.search("runtime|per_second", k)} for log in run.history]


# any two settings together
@pytest.mark.parametrize("task, optimizer, precision", [
    ("clm", "adamw", "fp32"),
    ("clm", "muon", "bf16"),
    ("classification", "adamw", "bf16"),
    ("classification", "muon", "fp32"),
])
def test_training_gives_the_same_numbers_again(task, optimizer, precision, sequences, tmp_path, undrawn):
    same = replace(sequences, task=task, optimizer=optimizer, precision=precision, max_steps=8, eval_steps=4,
                   gradient_accumulation_steps=2, learning_rate=1e-3)
    first, second = (T.train(replace(same, output_dir=str(tmp_path/name))) for name in "ab")
    assert numbers(first) == numbers(second)
    for place in ("best_model", "final_model"):
        assert len({(run.output_dir/place/"model.safetensors").read_bytes() for run in (first, second)}) == 1
    if task != "clm": return
    assert numbers(T.train(replace(same, output_dir=str(tmp_path/"other"), seed=43))) != numbers(first)


def test_threads_and_batches_change_only_the_last_digits(sequences, tmp_path, undrawn):
    same = replace(sequences, max_steps=8, eval_steps=4, learning_rate=1e-3)
    threads = torch.get_num_threads()
    one = T.train(replace(same, output_dir=str(tmp_path/"one"))).history
    torch.set_num_threads(3 - threads if threads < 3 else 1)
    try: other = T.train(replace(same, output_dir=str(tmp_path/"other"))).history
    finally: torch.set_num_threads(threads)
    def losses(history): return [log["eval_loss"] for log in history if "eval_loss" in log]
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    model = load_model(tmp_path/"one/best_model")
    tokenizer = load_vocab(same)
    held_out = load_data(same, tokenizer)[1].validation
    def nats(batch_size): return evaluate(model, tokenizer, held_out, batch_size, num_samples=0).scores.total[0]
    assert nats(1) == pytest.approx(nats(16), rel=1e-6)


# --- memory over a long time

def rss():
    "In MB; it also depends on what else the machine does: only for long runs."
    return psutil.Process().memory_info().rss / 2**20


def tensors():
    "How many tensors are alive."
    gc.collect()
    return sum(type(o) in (torch.Tensor, torch.nn.Parameter) for o in gc.get_objects())


@contextlib.contextmanager
def kept():
    """A list that gets the bytes of all objects and arrays that are kept of what is done; as many tensors are alive at
    the end as before."""
    found = []
    before = tensors()
    tracemalloc.start()
    try:
        yield found
        assert tensors() == before
        found.append(tracemalloc.get_traced_memory()[0])
    finally: tracemalloc.stop()


@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_stays_flat_in_training(steps, sequences, tmp_path):
    class Watch(TrainerCallback):
        seen = {}
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 100: return
            self.seen[state.global_step] = tensors(), sys.getallocatedblocks(), rss()
    tiny = replace(sequences, output_dir=str(tmp_path), n_layer=1, n_embd=16, batch_size=4, max_steps=steps,
                   eval_steps=100)
    watch = Watch()
    T.train(tiny, [watch])
    first, *_, last = [watch.seen[s] for s in watch.seen if s >= 200] # what is made once has been made
    # a batch has some tensors, no matter how many steps; what is written down takes three objects a step
    assert last[0] - first[0] < 20 and last[1] - first[1] < 10*(steps - 200), watch.seen
    if steps == 10_000: # it takes 0.3 KB a step
        most = max(watch.seen[s][2] for s in watch.seen if s > 1000)
        assert most - watch.seen[1000][2] < 1.5 + 0.0005*(steps - 1000), watch.seen # MB
    assert not plt.get_fignums()


@pytest.mark.parametrize("number", [2000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_memory_stays_flat_in_evaluation(number, sequences):
    tokenizer = load_vocab(sequences)
    dataset = load_data(sequences, tokenizer)[0].dataset
    model = new_model(make_config(tokenizer, 64, 1, 2, 16), seed=0).eval()
    def much(n):
        rows = np.resize(np.arange(len(dataset)), n)
        return evaluate(model, tokenizer, dataset.select(rows), 64, num_samples=0)
    first = much(number)
    before = rss()
    with kept() as found: second = much(number) # next to what is kept of the first
    # 24 bytes a sequence for its sums, and its label; the losses of its tokens would be several hundred
    assert found[0] < 50_000 + 100*number
    if number == 200_000: assert rss() - before < 1 + 150e-6*number # MB
    assert first.scores.by_sequence.nbytes == second.scores.by_sequence.nbytes == 24*number


def test_memory_stays_flat_in_generation(sequences):
    tokenizer = load_vocab(sequences)
    model = new_model(make_config(tokenizer, 64, 1, 2, 16), seed=0).eval()
    def draw(batches, rounds):
        generate(model, tokenizer, num_samples=32*batches)
        decoder = Decoder(model)
        ids = torch.full((32, 64), tokenizer.bos_token_id)
        for k in range(rounds): decoder(ids[:, :1 + k % 63])
    draw(1, 70)
    with kept() as found: draw(3, 130)
    assert found[0] < 100_000 # a batch has 32*64 numbers for each symbol
