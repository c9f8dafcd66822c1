"The script on the page about searching for settings: copied into a file, it does what the page says."
import json
import math
import re

import optuna
import pytest
from conftest import ROOT, seqgpt, write_lines
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

STOP = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler) # ignored where the tests run in the background
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2: os.kill(os.getpid(), signal.SIGNAL)
"""


def script():
    "What the page tells its readers to copy, for three trials."
    cells = json.loads((ROOT/"nbs/tutorials/search.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(c["source"]) for c in cells]
    code = [text for c, text in zip(cells, texts) if c["cell_type"] == "code"]
    imports = next(text for text in code if "import optuna" in text)
    base = next(text for text in code if text.startswith("base = "))
    definitions = [f"def {name}(" for name in ("settings", "objective", "open_study")] + ["class Prune("]
    defined = [text for text in code if text.startswith(tuple(definitions))]
    assert len(defined) == 4
    end = next(found[1] for text in texts if (found := re.search(r"```python\n(.+?)```", text, re.S)))
    assert 50 < len("\n".join([imports, base, *defined, end]).splitlines()) < 75 # "about 60 lines"
    return "\n".join([imports, base, *defined, end.replace(", 20)", ", 3)")])


def trials(folder):
    journal = JournalFileBackend(str(folder/"study.jsonl"))
    study = optuna.load_study(study_name="search", storage=JournalStorage(journal))
    return study, [t.state.name for t in study.trials]


@pytest.fixture
def folder(melodies, tmp_path):
    write_lines(tmp_path, [{"tokens": t} for t, label in melodies[:100]]).rename(tmp_path/"digits")
    return tmp_path


@pytest.mark.parametrize("signal, left", [("SIGINT", "FAIL"), ("SIGKILL", "RUNNING")])
def test_interrupted_in_a_trial_it_goes_on_when_it_is_started_again(signal, left, folder, forks):
    stopped = script().replace("callbacks=[Prune(trial)]", "callbacks=[Prune(trial), *[Stop()]*(trial.number == 1)]")
    ran = forks(cwd=folder, code=stopped.replace("\nbase = ", f"{STOP.replace('SIGNAL', signal)}\nbase = "))
    assert ran["passed"] == (signal == "SIGINT") and trials(folder)[1] == ["COMPLETE", left], ran["printed"]
    assert ("Stopped. Start the script again" in ran["printed"]) == (signal == "SIGINT")
    ran = forks(cwd=folder, code=script())
    study, states = trials(folder)
    assert ran["passed"] and states == ["COMPLETE", left, "COMPLETE", "COMPLETE"], ran["printed"]
    assert study.trials[0].params["learning_rate"] == 1e-2 and study.trials[1].params != study.trials[2].params
    result = seqgpt("train", "--config", "best.yaml", "--output_dir", "best", cwd=folder)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((folder/"best/best_model/metrics.json").read_text())
    assert math.isclose(metrics["perplexity"], math.exp(study.best_value))


def test_trials_that_diverge_count_as_pruned_and_mistakes_end_the_search(folder, forks):
    fails = "\ndef train(config, callbacks): raise Diverged('The loss is nan.')\n"
    ran = forks(cwd=folder, code=script().replace("\nbase = ", f"{fails}\nbase = "))
    assert ran["passed"] and trials(folder)[1] == ["PRUNED"]*3, ran["printed"]
    ran = forks(cwd=folder, code=script().replace("n_head=2", "n_head=3").replace("study.jsonl", "another.jsonl"))
    assert not ran["passed"] and "n_embd (32) is not divisible by n_head (3)" in ran["printed"]
