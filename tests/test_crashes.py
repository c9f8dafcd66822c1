"Runs that are killed, stopped or run out of disk at any moment, and resumed: they end with the same bytes as a run that was left in peace."
import json
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NOTES, TINY, runner, write_lines
from safetensors.torch import load_file, save_file

from seqgpt.model import load_model

RUN = ["train", "--data_path", "data.jsonl", "--cache_dir", "cache", "--max_length", 12, "--num_epochs", 2, "--eval_steps", 4, "--logging_steps", 3, *TINY, "--batch_size", 8,
       "--gradient_accumulation_steps", 2]
STEPS = 10


def write_scales(folder):
    starts = np.random.default_rng(0).integers(5, size=96)
    write_lines(folder, [{"tokens": [NOTES[(s + k) % 5] for k in range(9)]} for s in starts.tolist()])


@pytest.fixture(scope="module")
def place(forks, tmp_path_factory):
    "A folder with data, what answers jobs there, and what a run leaves behind that nobody disturbed."
    folder = tmp_path_factory.mktemp("crashes")
    write_scales(folder)
    ask = partial(forks, cwd=folder)
    done, = ask(*RUN)
    assert done["code"] == 0, done["err"]
    return folder, ask, left(folder/"outputs"), done["events"]


@pytest.fixture
def fresh(place):
    folder, ask, whole, events = place
    for name in ("outputs", "through", "cache"): shutil.rmtree(folder/name, ignore_errors=True)
    return folder, ask, whole, events


