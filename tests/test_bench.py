"The benchmark: everybody who should be there is there, and all do the same work. No speed is asserted."
import json
import math
import re
import sys
import time

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import redirect
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from seqgpt import bench as B
from seqgpt.checks import InputError
from seqgpt.cli import main
from seqgpt.devices import pick_precision

TINY = dict(rounds=1, steps=2, batch_size=2, length=34, n_layer=1, n_head=2, n_embd=16, longest=64, most_sequences=1000)
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
def whole(tmp_path_factory):
    "A whole benchmark, small, on a machine without the extra packages: result, folder, what was printed."
    folder, find, first_steps = tmp_path_factory.mktemp("bench")/"out", B.importlib.util.find_spec, iter([B.first_step]) # one real run of the command
    with pytest.MonkeyPatch.context() as patch, redirect(None) as (said, _):
        patch.setattr(B.importlib.util, "find_spec", lambda name: None if name in {*EXTRA.values(), "locust"} else find(name))
        patch.setattr(torch, "compile", no_compiler)
        patch.setattr(B, "Contender", Idle)
        patch.setattr(B, "first_step", lambda *flags: next(first_steps, lambda *_: (0.1, 100.0))(*flags))
        patch.setattr(B.subprocess, "run", lambda *args, **kwargs: time.sleep(0.001)) # of the imports that are measured
        result = B.bench(str(folder), **TINY)
    return result, folder, said.getvalue()


def test_every_part_and_contender_is_there(whole):
    result, folder, said = whole
    assert json.loads((folder/"benchmark.json").read_text()) == result and (folder/"benchmark.png").stat().st_size > 10_000
    assert set(result) == {"machine", "settings", *B.PARTS} - {"quality"} and result["settings"]["n_embd"] == 16
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["processor"] and result["machine"]["date"]
    here = [name for name in B.contenders() if name not in EXTRA]
    assert [row["name"] for row in result["training"]["rows"]] == here and {"seqgpt", "Trainer, defaults", "plain loop"} <= set(here)
    assert all(len(row["seconds"]) == 2 and row["parameters"] > 1000 and row["share_of_peak"] > 0 and row["first_step"] > 0 for row in result["training"]["rows"])
    assert ("Trainer, bf16" in here) == (pick_precision() == "bf16") == ("bf16" in result["training"]["peak"])
    assert [row["name"] for row in result["evaluation"]["rows"]] == ["seqgpt", "Trainer, defaults"]
    who = [f"{name}, {p}" for p in B.precisions() for name in ("Transformers", "seqgpt")] + ["seqgpt, ONNX, fp32", "seqgpt, ONNX, int8"]
    assert [(row["name"], row["sequences"]) for row in result["generation"]["rows"]] == [(name, n) for n in (1, 8, 32) for name in who]
    assert all((row["ratio"] == 1) == (row["name"] == who[0]) for row in result["generation"]["rows"])
    assert [(row["length"], row["sequences"], row["name"]) for row in result["lengths"]["rows"]] == [(64, 1, "seqgpt"), (64, 1, "Trainer, defaults")]
    assert [(row["sequences"], row["tokens"]) for row in result["data"]["rows"]] == [(1000, 66_000)]
    assert len(result["startup"]["rows"]) == 5
    for head in ("training", "evaluation", "generation", "length", "sequences", "start"): assert re.search(rf"^{head} ", said, re.M), head
    for name in here: assert name in said


def test_what_is_not_installed_is_named(whole):
    result, _, said = whole
    assert set(result["training"]["left_out"]) == set(EXTRA)
    assert result["serving"] == {"rows": [], "left_out": {"serving": "not installed: pip install 'seqgpt[bench]'"}}
    for name in [*EXTRA, "serving"]: assert f"{name}: not installed: pip install 'seqgpt[bench]'" in said


def test_both_sides_compute_the_same(whole):
    ours, theirs = whole[0]["evaluation"]["rows"]
    assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-5)
    assert all(row["same_tokens"] == 1 for row in whole[0]["generation"]["rows"] if row["name"].endswith("fp32"))


def test_nothing_is_overwritten_and_mistakes_show_first(whole, tmp_path):
    _, folder, _ = whole
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match="holds an earlier benchmark"): B.bench(str(folder), **TINY)
    assert before == {p: p.read_bytes() for p in folder.iterdir()}
    for wrong, words in ({"parts": "training,speed"}, "no 'speed'"), ({"rounds": 0}, "rounds is 0"), ({"n_head": 3}, "not divisible"), ({"longest": 32}, "longest is 32"):
        with pytest.raises(InputError, match=words): B.bench(str(tmp_path/"new"), **{**TINY, **wrong})
    assert not (tmp_path/"new").exists()


def test_a_part_alone(tmp_path):
    with redirect(None): result = B.bench(str(tmp_path/"out"), parts="evaluation", **TINY)
    assert set(result) == {"machine", "settings", "evaluation"} and (tmp_path/"out/benchmark.png").exists()


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return B.Setup(str(tmp_path_factory.mktemp("setup")/"s"), batch_size=4, length=34, n_layer=2, n_head=2, n_embd=64).write()


class Enough(Exception): pass


@pytest.mark.parametrize("name", B.contenders())
def test_contenders_train_the_same_model(name, setup):
    if name in EXTRA: pytest.importorskip(EXTRA[name])
    seen, batch = [], setup.ids()[:16]

    def pause(model):
        if not seen or len(seen) == 60:
            with torch.no_grad(): logits = model(batch)
            seen.append((sum(p.numel() for p in model.parameters()), B.next_token_loss(getattr(logits, "logits", logits), batch).item()))
        else: seen.append(None)
        if len(seen) == 61: raise Enough

    with pytest.raises(Enough): B.contenders()[name][2](setup, pause)
    (parameters, before), (_, after) = seen[0], seen[-1]
    expected = GPT2LMHeadModel(GPT2Config(vocab_size=516, n_positions=34, n_layer=2, n_head=2, n_embd=64, bos_token_id=1, eos_token_id=2)).num_parameters()
    assert abs(parameters/expected - 1) < 0.01
    assert abs(before - math.log(516)) < 0.2 and after < before - 0.05


