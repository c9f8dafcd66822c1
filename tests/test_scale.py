"The recipes in nbs/tutorials/scale, as far as they run without GPUs, Slurm and a cloud."
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, VOCAB
from test_crashes import write_scales

SCALE = ROOT/"nbs/tutorials/scale"
TRAIN = ["--data_path", "data.jsonl", "--max_length", "12", "--eval_steps", "20", *TINY, "--batch_size", "8",
         "--max_steps", "1000000"] # it has to be stopped
LIMIT = 600 # seconds, on a machine that does much else


def start(folder, *command, **env):
    "A recipe in `folder`, with this Python; programs and sources that are there come before those that are installed."
    path = os.pathsep.join(map(str, [folder, Path(sys.executable).parent, os.environ["PATH"]]))
    sources = os.pathsep.join(map(str, [folder, ROOT, os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": sources, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(LIMIT), "PATH": path, **env}
    return subprocess.Popen([*map(str, command)], cwd=folder, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    "What it has printed, in an exit code as expected."
    out = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == code, out
    return out


def wait_until(there, process):
    "Until `process` is so far."
    end = time.monotonic() + LIMIT
    while not there():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


def checkpoint(outputs): return lambda: any(outputs.glob("checkpoints/checkpoint-*"))


def calls(folder): return (folder/"calls").read_text().splitlines() if (folder/"calls").exists() else []


def child(pid):
    "The only child process of a shell that is no `sleep`."
    return next(p.pid for p in psutil.Process(pid).children() if "seqgpt" in " ".join(p.cmdline()))


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def program(folder, name, text):
    (folder/name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder/name).chmod(0o755)


# a program that goes on until it gets a SIGTERM
STOPPED_BY = "trap '{}' TERM; echo \"$*\" >> calls; while :; do sleep 0.05 & wait $!; done"


@pytest.mark.parametrize("name", ["one_node.sh", "slurm.sbatch", "spot.sh"])
def test_shell_syntax(name): assert subprocess.run(["bash", "-n", SCALE/name]).returncode == 0


def test_one_node(tmp_path):
    """Two processes that train, told to stop as Slurm would (SIGUSR1); that they go on to the same weights is tested in
    test_crashes.py."""
    write_scales(tmp_path)
    run = start(tmp_path, "bash", SCALE/"one_node.sh", *TRAIN, "--output_dir", "two", PROCESSES="2")
    wait_until(checkpoint(tmp_path/"two"), run)
    run.send_signal(signal.SIGUSR1)
    said = finish(run, 1) # torchrun's only code for what is not 0
    says = (r"Stopped after step (\d+) of 1000000; all is saved. Go on with: "
            r"torchrun --nproc_per_node 2 -m seqgpt.cli train --config two/config.yaml --resume")
    going_on = re.search(says, said)
    assert going_on, said
    assert (tmp_path/f"two/checkpoints/checkpoint-{going_on[1]}").exists()
    assert json.loads((tmp_path/"two/split.json").read_text())["processes"] == 2


# --- Slurm: two machines, played by two processes of this one; the real torchrun, which starts a stand-in for training

TRAINING = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ["ASKED"])))
call = [*map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_PORT")), *sys.argv[1:]]
with open("calls", "a") as f: f.write(" ".join(call) + "\\n")
while "ALONE" not in os.environ: time.sleep(0.05)
sys.exit(int(os.environ["ALONE"]))
"""
# srun starts its command twice, and passes a SIGTERM on
SRUN = r"""
trap told=yes TERM # passed on below, when both numbers are known
"$@" & a=$!
"$@" & b=$!
for p in $a $b; do
    while kill -0 $p 2> /dev/null; do
        if [ "${told-}" ]; then kill -TERM $a $b; told=; fi
        sleep 0.05 & wait $!
    done
    wait $p || code=$?
done
exit ${code:-0}
"""

@pytest.fixture
def slurm(tmp_path):
    """`slurm(torchrun=..., ...)` starts the script, where a training ends with the exit code ALONE by itself, with
    ASKED when it is told to."""
    job = dict(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1")
    program(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi')
    program(tmp_path, "srun", SRUN)
    (tmp_path/"seqgpt").mkdir()
    for name, text in {"__init__.py": "", "cli.py": TRAINING}.items(): (tmp_path/"seqgpt"/name).write_text(text)
    def slurm(torchrun=None, **env):
        if torchrun: program(tmp_path, "torchrun", torchrun)
        return start(tmp_path, "bash", SCALE/"slurm.sbatch", "--data_path", "data", **job, **env)
    return slurm


def test_slurm(slurm, tmp_path):
    "Each machine starts its process, they know each other, and are told to stop; then the job is queued again."
    lines = (SCALE/"slurm.sbatch").read_text().splitlines()
    asked = dict(line.split()[1].partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert asked["--signal"] == "B:TERM@120" and "--requeue" in asked
    job = slurm(PORT=free_port(), ASKED="130")
    wait_until(lambda: len(calls(tmp_path)) == 2, job)
    def parts(call):
        rank, machines, port, command = call.split(" ", 3)
        return port, [rank, machines, command]
    (port, one), (same, other) = map(parts, sorted(calls(tmp_path)))
    assert [one, other] == [[rank, "2", "train --data_path data --resume"] for rank in "01"] and port == same
    job.send_signal(signal.SIGTERM)
    finish(job, 1)
    assert (tmp_path/"requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("torchrun, told, code, requeued", [
    pytest.param("exit 0", None, 0, False, id="finished"),
    pytest.param("exit 1", None, 1, False, id="failed"),
    pytest.param(STOPPED_BY.format("exit 0"), signal.SIGTERM, 0, False, id="finished when told to stop"),
    pytest.param(STOPPED_BY.format("exit 1"), signal.SIGUSR1, 1, True, id="stopped"),
])
def test_slurm_queues_again_what_was_stopped_only(torchrun, told, code, requeued, slurm, tmp_path):
    job = slurm(torchrun)
    if told:
        wait_until(lambda: len(calls(tmp_path)) == 2, job)
        job.send_signal(told)
    finish(job, code)
    assert (tmp_path/"requeued").exists() == requeued
    call = ("--nnodes 2 --nproc_per_node 1 --rdzv_id 7 --rdzv_backend c10d --rdzv_endpoint localhost:20007 "
            "-m seqgpt.cli train --data_path data --resume")
    if told: assert calls(tmp_path) == [call]*2


# --- a machine that may be taken away

def test_spot(tmp_path):
    "A training, told to stop by its machine; that it goes on to the same weights is tested in test_crashes.py."
    write_scales(tmp_path)
    machine = start(tmp_path, "bash", SCALE/"spot.sh", *TRAIN, STATE="spot", POLL="0.1")
    wait_until(checkpoint(tmp_path/"spot/outputs"), machine)
    machine.send_signal(signal.SIGTERM)
    assert finish(machine) == "Stopped; all is saved in spot/outputs.\n"
    step = re.search(r"Stopped after step (\d+) of 1000000; all is saved.", (tmp_path/"spot/train.log").read_text())[1]
    assert (tmp_path/f"spot/outputs/checkpoints/checkpoint-{step}").exists()


@pytest.fixture
def spot(tmp_path):
    "`spot(python)`: a machine with this program instead of Python, which would train."
    def spot(python, **env):
        program(tmp_path, "python", python)
        return start(tmp_path, "bash", SCALE/"spot.sh", "--data_path", "data", STATE="spot", POLL="0.1", **env)
    return spot


def test_spot_starts_again(spot, tmp_path):
    "First the training alone is stopped, and started again; then the machine is; another one finishes."
    machine = spot(STOPPED_BY.format("echo all is saved; exit 130"))
    for n in (1, 2):
        wait_until(lambda: len(calls(tmp_path)) == n, machine)
        os.kill(child(machine.pid) if n == 1 else machine.pid, signal.SIGTERM)
    assert finish(machine) == "Stopped; all is saved in spot/outputs.\n"*2
    call = "-m seqgpt.cli train --data_path data --output_dir spot/outputs --cache_dir spot/cache --resume"
    assert calls(tmp_path) == [call]*2
    finished = "echo seqgpt train: spot/outputs: the run is finished, after 9 steps; exit 2"
    assert finish(spot("exit 0")) == finish(spot(finished)) == "Finished: spot/outputs\n"


def test_spot_takes_notice(spot, tmp_path):
    machine = spot(STOPPED_BY.format("echo all is saved; exit 130"), NOTICE="test -e notice")
    wait_until(lambda: calls(tmp_path), machine)
    (tmp_path/"notice").touch()
    assert finish(machine) == "Stopped; all is saved in spot/outputs.\n"
    early = spot(STOPPED_BY.format("exit 143"), NOTICE="test -e notice") # at its start; nothing is lost
    assert "Stopped before it had saved" in finish(early, 1)


def test_spot_gives_up(spot):
    "On mistakes at once, on failures after three."
    assert finish(spot("echo a mistake; exit 2"), 2) == "a mistake\n"
    failed = finish(spot("echo out of memory; exit 1"), 1)
    assert failed == "out of memory\n"*3 + "Failed 3 times; see spot/train.log.\n"


def test_fsdp():
    "Accelerate takes everything in the file, and the block is one of the model's."
    from accelerate.commands.config.config_args import load_config_from_file
    from transformers.models.gpt2 import modeling_gpt2
    found = load_config_from_file(str(SCALE/"fsdp.yaml"))
    assert found.distributed_type == "FSDP" and found.num_processes == 8 and found.fsdp_config["fsdp_version"] == 2
    assert hasattr(modeling_gpt2, found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])


def test_measuring_on_one_gpu(tmp_path, monkeypatch, capsys):
    "Here on a CPU, with two small models; the page `on_paper` reads these lines."
    monkeypatch.syspath_prepend(SCALE)
    import measure
    monkeypatch.setattr(measure, "BATCHES", (1, 2))
    monkeypatch.setattr(measure, "STEPS", 2)
    monkeypatch.setattr("sys.argv", ["measure.py", "--tiny", str(tmp_path/"out.json")])
    measure.main()
    assert capsys.readouterr().out == (tmp_path/"out.json").read_text()
    head, *lines = map(json.loads, (tmp_path/"out.json").read_text().splitlines())
    assert head["activation_function"] == "gelu_pytorch_tanh" and head["matrix_flops"] > 1e6
    rows = [(r["model"], r["batch"], r["steps"]) for r in lines]
    assert rows == [("tiny", 1, 2), ("tiny", 2, 2), ("small", 1, 2), ("small", 2, 2)]


def test_measured_model_is_that_of_seqgpt(monkeypatch):
    "measure.py does without seqgpt, so that it runs anywhere."
    monkeypatch.syspath_prepend(SCALE)
    import measure

    from seqgpt.model import make_config
    from seqgpt.tokenizer import make_tokenizer
    ours = make_config(make_tokenizer(VOCAB, "test"), 64, 2, 2, 32).to_dict()
    theirs = measure.build(measure.TINY["tiny"], len(VOCAB), 64).config.to_dict()
    may_differ = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "architectures"}
    assert {k for k in ours if ours[k] != theirs.get(k)} <= may_differ
