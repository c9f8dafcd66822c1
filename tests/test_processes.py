"""Several processes (gloo, on the processor) do what one process does: the same steps, the same totals, whole or shared
out, in any division."""
import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import NOTES, TINY, write_lines
from safetensors.torch import load_file
from test_crashes import history
from transformers import Trainer

from seqgpt.checks import InputError
from seqgpt.config import Config
from seqgpt.metrics import ExactMetrics
from seqgpt.preparing import check_run

EXACT = "--model.resid_pdrop 0 --model.embd_pdrop 0 --model.attn_pdrop 0".split()
RUN = ["train", "--data_path", "data.jsonl", "--cache_dir", "cache", "--max_length", 24, "--num_epochs", 2,
       "--eval_steps", 4, "--logging_steps", 1, "--precision", "fp32", *TINY, *EXACT]
# each step sees 12 sequences; 39 to train on: in the last step of an epoch there are 3, not enough for both processes
DIVISIONS = {
    "one batch": (["--batch_size", 12], {}),
    "three batches": (["--batch_size", 4, "--gradient_accumulation_steps", 3], {}),
    "two processes": (["--batch_size", 6], {"processes": 2}),
    "two processes, two batches": (["--batch_size", 3, "--gradient_accumulation_steps", 2], {"processes": 2}),
    "shared out": (["--batch_size", 6], {"processes": 2, "fsdp": True}),
}


@pytest.fixture(scope="module")
def place(forks, once):
    """A folder with sequences of very different lengths, labelled, and the runs of all divisions; what answers jobs
    there; and the answers of those runs."""
    def divisions(folder):
        lengths = torch.randint(2, 20, (49,), generator=torch.Generator().manual_seed(0)).tolist()
        def line(k, n): return {"tokens": [NOTES[(k + j*(1 + k % 2)) % 5] for j in range(n)], "label": k % 2}
        write_lines(folder, [line(k, n) for k, n in enumerate(lengths)])
        answers = {name: forks(*RUN, *args, "--output_dir", name, cwd=folder, bare=True, **job)
                   for name, (args, job) in DIVISIONS.items()}
        assert all(a["code"] == 0 for each in answers.values() for a in each), answers
        (folder/"answers.json").write_text(json.dumps(answers))
    folder = once(divisions)
    return folder, partial(forks, cwd=folder, bare=True), json.loads((folder/"answers.json").read_text())


def losses(outputs):
    "All numbers that were written down, by step."
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [{k: v for k, v in log.items() if k in names or k.startswith("eval_")} for log in history(outputs)]


def close(one, other, tolerance=1e-5):
    assert len(one) == len(other)
    for a, b in zip(one, other): assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", [n for n in DIVISIONS if n != "one batch"])
def test_the_division_does_not_matter(place, name):
    folder, *_ = place
    def split(name): return json.loads((folder/name/"split.json").read_text())["train"]
    def weights(name): return load_file(folder/name/"final_model/model.safetensors")
    assert split(name) == split("one batch")
    found = losses(folder/name)
    wanted = losses(folder/"one batch")
    assert sum("loss" in log for log in wanted) == 8 and sum("eval_loss" in log for log in wanted) == 2
    close(found, wanted)
    found = weights(name)
    wanted = weights("one batch")
    assert found.keys() == wanted.keys()
    for key in wanted: torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5)


def test_one_process_writes_and_speaks(place):
    first, second = place[2]["two processes"]
    assert "best so far" in first["out"] and first["out"].count("to validate") == 1
    assert second["out"] == "" and "two processes" not in second["places"], second # either may write to the cache
    assert "two processes" in first["places"], first


OF_CLASSIFIERS = [
    ("c one", 12, {}),
    ("c two", 6, {"processes": 2}),
    ("c shared out", 6, {"processes": 2, "fsdp": True}),
]


