"The benchmarks: all contenders are there, and all do the same work. No speed is asserted."
import importlib
import json
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, redirect
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

from seqgpt.cli import main
from seqgpt.config import Config
from seqgpt.devices import pick_precision
from seqgpt.training import train

sys.path.insert(0, str(ROOT/"benchmarks"))
import common
import contenders
import encoding
import quality
import serving
import startup
import training
import tricks

SIZES = "--rounds 1 --length 34 --n_layer 1 --n_head 2 --n_embd 16".split()
BATCH = ["--batch_size", "2"]
STEPS = [*BATCH, "--steps", "2"]
FLAGS = {"training": STEPS, "small_models": STEPS, "tricks": STEPS, "lengths": [*STEPS, "--longest", "64"],
         "encoding": ["--sequences", "1000"], "evaluation": BATCH, "generation": [], "serving": [],
         "startup": [*BATCH, "--most_sequences", "1000"]}
EXTRA = {"x-transformers": "x_transformers", "Lightning": "lightning"}


def no_compiler(function): raise RuntimeError("no compiler\nhere")


class Idle:
    "A contender without a process: what each does has a test of its own, and so has the process."
    def __init__(self, name, setup): self.parameters = 5000
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def __call__(self): time.sleep(0.02)
    def memory(self): return 100.0


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "All scripts but `quality`, small, without the extra packages: name to results file and what was printed."
    folder = tmp_path_factory.mktemp("bench")
    find = importlib.util.find_spec
    missing = {*EXTRA.values(), "locust"}
    first_steps = iter([startup.first_step]) # one real run of the command
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
        patch.setattr(torch, "compile", no_compiler)
        patch.setattr(training, "Contender", Idle)
        patch.setattr(startup, "first_step", lambda *flags: next(first_steps, lambda *_: (0.1, 100.0))(*flags))
        patch.setattr(startup, "python", lambda *args: time.sleep(0.001)) # imports
        patch.setattr(encoding, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
        for name, flags in FLAGS.items():
            output = folder/f"{name}.json"
            sizes = SIZES[:4] if name == "encoding" else SIZES # it has no model
            with redirect(None) as (said, _):
                importlib.import_module(name).main([*sizes, *flags, "--output", str(output)])
            found[name] = json.loads(output.read_text()), said.getvalue()
    return found


def rows(results, name): return results[name][0]["rows"]


def test_every_script_writes_its_results(results):
    assert {p.stem for p in (ROOT/"benchmarks").glob("*.py")} == {"common", "contenders", "quality", *FLAGS}
    assert {p.stem for p in (ROOT/"benchmarks/results").iterdir()} == {"quality", *FLAGS}
    for name, (result, said) in results.items():
        assert result["machine"]["torch"] == torch.__version__ and result["machine"]["processor"], name
        assert result["settings"]["length"] == 34 and re.search(r"^Wrote .*\.json\.$", said, re.M), name


def test_every_contender_is_there(results):
    here = [name for name in contenders.contenders() if name not in EXTRA]
    found = rows(results, "training")
    assert [row["name"] for row in found] == here and {"seqgpt", "Trainer, defaults", "plain loop"} <= set(here)
    for row in found: assert len(row["seconds"]) == 2 and row["share_of_peak"] > 0 and row["first_step"] > 0
    bf16 = pick_precision() == "bf16"
    assert ("Trainer, bf16" in here) == ("bf16" in results["training"][0]["peak"]) == bf16
    for name in here: assert name in results["training"][1]
    assert {row["name"] for row in rows(results, "small_models")} <= set(here)
    assert [(row["length"], row["sequences"], row["name"]) for row in rows(results, "lengths")] == [
        (64, 1, "seqgpt"), (64, 1, "Trainer, defaults")]
    data = results["startup"][0]["data"]["rows"]
    assert [(row["sequences"], row["tokens"]) for row in data] == [(1000, 66_000)]
    assert len(results["startup"][0]["startup"]["rows"]) == 5


def test_what_is_not_installed_is_named(results):
    assert set(results["training"][0]["left_out"]) == set(EXTRA)
    for name, module in EXTRA.items():
        assert f"{name}: not installed: pip install {module.replace('_', '-')}\n" in results["training"][1]
    assert rows(results, "serving") == [] and "serving: not installed: pip install locust\n" in results["serving"][1]


def test_both_sides_compute_the_same(results):
    ours, theirs = rows(results, "evaluation")
    assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-5)
    who = [f"{name}, {p}" for p in common.precisions() for name in ("Transformers", "seqgpt")]
    who += ["seqgpt, ONNX, fp32", "seqgpt, ONNX, int8"]
    found = rows(results, "generation")
    assert [(row["name"], row["sequences"]) for row in found] == [(name, n) for n in (1, 8, 32) for name in who]
    for row in found: assert (row["ratio"] == 1) == (row["name"] == who[0])
    for row in found: assert row["same_tokens"] == 1 or not row["name"].endswith("fp32")


