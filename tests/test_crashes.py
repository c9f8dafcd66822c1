"Runs that are killed, stopped or run out of disk at any moment end with the same bytes as an undisturbed run."
import functools
import itertools
import json
import random
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import NOTES, TINY, write_lines
from safetensors.torch import load_file, save_file

from seqgpt.callbacks import StopOnSignal
from seqgpt.checks import existing_model
from seqgpt.cli import main, stop_on_signals
from seqgpt.loading import load_folder, load_model, task_of

RUN = ["train", "--data_path", "data.jsonl", "--cache_dir", "cache", "--max_length", 12, "--num_epochs", 2,
       "--eval_steps", 4, "--logging_steps", 3, "--precision", "fp32", *TINY,
       "--batch_size", 8, "--gradient_accumulation_steps", 2]
STEPS = 10 # 5 in an epoch
CLASSIFIER = ["--task", "classification", "--class_weights", "balanced"]
LOW_RANK = ["--init_from", "lm/best_model", "--n_layer", 2, "--frozen_layers", 1, "--lora_rank", 2]
STREAM = ["--data_path", "shards", "--validation_fraction", 0.3, "--streaming", "--max_steps", STEPS]
TWO = {"processes": 2}
ONE_BATCH = ["--gradient_accumulation_steps", 1]
WAYS = { # of training: each saves something else, or goes on with it in another way
    "adamw": ([], {}),
    "muon": (["--optimizer", "muon"], {}),
    "adamw in 16 bits": (["--precision", "bf16"], {}),
    "muon in 16 bits": (["--optimizer", "muon", "--precision", "bf16"], {}),
    "classifier": (CLASSIFIER, {}),
    "classifier with muon": ([*CLASSIFIER, "--optimizer", "muon"], {}),
    "low rank": (LOW_RANK, {}),
    "low rank with muon": ([*LOW_RANK, "--optimizer", "muon"], {}),
    "low-rank classifier": ([*LOW_RANK, *CLASSIFIER], {}),
    "stream": (STREAM, {}),
    "stream with muon": ([*STREAM, "--optimizer", "muon"], {}),
    "two processes": (ONE_BATCH, TWO),
    "stream in two processes": ([*STREAM, *ONE_BATCH], TWO),
}
PLACES = {"middle": 4, "end": 5} # of an epoch, where the run goes on: it saves every so many steps
CASES = [ # not each with each, but each of them several times
    *itertools.product(["adamw"], ["killed", "stopped", "full disk"], PLACES),
    ("muon", "killed", "middle"), ("muon", "stopped", "middle"),
    ("adamw in 16 bits", "stopped", "middle"),
    ("muon in 16 bits", "killed", "end"), ("muon in 16 bits", "stopped", "end"),
    ("classifier", "killed", "end"), ("classifier", "stopped", "end"), ("classifier", "full disk", "end"),
    ("classifier with muon", "killed", "middle"), ("classifier with muon", "stopped", "middle"),
    ("low rank", "killed", "middle"), ("low rank", "stopped", "middle"),
    ("low rank with muon", "stopped", "end"),
    ("low-rank classifier", "killed", "end"),
    ("stream", "killed", "end"), ("stream", "stopped", "end"), ("stream", "full disk", "end"),
    ("stream with muon", "stopped", "middle"),
    ("two processes", "killed", "end"), ("two processes", "stopped", "middle"),
    ("stream in two processes", "stopped", "middle"),
]


def write_scales(folder):
    "The data of most runs."
    starts = np.random.default_rng(0).integers(5, size=96).tolist()
    def scale(start): return [NOTES[(start + k) % 5] for k in range(9)]
    write_lines(folder, [{"tokens": scale(s), "label": "low" if s < 2 else "high"} for s in starts])


def write_shards(folder):
    "The data of streams: three files, with sequences of many lengths."
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 11, (90,), generator=generator).tolist()
    rows = [{"tokens": [NOTES[(k*k + j) % 5] for j in range(n)]} for k, n in enumerate(lengths)]
    for k in range(3): write_lines(folder/"shards", rows[k::3]).rename(folder/f"shards/{k}.jsonl")