def test_classification_counts_each_sequence_once(place):
    folder, ask, _ = place
    for name, size, job in OF_CLASSIFIERS:
        answers = ask(*RUN, "--task", "classification", "--eval_steps", 3, "--batch_size", size, "--output_dir", name,
                      **job)
        assert all(a["code"] == 0 for a in answers), answers
    n = len(json.loads((folder/"c one/split.json").read_text())["validation"])
    for name in ("c two", "c shared out"):
        found = losses(folder/name)
        close(found, losses(folder/"c one"))
        measured = [log["eval_accuracy"]*n for log in found if "eval_accuracy" in log]
        assert len(measured) == 3 and measured == pytest.approx([*map(round, measured)], abs=1e-9)


ONE = {}
TWO = {"processes": 2}
SHARED = {"processes": 2, "fsdp": True}


@pytest.mark.parametrize("before, after", [
    pytest.param(TWO, ONE, id="2 to 1"),
    pytest.param(ONE, TWO, id="1 to 2"),
    pytest.param(SHARED, ONE, id="shared to 1"),
    pytest.param(ONE, SHARED, id="1 to shared"),
    pytest.param(SHARED, SHARED, id="shared to shared"),
])
def test_going_on_with_another_number_of_processes(place, before, after):
    folder, ask, _ = place
    shutil.rmtree(folder/"outputs", ignore_errors=True)
    batch = 6 if "processes" in before else 12
    stopped = ask(*RUN, "--batch_size", batch, step=5, signal=15, **before)
    assert all(a["code"] == 130 for a in stopped), stopped
    answers = ask("train", "--config", "outputs/config.yaml", "--batch_size", 6, "--resume", **after)
    assert all(a["code"] == 0 for a in answers), answers
    if before.get("processes") != after.get("processes") and "processes" not in after:
        assert "Each step will see 12 sequences, as before" in answers[0]["out"], answers[0]["out"]
    close(losses(folder/"outputs"), losses(folder/"one batch"))


def test_weights_are_loaded_by_us():
    assert hasattr(Trainer, "_load_from_checkpoint"), (
        "Transformers' Trainer loads the weights of a checkpoint elsewhere now, where it may not read those of a model "
        "that is shared out: look for the place in `train`, and adapt `_load_from_checkpoint` in library/trainer.ipynb")


def test_a_division_that_cannot_be(place):
    folder, ask, _ = place
    shutil.rmtree(folder/"outputs", ignore_errors=True)
    ask(*RUN, "--batch_size", 6, step=5, signal=15, processes=2)
    refused, = ask(*RUN, "--batch_size", 5, "--resume")
    assert refused["code"] == 2, refused
    assert "saw 12 sequences" in refused["err"] and "--batch_size that divides 12" in refused["err"], refused
    refused = ask(*RUN, "--batch_size", 2, "--resume", processes=5)
    assert refused[0]["code"] == 2 and "number of processes that divides 12" in refused[0]["err"], refused
    assert sum(bool(a["err"]) for a in refused) == 1 # said once


@pytest.mark.parametrize("args, words", [
    (["--optimizer", "muon"], "optimizer muon needs whole matrices"),
    (["--init_from", "one batch/best_model", "--lora_rank", 2], "lora_rank needs whole matrices"),
])
def test_what_cannot_be_shared_out(place, args, words):
    folder, ask, _ = place
    refused = ask(*RUN, *args, "--output_dir", "never", processes=2, fsdp=True)
    assert [a["code"] for a in refused] == [2, 2] and words in refused[0]["err"], refused
    assert not (folder/"never").exists(), refused


def test_the_first_version_of_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fsdp_version: 2"): check_run(Config(data_path="data.jsonl"))


def test_what_is_measured_on_a_gpu_is_fetched_from_there():
    class OnGpu(torch.Tensor): # NumPy cannot see it
        def __array__(self, *_, **__): raise TypeError("can't convert cuda:0 device type tensor to numpy")
        def cpu(self): return torch.tensor(self.tolist())
    collect = ExactMetrics(lambda rows: {"rows": rows.tolist()})
    for rows, last in (([[1.0, 2.0]], False), ([[3.0, 4.0]], True)):
        found = collect(SimpleNamespace(predictions=torch.tensor(rows).as_subclass(OnGpu)), last)
    assert found == {"rows": [[1, 2], [3, 4]]}