def test_all_encode_the_same_sequences(results):
    found = rows(results, "encoding")
    assert len(found) == 5 and {row["sequences"] for row in found} == {1000}
    assert [row["disk"] > 0 for row in found] == [True]*3 + [False]*2


def test_wrong_flags_are_refused(capsys):
    for wrong in (["--rounds", "0"], ["--length", "x"]):
        with pytest.raises(SystemExit): training.main(wrong)
    assert "must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="n_embd .* is not divisible by n_head"): training.main(["--n_head", "5"])


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("setup")/"s")
    return common.Setup(folder, batch_size=4, length=34, n_layer=2, n_head=2, n_embd=64).write()


class Enough(Exception): pass


@pytest.mark.parametrize("name", contenders.contenders())
def test_contenders_train_the_same_model(name, setup):
    if name in EXTRA: pytest.importorskip(EXTRA[name])
    batch = setup.ids()[:16]
    losses = []
    steps = 0

    def pause(model):
        nonlocal steps
        if steps in (0, 60):
            with torch.no_grad(): logits = model(batch)
            losses.append(contenders.next_token_loss(getattr(logits, "logits", logits), batch).item())
        if steps == 60: raise Enough(sum(p.numel() for p in model.parameters()))
        steps += 1

    with pytest.raises(Enough) as enough: contenders.contenders()[name][2](setup, pause)
    assert abs(enough.value.args[0]/GPT2LMHeadModel(setup.config()).num_parameters() - 1) < 0.01
    assert abs(losses[0] - math.log(516)) < 0.2 and losses[1] < losses[0] - 0.05