def write_data(folder, args):
    "What a run with these arguments reads."
    if "--streaming" in args: write_shards(folder)
    else: write_scales(folder)


@pytest.fixture(scope="module")
def undisturbed(forks, once):
    """`undisturbed(way, place)`: the folder of a run that was left in peace, what it left behind, and how many
    file operations it took. With `bare=False` also its evaluation."""
    def lm(folder):
        write_scales(folder)
        done, = forks(*RUN, "--n_layer", 2, "--output_dir", "lm", cwd=folder, bare=True)
        assert done["code"] == 0, done
    def undisturbed(way="adamw", place="middle", bare=True):
        args, job = WAYS[way]
        def make(folder):
            write_data(folder, args)
            if "--init_from" in args: shutil.copytree(once(lm)/"lm", folder/"lm")
            answers = forks(*RUN, *args, "--eval_steps", PLACES[place], cwd=folder, bare=bare, **job)
            assert all(a["code"] == 0 for a in answers), answers
            (folder/"events").write_text(str(answers[0]["events"]))
        make.__name__ = f"undisturbed_{way}_{place}_{bare}".replace(" ", "_")
        folder = once(make)
        return folder, left(folder/"outputs", bare), int((folder/"events").read_text())
    return functools.cache(undisturbed)


@pytest.fixture
def fresh(forks, tmp_path):
    "A folder with data, and what answers jobs there."
    write_scales(tmp_path)
    return tmp_path, partial(forks, cwd=tmp_path, bare=True)


def history(outputs):
    "What was written down during a run, without times."
    newest = max((outputs/"checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    logs = json.loads((newest/"trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in log.items() if not k.endswith(("_runtime", "_per_second"))} for log in logs]


def left(outputs, bare=True):
    "Weights and history of a finished run; of one that is not bare, also evaluation and samples."
    assert not [*outputs.rglob(".*.part"), *outputs.rglob(".*.new")]
    names = ["final_model/model.safetensors", "best_model/model.safetensors", "split.json"]
    if not bare: names += ["best_model/evaluation/metrics.json", "best_model/evaluation/evaluation.png",
                           "samples.jsonl", "training_curves.png"]
    return {**{name: (outputs/name).read_bytes() for name in names}, "history": history(outputs)}


def resume(ask, folder, wanted, *argv, bare=True, **job):
    "Goes on to the end, where everything must be as if nothing had happened."
    best = folder/"outputs/best_model"
    if best.exists(): load_model(best, task_of(best))
    answers = ask(*argv, bare=bare, **job)
    first = answers[0]
    assert all(a["code"] == 0 for a in answers) or "the run is finished" in first["err"], answers
    found = left(folder/"outputs", bare)
    assert not [name for name in wanted if wanted[name] != found[name]]
    return first


def full_disk(folder, ask, run, wanted, bare=True, **job):
    "A run on a disk that is filled up; then there is room again, and it goes on."
    jobs = [
        {"shell": "cp -r $(ls -d ../* | grep -v disk) ."},
        {"argv": run, "bare": bare, **job},
        {"shell": "rm filler"},
        {"argv": [*run, "--resume"], "bare": bare},
        {"shell": "cp -r outputs .."},
    ]
    answers = ask(disk="20m", jobs=jobs)
    if answers is None: pytest.skip("no disk can be mounted here")
    copied, (full,), _, (again,), _ = answers
    assert not copied and full["code"] == 1, answers
    assert "No space left on device" in full["err"] and "--resume" in full["err"], full
    assert len(full["err"].splitlines()) <= 3, full
    assert again["code"] == 0 and left(folder/"outputs", bare) == wanted, again
    return full, again


