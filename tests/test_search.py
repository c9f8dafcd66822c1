"The search for settings: what it finds, what it keeps, and that nothing is lost or done twice."
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import optuna
import pytest
import torch
import yaml
from conftest import ROOT, TINY, installed, refused, seqgpt, write_lines, write_named
from matplotlib.figure import Figure

from seqgpt import search as S
from seqgpt.callbacks import Diverged, Interrupted
from seqgpt.checks import InputError
from seqgpt.cli import EXTRAS, search
from seqgpt.config import Config, read_config
from seqgpt.runs import Finished
from seqgpt.training import train

RUN = ["search", "--data_path", "data.jsonl", "--max_length", 16, *TINY]


@pytest.fixture
def corpus(melodies, tmp_path, monkeypatch):
    write_lines(tmp_path, [{"tokens": t} for t, l in melodies[:100]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(S, "plot_study", lambda found: Figure()) # the installed command draws it
    return tmp_path


@pytest.fixture
def base(corpus):
    return Config("data.jsonl", max_length=16, n_layer=1, n_head=2, n_embd=16, batch_size=16, num_epochs=2, output_dir="s")


def same(one, other): return [{k: v for k, v in t.items() if k != "seconds"} for t in one.trials] == [{k: v for k, v in t.items() if k != "seconds"} for t in other.trials]


def test_command_finds_what_is_known_to_be_best(corpus):
    "Who learns nothing loses; both choices are tried once, the given settings first; what is left behind can be used."
    result = installed(*RUN, "--num_epochs", 2, "--trials", 5, "--output_dir", "s", "--space.learning_rate", "[1e-30,3e-3]", cwd=corpus)
    assert result.returncode == 0 and "Traceback" not in result.stderr and "arning" not in result.stderr, result.stderr
    assert "2 trials: 2 finished. The best is trial 0" in result.stdout and "learning_rate 0.003" in result.stdout and "\r" not in result.stderr
    assert {p.name for p in (corpus/"s").iterdir() if p.name[0] != "."} == {*S.NAMES} and (corpus/"s/study.png").stat().st_size > 5000
    first, second = map(json.loads, open(corpus/"s/trials.jsonl"))
    assert first["settings"] == {"learning_rate": 3e-3} and first["state"] == second["state"] == "finished" and first["perplexity"] < second["perplexity"] and [*first["validations"]] == ["50", "100"]
    assert math.isclose(json.loads((corpus/"s/best_model/metrics.json").read_text())["perplexity"], first["perplexity"])
    best = yaml.safe_load((corpus/"s/best.yaml").read_text())
    assert best["learning_rate"] == 3e-3 and best["data_path"] == "data.jsonl" and best["output_dir"] == "outputs"
    assert seqgpt("train", "--config", "s/best.yaml", "--output_dir", "final", cwd=corpus).returncode == 0
    assert json.loads((corpus/"final/best_model/metrics.json").read_text())["perplexity"] == first["perplexity"] # the same run again
    refused(seqgpt(*RUN, "--output_dir", "s", cwd=corpus), "holds an earlier search", "--resume", "--overwrite")
    again = seqgpt("search", "--config", "s/config.yaml", "--resume", cwd=corpus)
    assert again.returncode == 0 and "2 trials: 2 finished" in again.stdout, again.stderr
    refused(seqgpt("search", "--config", "s/config.yaml", "--resume", "--num_epochs", 3, cwd=corpus), "num_epochs (was 2.0, is 3.0)")
    replaced = seqgpt(*RUN, "--num_epochs", 1, "--trials", 1, "--output_dir", "s", "--overwrite", "--space.n_layer", "[2]", "--space.model.resid_pdrop", "0.2..0.3", cwd=corpus)
    assert replaced.returncode == 0 and "1 trial: 1 finished" in replaced.stdout, replaced.stderr
    best = yaml.safe_load((corpus/"s/best.yaml").read_text())
    assert best["n_layer"] == 2 and 0.2 <= best["model"]["resid_pdrop"] <= 0.3


@pytest.mark.parametrize("space, words", {
    "misspelt": ({"learnin_rate": "1e-3..1e-2"}, "Did you mean learning_rate?"), "field": ({"resid_pdrop": "0.0..0.1"}, "Did you mean model.resid_pdrop?"),
    "not a field": ({"model.n_layer": [1, 2]}, "Did you mean n_layer?"), "not comparable": ({"validation_fraction": "0.1..0.5"}, "must be the same in all trials"),
    "another split": ({"seed": "1..5"}, "must be the same"), "downwards": ({"n_layer": "4..2"}, "stands first"), "one end": ({"n_layer": "4.."}, "or a range"), "no range": ({"learning_rate": "fast"}, "or a range"),
    "endless": ({"learning_rate": "1e-3..inf"}, "or a range"), "no choices": ({"n_layer": []}, "or a range"), "twice": ({"n_layer": [2, 2]}, "or a range"), "within": ({"n_layer": [[2]]}, "or a range"),
    "a number": ({"n_layer": 2}, "or a range"), "wrong kind": ({"n_layer": [2, "many"]}, "n_layer is 'many'. It must be a whole number"), "no whole numbers": ({"n_layer": "1.5..3.5"}, "n_layer is 1.5"),
}.values())
def test_spaces_that_make_no_sense_are_refused_before_anything_is_written(space, words, base, corpus):
    with pytest.raises(InputError, match=words.replace("?", "\\?")): search(base, space)
    assert not (corpus/"s").exists()


def test_other_mistakes_are_refused(base, corpus, monkeypatch):
    refused(seqgpt("search", "--trials", 0, "--data_path", "data.jsonl", cwd=corpus), "trials is 0")
    refused(seqgpt("search", "--space.dropout", "0.0..0.3", cwd=corpus), "no setting 'dropout'")
    assert not (corpus/"outputs").exists() # not even the digits
    refused(seqgpt(*RUN, "--n_head", 3, cwd=corpus), "not divisible")
    refused(seqgpt("search", "--data_path", "nowhere", cwd=corpus), "nowhere")
    (corpus/"outputs/final_model").mkdir(parents=True)
    refused(seqgpt(*RUN, "--overwrite", cwd=corpus), "is of another run")
    (corpus/"s").mkdir()
    (corpus/"s/study.jsonl").write_text("nonsense\n")
    refused(seqgpt(*RUN, "--output_dir", "s", "--resume", cwd=corpus), "not a study that can go on")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="in one process"): search(base)


def test_kinds_of_ranges():
    kinds = optuna.distributions
    assert S.read_range("x", "2..8") == kinds.IntDistribution(2, 8) and S.read_range("x", "0.0..0.3") == kinds.FloatDistribution(0, 0.3)
    assert S.read_range("x", "1e-4..1") == kinds.FloatDistribution(1e-4, 1, log=True) and S.read_range("x", ["1e-3", 2, "adamw"]) == kinds.CategoricalDistribution([1e-3, 2, "adamw"])


class Stop(S.Report):
    "Ctrl-C in the second epoch of the fourth trial."
    def on_step_begin(self, args, state, control, **kwargs):
        if self.trial.number == 3 and state.epoch > 1: raise KeyboardInterrupt


def test_an_interrupted_search_ends_as_one_that_was_not(base, corpus, monkeypatch):
    space = {"learning_rate": "1e-4..1e-1", "n_head": [2, 4], "weight_decay": "0.0..0.3"}
    whole = search(replace(base, output_dir="whole"), space, 5)
    with monkeypatch.context() as patch:
        patch.setattr(S, "Report", Stop)
        with pytest.raises(Interrupted, match="Stopped after 3 of 5 trials; all is saved. Go on with: seqgpt search --config s/config.yaml --resume"): search(base, space, 5)
    assert (corpus/"s/trial-003/checkpoints").exists() and len((corpus/"s/trials.jsonl").read_text().splitlines()) == 3
    with open(corpus/"s/study.jsonl", "a") as journal: journal.write('{"op_code": 4, "wor') # as if it had been killed while writing
    assert same(search(replace(base, resume=True), space, 4), S.Search(whole.output_dir, space, whole.trials[:4]))
    halves = search(replace(base, resume=True), space, 5) # more trials than at first
    assert same(halves, whole) and read_config("s/best.yaml") == read_config("whole/best.yaml")
    assert (corpus/"s/best_model/model.safetensors").read_bytes() == (corpus/"whole/best_model/model.safetensors").read_bytes()
    assert not [*corpus.glob("s/trial-*"), *corpus.glob("s/.*.part")]
    with pytest.raises(InputError, match="space"): search(replace(base, resume=True), {"n_layer": [1]}, 5)
    write_lines(corpus, [{"tokens": ["C4"]}, {"tokens": ["D4"]}]*5)
    with pytest.raises(InputError, match="differ from the interrupted search: the data"): search(replace(base, resume=True), space, 5)


def test_a_trial_that_was_told_nobody_is_not_run_again(base, corpus, monkeypatch):
    "Killed behind the training, before it was written down."
    runs, tell = [], optuna.Study.tell
    def killed(self, *args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "tell", killed)
        search(base, {"learning_rate": "1e-3..1e-1"}, 1)
    train = train
    def counted(config, callbacks):
        try: return train(config, callbacks)
        except Finished: runs.append("finished"); raise
    monkeypatch.setattr(S, "train", counted)
    assert optuna.Study.tell is tell
    found = search(replace(base, resume=True), {"learning_rate": "1e-3..1e-1"}, 1)
    assert runs == ["finished"] and found.ranking[0]["perplexity"] < 9


def test_trials_fail_with_a_reason_and_the_search_goes_on(base, monkeypatch, capsys):
    found = search(base, {"n_head": [2, 3]}, 2)
    assert [t["state"] for t in found.trials] == ["finished", "failed"] and "not divisible" in found.trials[1]["failed"] and "perplexity" not in found.trials[1]
    assert "failed: n_embd (16) is not divisible by n_head (3)" in capsys.readouterr().out
    train = train
    def short_of_memory(config, callbacks):
        if config.learning_rate == 2e-3: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if config.learning_rate == 4e-3: raise Diverged("The loss is nan: training has diverged.\nStart again")
        return train(config, callbacks)
    monkeypatch.setattr(S, "train", short_of_memory)
    found = search(replace(base, output_dir="m"), {"learning_rate": [1e-3, 2e-3, 4e-3]}, 3)
    reasons = {t["settings"]["learning_rate"]: t.get("failed") for t in found.trials}
    assert reasons == {1e-3: None, 2e-3: "CUDA out of memory. Tried to allocate 2 GiB", 4e-3: "The loss is nan: training has diverged."}
    with pytest.raises(InputError, match="of 1 trial, none could be trained"): search(replace(base, output_dir="n"), {"learning_rate": [2e-3]}, 3)
    monkeypatch.setattr(S, "train", lambda *_: {}["a fault of ours"])
    with pytest.raises(KeyError): search(replace(base, output_dir="f"), {"learning_rate": [2e-3]}, 3)


def test_no_settings_are_trained_twice(base, monkeypatch):
    train, trained = train, []
    monkeypatch.setattr(S, "train", lambda config, callbacks: trained.append(config.optimizer) or train(config, callbacks))
    config = replace(base, num_epochs=1)
    found = search(config, {"optimizer": ["adamw", "muon", "oops"]}, 2) # too many to try each
    assert search(replace(config, resume=True), {"optimizer": ["adamw", "muon", "oops"]}, 9).trials[:2] == found.trials # now they are few enough
    assert sorted(trained) == ["adamw", "muon", "oops"]


def test_who_lags_behind_is_stopped_unless_that_is_not_wanted(base, monkeypatch):
    "Without training: losses by the learning rate."
    trained = []
    def pretend(config, callbacks):
        state, control = mock.Mock(max_steps=4), mock.Mock(should_training_stop=False)
        for step in (1, 2, 3, 4):
            state.global_step = step
            callbacks[0].on_step_end(None, state, control)
            callbacks[0].on_evaluate(None, state, control, {"eval_loss": config.weight_decay + 1/step})
            if control.should_training_stop is True: break
        trained.append(step)
        best = Path(config.output_dir)/"best_model"
        best.mkdir(parents=True)
        (best/"metrics.json").write_text(json.dumps({"perplexity": config.weight_decay + 1/step, "accuracy": 0.5}))
    monkeypatch.setattr(S, "train", pretend)
    found = search(base, {"weight_decay": "0.0..1.0"}, 30)
    states = [t["state"] for t in found.trials]
    assert states[:5] == ["finished"]*5 and states.count("stopped") == trained.count(1) > 5 and len(trained) == 30
    assert all(t["stopped"] == 25 for t in found.trials if t["state"] == "stopped") and found.importances == {"weight_decay": 1}
    settings = [t["settings"]["weight_decay"] for t in found.trials]
    assert settings[0] == 0.01 and sum(settings[-10:]) < sum(settings[1:11])/2 # it has learned where to look
    assert found.ranking[0]["settings"]["weight_decay"] == min(settings) == read_config("s/best.yaml").weight_decay
    search(replace(base, output_dir="parts"), {"weight_decay": "0.0..1.0"}, 17)
    assert same(search(replace(base, output_dir="parts", resume=True), {"weight_decay": "0.0..1.0"}, 30), found) # what it proposes depends on what was tried, not on when
    trained.clear()
    search(replace(base, output_dir="all"), {"weight_decay": "0.0..1.0"}, 12, prune=False)
    assert trained == [4]*12


def test_classification(melodies, tmp_path):
    write_named(tmp_path, melodies[:80])
    result = seqgpt(*RUN, "--task", "classification", "--num_epochs", 2, "--trials", 2, "--space.batch_size", "[8,16,32]", "--output_dir", "s", cwd=tmp_path)
    assert result.returncode == 0 and "validation loss" in result.stdout and "accuracy" not in result.stdout.split("\n2 trials")[0], result.stderr
    rows = [json.loads(line) for line in open(tmp_path/"s/trials.jsonl")]
    assert rows[0]["settings"] == {"batch_size": 16} != rows[1]["settings"] and all("macro_f1" in row and min(row["validations"].values()) == row["loss"] for row in rows)


def test_jupyter_shows_the_best_first_and_nothing_is_run_in_it():
    trials = [{"trial": k, "state": "finished", "settings": {"optimizer": f"<{k}>"}, "perplexity": 9 - k, "accuracy": 0.5, "validations": {}, "seconds": 1} for k in range(12)]
    html = S.Search(Path("s"), {"optimizer": []}, trials)._repr_html_()
    assert html.index("&lt;11&gt;") < html.index("&lt;2&gt;") and "<11>" not in html and "&lt;1&gt;" not in html
    assert repr(S.Search(Path("s"), {}, [])) == "0 trials: none. There is no best one yet."


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "seqgpt.search")
    monkeypatch.setitem(sys.modules, "optuna", None) # as if it were not installed
    result = seqgpt("search", cwd=tmp_path)
    assert result.returncode == 1 and "optuna" in result.stderr and "pip install 'seqgpt[search]'" in result.stderr, result.stderr
    assert not (tmp_path/"outputs").exists() and EXTRAS["optuna"] == "search" and "search_requirements" in (ROOT/"settings.ini").read_text()