@pytest.mark.parametrize("length, n_layer, n_embd", [(16, 1, 8), (33, 3, 24)])
def test_operations_are_those_that_pytorch_counts(length, n_layer, n_embd):
    config = common.Setup("", 2, length, n_layer, 2, n_embd).config(attn_implementation="eager")
    ids = torch.zeros(2, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter: GPT2LMHeadModel(config)(ids, labels=ids).loss.backward()
    weights, attention = training.training_flops(length, n_layer, n_embd, config.vocab_size)
    assert counter.get_total_flops() == 2*length*(weights + 2*attention) # it counts what the mask hides, too


def dies(monkeypatch, word):
    "Processes with `word` in their command only say that there is nothing at `nowhere`."
    start = startup.subprocess.Popen
    dead = [sys.executable, "-c", "raise SystemExit('nowhere: no such file')"]
    monkeypatch.setattr(startup.subprocess, "Popen",
                        lambda command, **how: start(dead if word in command else command, **how))


def test_a_contender_that_fails_is_named_and_the_others_go_on(setup, monkeypatch):
    dies(monkeypatch, "plain loop")
    found = training.bench_training(setup, 1, 1, ["plain loop", "Trainer, defaults"])
    row, = found["rows"]
    assert row["name"] == "Trainer, defaults" and row["parameters"] > 1000 and row["memory"] > 10
    assert len(row["seconds"]) == 1 and "nowhere" in found["left_out"]["plain loop"]


def test_a_command_or_server_that_fails_says_why(monkeypatch):
    dead = "raise SystemExit('one line\\nno model here')"
    with pytest.raises(RuntimeError, match="no model here"), serving.served("-c", dead, health="healthz"): pass
    dies(monkeypatch, "seqgpt.cli")
    with pytest.raises(RuntimeError, match="no such file"): startup.first_step("--data_path", "nowhere")


def test_transformers_serves_with_its_continuous_batching(setup):
    command, *_ = serving.server_commands(setup)[serving.TRANSFORMERS]
    assert "--continuous-batching" in command


def test_turns_are_taken():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = common.take_turns(calls, rounds=2, steps=3)
    assert "".join(order) == "aaabbbaaabbb" and {name: len(s) for name, s in seconds.items()} == {"a": 6, "b": 6}
    assert common.rate([1, 2, 4], 8) == {"low": 3, "median": 4, "high": 6}


def test_tricks_come_one_by_one(results, tmp_path, monkeypatch):
    found = rows(results, "tricks")
    result, said = results["tricks"]
    assert found[0]["name"] == "Trainer's defaults" and found[0]["gain"] == 0 and len(found) >= 4
    assert result["left_out"] == {tricks.COMPILED: "RuntimeError: no compiler here"} and "no compiler here" in said
    monkeypatch.setattr(torch, "compile", lambda function: function)
    setup = common.Setup(str(tmp_path), batch_size=2, length=34, n_layer=1, n_head=2, n_embd=16).write()
    again = tricks.bench_tricks(setup, rounds=1, steps=1)
    assert [row["name"] for row in again["rows"]] == [row["name"] for row in found] + [tricks.COMPILED]
    assert not again["left_out"]


def test_race(tmp_path, capsys, monkeypatch):
    flags = {"config": "quick", "n_layer": 1, "n_head": 1, "n_embd": 8, "max_steps": 2, "eval_steps": 1}
    monkeypatch.setattr(quality, "RECIPES", {"digits": {"hopeless": flags}, "markov": {"hopeless": flags}})
    quality.main(["--output", str(tmp_path/"quality.json")])
    assert capsys.readouterr().out.count(" > 0:") == 4
    digits, markov = json.loads((tmp_path/"quality.json").read_text())["rows"]
    assert digits["target"] == 1.28 and 1.7 < markov["target"] < 2
    for row in (digits, markov): assert not row["reached"] and row["steps"] == 2
    assert digits["command"] == ("seqgpt train --config quick --n_layer 1 --n_head 1 --n_embd 8 --max_steps 2 "
                                 "--eval_steps 1 --data_path digits --validation_fraction 0.2")
    quality.write_source("digits", tmp_path/"digits")
    (tmp_path/"typed").mkdir()
    monkeypatch.chdir(tmp_path/"typed")
    assert main(digits["data"].split()[1:]) == 0 # the command for the data writes what was trained on
    file = "digits/sequences.jsonl"
    assert (tmp_path/"typed"/file).read_bytes() == (tmp_path/file).read_bytes()


def test_the_clock_stops_where_it_is_good_enough(tmp_path):
    setup = common.Setup(str(tmp_path), length=34).write()
    shape = {"max_length": 34, "n_layer": 1, "n_head": 1, "n_embd": 8}
    config = Config(f"{tmp_path}/data", output_dir=str(tmp_path/"run"), cache_dir=str(tmp_path), max_steps=9,
                    eval_steps=3, overwrite=True, **shape)
    stop = quality.StopAt(1000.0)
    history = train(config, [stop]).history
    assert stop.found["reached"] and stop.found["steps"] == 3 == max(log["step"] for log in history)
    assert stop.found["tokens"] == 3*setup.tokens and stop.found["perplexity"] < 1000
    assert 0 < stop.found["seconds"] and 0 < stop.found["processor_seconds"]
    never = quality.StopAt(1.0)
    train(config, [never])
    assert not never.found["reached"] and never.found["steps"] == 9