@pytest.mark.parametrize("way, how, place", CASES)
def test_resumed_equals_uninterrupted(way, how, place, undisturbed, fresh):
    folder, ask = fresh
    args, job = WAYS[way]
    origin, wanted, _ = undisturbed(way, place)
    for name in ("lm", "shards"):
        if (origin/name).exists(): shutil.copytree(origin/name, folder/name)
    run = [*RUN, *args, "--eval_steps", PLACES[place]]
    save = PLACES[place]
    if how == "killed": # before its second checkpoint
        answers = ask(*run, step=7, **job)
        assert answers[-1]["code"] == -9 and all(a["code"] for a in answers), answers
        going_on = resume(ask, folder, wanted, *run, "--resume", **job)
    elif how == "stopped":
        save = {"middle": 7, "end": 5}[place]
        going_on = stop_and_resume(ask, folder, wanted, run, save, job)
    else: _, going_on = full_disk(folder, ask, run, wanted, step=2*save, fill=0)
    assert f"Going on from outputs/checkpoints/checkpoint-{save}." in going_on["out"]


def stop_and_resume(ask, folder, wanted, run, step, job):
    "Stops a run, and resumes it with the command that it names."
    first, *others = ask(*run, step=step, signal=signal.SIGTERM, **job)
    assert {a["code"] for a in (first, *others)} == {130}, first
    assert not any("Stopped" in a["err"] for a in others), others
    said = re.search(rf"Stopped after step {step} of {STEPS}; all is saved. Go on with: "
                     r"(seqgpt|torchrun --nproc_per_node 2 -m seqgpt.cli) "
                     r"(train --config outputs/config.yaml --resume)", first["err"])
    start, command = said.groups()
    assert (start == "seqgpt") == (not job)
    return resume(ask, folder, wanted, *command.split(), **job)


# --- at any moment