def history(outputs):
    "What was written down during a run, without times."
    newest = max((outputs/"checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    return [{k: v for k, v in log.items() if not k.endswith(("_runtime", "_per_second"))} for log in json.loads((newest/"trainer_state.json").read_text())["log_history"]]


def left(outputs):
    "Weights, history, evaluation and samples of a finished run."
    assert not [*outputs.rglob(".*.part"), *outputs.rglob(".*.old")]
    names = ("final_model/model.safetensors", "best_model/model.safetensors", "best_model/evaluation/metrics.json", "samples.jsonl", "split.json")
    return {**{name: (outputs/name).read_bytes() for name in names}, "history": history(outputs), "pictures": [(outputs/name).exists() for name in ("training_curves.png", "best_model/evaluation/evaluation.png")]}


def resume(ask, folder, whole, *args, run=RUN, **job):
    "Goes on to the end, where everything must be as if nothing had happened."
    if (folder/"outputs/best_model").exists(): load_model(folder/"outputs/best_model")
    first, *_ = answers = ask(*run, *args, "--resume", **job)
    assert all(a["code"] == 0 for a in answers) or "the run is finished" in first["err"], answers
    found = left(folder/"outputs")
    assert not [name for name in whole if whole[name] != found[name]]
    return first


@pytest.mark.parametrize("part, kills", [(k, 4) for k in range(3)] + [pytest.param(k, 20, marks=pytest.mark.slow) for k in range(3, 6)])
def test_killed_at_any_moment(fresh, part, kills):
    folder, ask, whole, events = fresh
    dice, wasted = random.Random(part), 0
    for _ in range(kills):
        for name in ("outputs", "cache"): shutil.rmtree(folder/name, ignore_errors=True)
        moment = {"event": dice.randint(1, events)} if dice.random() < 0.7 else {"seconds": dice.uniform(0, 1.5)}
        killed, = ask(*RUN, **moment)
        wasted += killed["code"] != -9 # it was quicker
        resume(ask, folder, whole)
    assert wasted < kills / 2


def test_killed_again_and_again(fresh):
    folder, ask, whole, events = fresh
    for _ in range(3):
        killed, = ask(*RUN, "--resume", event=events // 3)
        assert killed["code"] == -9
    assert "Going on from" in resume(ask, folder, whole)["out"]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_any_moment(fresh, sig):
    folder, ask, whole, _ = fresh
    dice = random.Random(sig)
    for _ in range(3):
        for name in ("outputs", "cache"): shutil.rmtree(folder/name, ignore_errors=True)
        stopped, = ask(*RUN, seconds=dice.uniform(0, 1.2), signal=sig)
        assert stopped["code"] in (0, 130) and "Traceback" not in stopped["err"] and (stopped["code"] == 0 or len(stopped["err"].strip().splitlines()) == 1), stopped
        assert not (folder/"outputs/checkpoints").exists() or stopped["code"] == 0 or "seqgpt train --config outputs/config.yaml --resume" in stopped["err"], stopped
        resume(ask, folder, whole)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_behind_each_step(fresh, step):
    folder, ask, whole, _ = fresh
    stopped, = ask(*RUN, step=step, signal=signal.SIGTERM)
    assert stopped["code"] == 130 and f"Stopped after step {step} of {STEPS}; all is saved." in stopped["err"]
    resume(ask, folder, whole)


def test_stopped_behind_the_last_step_in_the_middle_of_an_epoch(fresh):
    folder, ask, _, _ = fresh
    run = [*RUN, "--max_steps", 7]
    assert ask(*run, "--output_dir", "through")[0]["code"] == 0
    assert ask(*run, step=7, signal=signal.SIGTERM)[0]["code"] == 130
    resume(ask, folder, left(folder/"through"), run=run)


def test_two_processes_stop_behind_the_same_step_and_go_on_together(fresh):
    folder, ask, _, _ = fresh
    run = [*RUN, "--gradient_accumulation_steps", 1]
    assert [a["code"] for a in ask(*run, "--output_dir", "through", processes=2)] == [0, 0]
    whole = left(folder/"through")
    stopped = ask(*run, processes=2, step=7, signal=signal.SIGTERM)
    assert [a["code"] for a in stopped] == [130, 130] and "Stopped after step 7 of 10" in stopped[0]["err"], stopped
    assert "torchrun --nproc_per_node 2 -m seqgpt.cli train --config outputs/config.yaml --resume" in stopped[0]["err"] and "Stopped" not in stopped[1]["err"]
    resume(ask, folder, whole, run=run, processes=2)


def test_more_epochs(fresh):
    folder, ask, _, _ = fresh
    constant = [*RUN, "--lr_scheduler_type", "constant", "--eval_steps", 5]
    assert ask(*constant, "--output_dir", "through", "--num_epochs", 4)[0]["code"] == 0
    assert ask(*constant)[0]["code"] == 0
    assert "Going on from outputs/checkpoints/checkpoint-10" in resume(ask, folder, left(folder/"through"), "--num_epochs", 4, run=constant)["out"]
    assert ask(*RUN, "--output_dir", "cosine")[0]["code"] == 0
    assert ask(*RUN, "--output_dir", "cosine", "--num_epochs", 4, "--learning_rate", 1e-3, "--eval_steps", 5, "--resume")[0]["code"] == 0
    rates = {log["step"]: log["learning_rate"] for log in history(folder/"cosine") if "learning_rate" in log}
    assert rates[12] == pytest.approx(1e-3*(1 + np.cos(np.pi*11/20))/2) # the curve of the longer run, at the new height; step 12 is the eleventh after the first
    assert [log["step"] for log in history(folder/"cosine") if "eval_loss" in log] == [4, 8, 10, 15, 20]


@pytest.mark.parametrize("damage", [
    lambda c: (c/"state.safetensors").write_bytes((c/"state.safetensors").read_bytes()[:-1]), lambda c: (c/"model.safetensors").write_bytes(b""), lambda c: (c/"trainer_state.json").write_text("{}"),
    lambda c: (c/"trainer_state.json").write_text('{"global_step": "x"}'), lambda c: save_file({}, c/"state.safetensors"), lambda c: save_file({}, c/"state.safetensors", {"form": "{}"})],
    ids=["state cut short", "no weights", "no step", "no number", "no form", "empty form"])
def test_a_damaged_checkpoint_is_passed_over(fresh, damage):
    folder, ask, whole, _ = fresh
    assert ask(*RUN, step=9, signal=signal.SIGTERM)[0]["code"] == 130
    damage(folder/"outputs/checkpoints/checkpoint-9")
    said = resume(ask, folder, whole)["out"]
    assert "checkpoint-9: is damaged" in said and "Going on from outputs/checkpoints/checkpoint-8" in said


def test_weights_of_another_model_are_no_checkpoint(fresh):
    folder, ask, whole, _ = fresh
    assert ask(*RUN, step=9, signal=signal.SIGTERM)[0]["code"] == 130
    checkpoint = folder/"outputs/checkpoints/checkpoint-9"
    save_file({"x": torch.zeros(3)}, checkpoint/"model.safetensors", {"format": "pt"})
    refused, = ask(*RUN, "--resume")
    assert refused["code"] == 2 and "checkpoint-9/model.safetensors: holds the weights of another model" in refused["err"], refused
    shutil.rmtree(checkpoint)
    resume(ask, folder, whole)


def test_links_in_a_run_folder_are_not_followed(fresh):
    folder, ask, _, _ = fresh
    (folder/"outputs").mkdir()
    (folder/"through/checkpoint-1").mkdir(parents=True)
    (folder/"outputs/checkpoints").symlink_to("../through")
    refused, = ask(*RUN)
    assert refused["code"] == 2 and "outputs/checkpoints: is a link" in refused["err"] and [p.name for p in (folder/"through").iterdir()] == ["checkpoint-1"], refused


def test_two_runs_in_one_folder(fresh):
    folder, ask, whole, _ = fresh
    answers = sorted(ask(*RUN, runs=2), key=lambda a: a["code"])
    assert [a["code"] for a in answers] == [0, 2] and len(answers[1]["err"].splitlines()) == 1, answers
    assert "another run is writing there" in answers[1]["err"] or "holds an earlier run" in answers[1]["err"]
    assert left(folder/"outputs") == whole


def test_nothing_is_a_pickle(place):
    folder, ask, _, _ = place
    assert ask(*RUN, "--output_dir", "pickles")[0]["code"] == 0
    files = [p for p in (folder/"pickles").rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")] and not [p for p in files if p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]
    state = load_file(folder/"pickles/checkpoints/checkpoint-10/state.safetensors")
    assert len(state) > 2*10 # two moments for each table of weights


# --- disks

@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    "A small disk of its own, where one can be had; `ask(shell=...)` changes its size."
    folder = tmp_path_factory.mktemp("disk")
    mount = f"mount -t tmpfs -o size=20m tmpfs {folder}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode: pytest.skip("no disk can be mounted here")
    with runner("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh") as forks:
        ask = partial(forks, cwd=folder)
        write = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; from test_crashes import write_scales; write_scales(Path('.'))"
        assert not ask(shell=f"{sys.executable} -c {json.dumps(write)}")
        yield folder, ask


@pytest.mark.parametrize("room", [1, 16, 60, 150, 250, 330])
def test_full_disk(disk, room):
    folder, ask = disk
    ask(shell=f"rm -rf outputs cache through; mount -o remount,size=20m {folder}")
    ask(shell=f"fallocate -l $(( $(df --output=avail -B1 . | tail -1) - {room}*1024 )) filler")
    full, = ask(*RUN)
    assert full["code"] == 1 and "No space left on device" in full["err"] and "--resume" in full["err"] and len(full["err"].splitlines()) <= 3, full
    ask(shell="rm filler")
    again, = ask(*RUN, "--resume")
    assert again["code"] == 0, again
    assert ask(*RUN, "--output_dir", "through")[0]["code"] == 0
    assert not ask(shell="cmp outputs/final_model/model.safetensors through/final_model/model.safetensors; cmp outputs/samples.jsonl through/samples.jsonl; find outputs -name '.*.part' >&2")


def test_read_only_disk(disk):
    folder, ask = disk
    ask(shell=f"rm -rf outputs cache; mount -o remount,ro {folder}")
    for argv in (RUN, ["corpus", "digits", "--out_dir", "digits"], ["corpus", "markov", "--num_sequences", 5, "--out_dir", "markov"]):
        refused, = ask(*argv)
        assert refused["code"] == 2 and "Read-only file system" in refused["err"] and "Choose another place" in refused["err"] and len(refused["err"].splitlines()) == 1, refused
    ask(shell=f"mount -o remount,rw {folder}")