@pytest.mark.parametrize("length, n_layer, n_embd, vocab_size", [(16, 1, 8, 20), (33, 3, 24, 50)])
def test_operations_are_those_that_pytorch_counts(length, n_layer, n_embd, vocab_size):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=length, n_layer=n_layer, n_head=2, n_embd=n_embd, attn_implementation="eager", bos_token_id=1, eos_token_id=2))
    ids = torch.zeros(2, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter: model(ids, labels=ids).loss.backward()
    weights, attention = B.training_flops(length, n_layer, n_embd, vocab_size)
    assert counter.get_total_flops() == 2*length*(weights + 2*attention) # it counts what the mask hides, too


def dies(monkeypatch, word):
    "Processes with `word` in their command only say that there is nothing at `nowhere`."
    start = B.subprocess.Popen
    monkeypatch.setattr(B.subprocess, "Popen", lambda command, **how: start([sys.executable, "-c", "raise SystemExit('nowhere: no such file')"] if word in command else command, **how))


def test_a_contender_that_fails_is_named_and_the_others_go_on(setup, monkeypatch):
    dies(monkeypatch, "plain loop")
    found = B.bench_training(setup, 1, 1, ["plain loop", "Trainer, defaults"])
    row, = found["rows"]
    assert row["name"] == "Trainer, defaults" and row["parameters"] > 1000 and row["memory"] > 10 and len(row["seconds"]) == 1
    assert "plain loop failed" in found["left_out"]["plain loop"] and "nowhere" in found["left_out"]["plain loop"]


def test_turns_are_taken():
    order = []
    seconds = B.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, steps=3)
    assert "".join(order) == "aaabbbaaabbb" and {name: len(s) for name, s in seconds.items()} == {"a": 6, "b": 6}
    assert B.rate([1, 2, 4], 8) == {"low": 3, "median": 4, "high": 6}


def test_a_command_that_fails_says_why(monkeypatch):
    dies(monkeypatch, "seqgpt.cli")
    with pytest.raises(RuntimeError, match="no such file"): B.first_step("--data_path", "nowhere")


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(RuntimeError, match="no model here"), B.served("-c", "raise SystemExit('one line\\nno model here')", health="healthz"): pass


def test_any_part_can_be_drawn(whole):
    quality = {"rows": [{"corpus": "digits", "name": "quick", "target": 1.28, "seconds": 3.0, "reached": True}]}
    for part, found in {**whole[0], "quality": quality}.items():
        if part in B.PARTS: plt.close(B.plot_bench({part: found}))


def test_tricks_come_one_by_one(whole, tmp_path, monkeypatch):
    rows = whole[0]["tricks"]["rows"]
    assert rows[0]["name"] == "Trainer's defaults" and rows[0]["gain"] == 0 and len(rows) >= 4
    assert whole[0]["tricks"]["left_out"] == {"torch.compile (left out)": "RuntimeError: no compiler here"} and "no compiler here" in whole[2]
    monkeypatch.setattr(torch, "compile", lambda function: function)
    setup = B.Setup(str(tmp_path), batch_size=2, length=34, n_layer=1, n_head=2, n_embd=16).write()
    found = B.bench_tricks(setup, rounds=1, steps=1)
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in rows] + ["torch.compile (left out)"] and not found["left_out"]


def test_race(tmp_path, capsys, monkeypatch):
    flags = {"config": "quick", "n_layer": 1, "n_head": 1, "n_embd": 8, "max_steps": 2, "eval_steps": 1}
    found = B.bench_quality(tmp_path, {"digits": {"hopeless": flags}, "markov": {"hopeless": flags}})
    digits, markov = found["rows"]
    assert digits["target"] == 1.28 and 1.7 < markov["target"] < 2 and not digits["reached"] and not markov["reached"] and digits["steps"] == markov["steps"] == 2
    assert digits["command"] == "seqgpt train --config quick --n_layer 1 --n_head 1 --n_embd 8 --max_steps 2 --eval_steps 1 --data_path digits --validation_fraction 0.2"
    (tmp_path/"data").mkdir()
    monkeypatch.chdir(tmp_path/"data")
    assert main(digits["data"].split()[1:]) == 0 # the command for the data writes what was trained on
    assert (tmp_path/"data/digits/sequences.jsonl").read_bytes() == (tmp_path/"digits/sequences.jsonl").read_bytes()
    B.show_quality(found)
    assert capsys.readouterr().out.count(" > 0:") == 4


def test_the_clock_stops_where_it_is_good_enough(tmp_path):
    stop, setup = B.StopAt(1000.0), B.Setup(str(tmp_path), length=34).write()
    config = B.Config(f"{tmp_path}/data", output_dir=str(tmp_path/"run"), cache_dir=str(tmp_path), max_length=34, max_steps=9, eval_steps=3, n_layer=1, n_head=1, n_embd=8)
    history = B.train(config, [stop]).history
    assert stop.found["reached"] and stop.found["steps"] == 3 == max(log["step"] for log in history) and stop.found["tokens"] == 3*setup.tokens
    assert 0 < stop.found["seconds"] and 0 < stop.found["processor_seconds"] and stop.found["perplexity"] < 1000
    B.train(B.replace(config, overwrite=True), [never := B.StopAt(1.0)])
    assert not never.found["reached"] and never.found["steps"] == 9