def moments(events, number, seed):
    "Numbers of file operations, drawn from all parts of a run."
    generator = random.Random(seed)
    return [generator.randint(1 + k*events//number, (k + 1)*events//number) for k in range(number)]


def kill(folder, ask, wanted, bare=True, **moment):
    for name in ("outputs", "cache"): shutil.rmtree(folder/name, ignore_errors=True)
    killed, = ask(*RUN, bare=bare, **moment)
    resume(ask, folder, wanted, *RUN, "--resume", bare=bare)
    return killed["code"] == -9


MANY = [pytest.param(seed, 20, marks=pytest.mark.slow) for seed in range(2, 5)]


@pytest.mark.parametrize("seed, kills", [(0, 3), (1, 3), *MANY])
def test_killed_at_any_moment(fresh, undisturbed, seed, kills):
    folder, ask = fresh
    _, wanted, events = undisturbed()
    for event in moments(events - 10, kills, seed): # a run has a few more or fewer of them
        assert kill(folder, ask, wanted, event=event)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_while_it_is_evaluated(fresh, undisturbed, kills):
    folder, ask = fresh
    _, wanted, all_events = undisturbed(bare=False)
    *_, events = undisturbed()
    for event in moments(all_events - 10 - events, kills, kills):
        assert kill(folder, ask, wanted, bare=False, event=events + event)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_after_any_time(fresh, undisturbed, seed):
    "Perhaps too late: what is hit depends on the machine."
    folder, ask = fresh
    seconds = random.Random(seed).uniform(0, 3)
    kill(folder, ask, undisturbed(bare=False)[1], bare=False, seconds=seconds)


KILLED = """
import os, signal, sys
from seqgpt.cli import main
def kill(event, args):
    if event == "os.rename" and os.path.basename(args[0]) == {name!r}: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
main({argv})
"""


@pytest.mark.parametrize("name, reader", [
    ("best_model", None), ("best_model", load_folder),
    (".best_model.seqgpt.new", None), (".best_model.seqgpt.new", load_folder), (".best_model.seqgpt.new", task_of),
    (".best_model.seqgpt.new", existing_model), # as the command line checks it first
])
def test_killed_while_a_folder_is_replaced(fresh, undisturbed, name, reader):
    "Before the old one loses its name, or before the new one gets it; and then it is asked for, or not."
    folder, ask = fresh
    ran = ask(code=KILLED.format(name=name, argv=[*map(str, RUN)]))
    assert "(exit code -9)" in ran["printed"], ran
    best = folder/"outputs/best_model"
    new = folder/"outputs/.best_model.seqgpt.new"
    assert new.exists() and best.exists() == (name == "best_model")
    if reader: assert reader(best)
    if reader: assert best.exists() and new.exists() == (name == "best_model")
    resume(ask, folder, undisturbed()[1], *RUN, "--resume")


def test_killed_while_a_folder_is_replaced_and_not_resumed(fresh):
    "What is there is still refused, as is any earlier run."
    folder, ask = fresh
    ask(code=KILLED.format(name=".best_model.seqgpt.new", argv=[*map(str, RUN)]))
    shutil.rmtree(folder/"outputs/checkpoints")
    refused, = ask(*RUN)
    assert refused["code"] == 2 and "outputs: holds an earlier run" in refused["err"], refused


def test_killed_again_and_again(fresh, undisturbed):
    folder, ask = fresh
    for step in (5, 6, 9):
        killed, = ask(*RUN, "--resume", step=step)
        assert killed["code"] == -9
    again = resume(ask, folder, undisturbed()[1], *RUN, "--resume")
    assert "Going on from outputs/checkpoints/checkpoint-8." in again["out"]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_any_moment(fresh, undisturbed, sig):
    folder, ask = fresh
    _, wanted, events = undisturbed()
    for event in moments(events, 2, sig):
        for name in ("outputs", "cache"): shutil.rmtree(folder/name, ignore_errors=True)
        stopped, = ask(*RUN, event=event, signal=sig)
        assert stopped["code"] in (0, 130) and "Traceback" not in stopped["err"], stopped
        if stopped["code"] == 130:
            assert len(stopped["err"].strip().splitlines()) == 1, stopped
            if (folder/"outputs/checkpoints").exists():
                assert "seqgpt train --config outputs/config.yaml --resume" in stopped["err"], stopped
        resume(ask, folder, wanted, *RUN, "--resume")


@pytest.mark.parametrize("step, sig", [(1, signal.SIGHUP), (4, signal.SIGUSR1), (STEPS, signal.SIGTERM)])
def test_stopped_at_the_first_step_at_a_validation_and_at_the_last(fresh, undisturbed, step, sig):
    folder, ask = fresh
    stopped, = ask(*RUN, step=step, signal=sig)
    assert stopped["code"] == 130 and f"Stopped after step {step} of {STEPS}; all is saved." in stopped["err"]
    resume(ask, folder, undisturbed()[1], *RUN, "--resume")


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_stopped_while_data_is_encoded(fresh, sig):
    "Before a training listens to signals itself, as in all other commands: what is half written is removed."
    folder, ask = fresh
    stopped, = ask(*RUN, event=3, signal=sig)
    assert stopped["code"] == 130 and stopped["err"] == "\nInterrupted.\n" and not (folder/"outputs").exists(), stopped
    assert not [p for p in (folder/"cache").rglob("*") if p.suffix != ".lock"]


def test_what_is_ignored_stays_ignored():
    "As SIGHUP after `nohup`; and afterwards all signals do what they did before."
    signals = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    before = {s: signal.signal(s, signal.SIG_DFL) for s in signals}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    def seen(): return [signal.getsignal(s) for s in signals]
    try:
        with StopOnSignal() as stop: assert seen() == [stop.request_stop, signal.SIG_IGN, stop.request_stop]
        mine = stop_on_signals()
        assert mine.keys() == {signal.SIGTERM, signal.SIGUSR1}
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for s, handler in mine.items(): signal.signal(s, handler)
        assert main(["corpus", "markov", "--num_sequences", "0"]) == 2
        assert seen() == [signal.SIG_DFL, signal.SIG_IGN, signal.SIG_DFL]
    finally:
        for s, handler in before.items(): signal.signal(s, handler)


def test_a_closed_terminal_does_not_keep_a_run_from_saving(fresh):
    "Printing to it is an error (EIO)."
    code = """
import os
from seqgpt.callbacks import StopOnSignal
ours, terminal = os.openpty()
real = os.dup(1)
os.dup2(terminal, 1)
os.close(terminal)
os.close(ours)
try: os.write(1, b"nobody reads this")
except OSError as e: failed = e.strerror
StopOnSignal().request_stop()
print("nobody reads this", flush=True)
os.dup2(real, 1)
print(failed, "at first", flush=True)
"""
    _, ask = fresh
    ran = ask(code=code)
    assert ran["passed"] and ran["printed"].startswith("Input/output error at first"), ran


def test_stopped_at_the_last_step_in_the_middle_of_an_epoch(fresh):
    folder, ask = fresh
    run = [*RUN, "--max_steps", 7]
    assert ask(*run, "--output_dir", "through")[0]["code"] == 0
    assert ask(*run, step=7, signal=signal.SIGTERM)[0]["code"] == 130
    resume(ask, folder, left(folder/"through"), *run, "--resume")


@pytest.mark.parametrize("room", [1, 16, 60, 150])
def test_full_disk(fresh, undisturbed, room):
    "From the beginning, but for so many KiB: each time another file finds no room."
    folder, ask = fresh
    full_disk(folder, ask, RUN, undisturbed()[1], event=1, fill=room*1024)


def test_full_disk_while_it_is_evaluated(fresh, undisturbed):
    folder, ask = fresh
    _, wanted, all_events = undisturbed(bare=False)
    *_, events = undisturbed()
    full_disk(folder, ask, RUN, wanted, bare=False, event=(events + all_events) // 2, fill=0)


def test_read_only_disk(fresh):
    _, ask = fresh
    runs = [
        [*RUN, "--data_path", "../data.jsonl"],
        ["corpus", "digits", "--out_dir", "digits"],
        ["corpus", "markov", "--num_sequences", 5, "--out_dir", "markov"],
    ]
    answers = ask(disk="20m", jobs=[{"shell": "mount -o remount,ro ."}, *[{"argv": argv} for argv in runs]])
    if answers is None: pytest.skip("no disk can be mounted here")
    for refused, in answers[1:]:
        assert refused["code"] == 2 and len(refused["err"].splitlines()) == 1, refused
        assert "Read-only file system" in refused["err"] and "Choose another place" in refused["err"], refused


# --- what a run may go on with

def test_more_epochs(fresh):
    folder, ask = fresh
    constant = [*RUN, "--lr_scheduler_type", "constant", "--eval_steps", 5]
    assert ask(*constant, "--output_dir", "through", "--num_epochs", 4)[0]["code"] == 0
    assert ask(*constant)[0]["code"] == 0
    again = resume(ask, folder, left(folder/"through"), *constant, "--num_epochs", 4, "--resume")
    assert "Going on from outputs/checkpoints/checkpoint-10" in again["out"]
    cosine = [*RUN, "--output_dir", "cosine"]
    more = ["--num_epochs", 4, "--learning_rate", 1e-3, "--eval_steps", 5]
    assert ask(*cosine)[0]["code"] == 0
    assert ask(*cosine, *more, "--resume")[0]["code"] == 0
    logs = history(folder/"cosine")
    rates = {log["step"]: log["learning_rate"] for log in logs if "learning_rate" in log}
    # the curve of the longer run, at the new height; step 12 is the eleventh after the first
    assert rates[12] == pytest.approx(1e-3*(1 + np.cos(np.pi*11/20))/2)
    assert [log["step"] for log in logs if "eval_loss" in log] == [4, 8, 10, 15, 20]


@pytest.fixture(scope="module")
def stopped(forks, once):
    "A run that was stopped after step 9."
    def stopped(folder):
        write_scales(folder)
        assert forks(*RUN, step=9, signal=signal.SIGTERM, cwd=folder, bare=True)[0]["code"] == 130
    return once(stopped)


def cut_short(path): path.write_bytes(path.read_bytes()[:-1])


DAMAGES = { # to a file of a checkpoint
    "state cut short": ("state.safetensors", cut_short),
    "no weights": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "no step": ("trainer_state.json", lambda path: path.write_text("{}")),
    "no number": ("trainer_state.json", lambda path: path.write_text('{"global_step": "x"}')),
    "no form": ("state.safetensors", lambda path: save_file({}, path)),
    "empty form": ("state.safetensors", lambda path: save_file({}, path, {"form": "{}"})),
}


@pytest.mark.parametrize("file, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over(stopped, fresh, undisturbed, file, damage):
    folder, ask = fresh
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    damage(folder/"outputs/checkpoints/checkpoint-9"/file)
    said = resume(ask, folder, undisturbed()[1], *RUN, "--resume")["out"]
    assert "checkpoint-9: is damaged" in said and "Going on from outputs/checkpoints/checkpoint-8" in said


def test_weights_of_another_model_are_no_checkpoint(stopped, fresh, undisturbed):
    folder, ask = fresh
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    checkpoint = folder/"outputs/checkpoints/checkpoint-9"
    save_file({"x": torch.zeros(3)}, checkpoint/"model.safetensors", {"format": "pt"})
    refused, = ask(*RUN, "--resume")
    assert refused["code"] == 2, refused
    assert "checkpoint-9/model.safetensors: holds the weights of another model" in refused["err"], refused
    shutil.rmtree(checkpoint)
    resume(ask, folder, undisturbed()[1], *RUN, "--resume")


def test_resume_in_python_shows_no_warning(fresh):
    "Neither that it now validates less often, nor that there is padding, on the right of sequences of many lengths."
    code = """
import transformers
from seqgpt.config import Config
from seqgpt.training import train
transformers.logging.set_verbosity_warning()
sizes = dict(n_layer=1, n_head=2, n_embd=16, max_length=12, precision="fp32")
for steps in (4, 8): train(Config("shards", max_steps=steps, resume=steps == 8, eval_steps=steps // 2, **sizes))
transformers.logging.get_logger("transformers.trainer").warning("as a warning is shown")
"""
    folder, ask = fresh
    write_shards(folder)
    ran = ask(code=code)
    assert ran["passed"] and "checkpoint-4" in ran["printed"], ran
    assert ran["printed"].count("[transformers]") == 1 and "as a warning is shown" in ran["printed"], ran


# --- what may be in the way

def test_links_in_a_run_folder_are_not_followed(fresh):
    folder, ask = fresh
    (folder/"outputs").mkdir()
    (folder/"through/checkpoint-1").mkdir(parents=True)
    (folder/"outputs/checkpoints").symlink_to("../through")
    refused, = ask(*RUN)
    assert refused["code"] == 2 and "outputs/checkpoints: is a link" in refused["err"], refused
    assert [p.name for p in (folder/"through").iterdir()] == ["checkpoint-1"]


def test_two_runs_in_one_folder(fresh, undisturbed):
    folder, ask = fresh
    answers = sorted(ask(*RUN, runs=2), key=lambda a: a["code"])
    assert [a["code"] for a in answers] == [0, 2] and len(answers[1]["err"].splitlines()) == 1, answers
    assert "another run is writing there" in answers[1]["err"] or "holds an earlier run" in answers[1]["err"]
    assert left(folder/"outputs") == undisturbed()[1]


def test_nothing_is_a_pickle(undisturbed):
    outputs = undisturbed(bare=False)[0]/"outputs"
    files = [p for p in outputs.rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not [p for p in files if p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]
    state = load_file(outputs/"checkpoints/checkpoint-10/state.safetensors")
    assert len(state) > 2*10 # two moments for each table of weights
