"The recipes in nbs/tutorials/scale, as far as they run without GPUs, Slurm and a cloud."
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, VOCAB, seqgpt
from test_crashes import write_scales

SCALE = ROOT/"nbs/tutorials/scale"
TRAIN = ["--data_path", "data.jsonl", "--max_length", "12", "--logging_steps", "20", "--eval_steps", "40", *TINY, "--batch_size", "8", "--max_steps", "200"] # long enough to be stopped in the middle
WEIGHTS = "final_model/model.safetensors"


def start(folder, *command, **env):
    "A recipe in `folder`, with this Python and these sources."
    path = os.pathsep.join(map(str, [*env.pop("bin", []), Path(sys.executable).parent, os.environ["PATH"]]))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20", "PATH": path, **env}
    return subprocess.Popen([*map(str, command)], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    "What it has printed, in an exit code as expected."
    out = process.communicate(timeout=120)[0]
    assert process.returncode == code, out
    return out


def wait_for(path, process): wait_until(lambda: any(path.parent.glob(path.name)), process)


def wait_until(there, process):
    "Until the training of `process` is so far."
    end = time.monotonic() + 60
    while not there():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


def child(pid):
    "The only child process of a shell that is no `sleep`."
    return next(p.pid for p in psutil.Process(pid).children() if "seqgpt" in " ".join(p.cmdline()))


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Data, and stand-ins for what Slurm installs: two machines, played by two processes of this one."
    folder = tmp_path_factory.mktemp("scale")
    write_scales(folder)
    for name, text in {"scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi',
                       "srun": 'trap "kill -TERM \\$a \\$b" TERM; "$@" & a=$!; "$@" & b=$!; for p in $a $b; do wait $p; c=$?; while kill -0 $p 2> /dev/null; do wait $p; c=$?; done; [ $c = 0 ] || code=$c; done; exit ${code:-0}'}.items():
        (folder/name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder/name).chmod(0o755)
    return folder


same = lambda folder, a, b: (folder/a/WEIGHTS).read_bytes() == (folder/b/WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["one_node.sh", "slurm.sbatch", "spot.sh"])
def test_shell_syntax(name): assert subprocess.run(["bash", "-n", SCALE/name]).returncode == 0


def test_several_processes(folder):
    "Under Slurm a run is left in peace; another one is stopped, queued again, and goes on, here by the recipe for one machine."
    asked = dict(line.split()[1].partition("=")[::2] for line in (SCALE/"slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH"))
    assert asked["--signal"] == "B:TERM@120" and "--requeue" in asked
    def slurm(out): return start(folder, "bash", SCALE/"slurm.sbatch", *TRAIN, "--output_dir", out, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1", PORT=free_port(), bin=[folder])
    finish(slurm("through"))
    assert json.loads((folder/"through/split.json").read_text())["processes"] == 2 and not (folder/"requeued").exists()
    stopped = slurm("stopped")
    wait_for(folder/"stopped/checkpoints/checkpoint-*", stopped)
    stopped.send_signal(signal.SIGTERM)
    assert "all is saved" in finish(stopped, 1) # torchrun's only code for what is not 0
    assert (folder/"requeued").read_text() == "requeue 7\n"
    assert "Going on from" in finish(start(folder, "bash", SCALE/"one_node.sh", *TRAIN, "--output_dir", "stopped", PROCESSES="2"))
    assert same(folder, "stopped", "through")


def test_spot(folder):
    "First the training alone is stopped, and started again; then the machine is; another one finishes."
    def run(): return start(folder, "bash", SCALE/"spot.sh", *TRAIN, STATE="spot", POLL="0.1", NOTICE="test -e notice")
    machine = run()
    wait_for(folder/"spot/outputs/checkpoints/checkpoint-*", machine)
    os.kill(child(machine.pid), signal.SIGTERM)
    again = lambda: (folder/"spot/train.log").read_text().count("Going on from")
    wait_until(again, machine)
    machine.send_signal(signal.SIGTERM)
    said = finish(machine)
    assert said.count("all is saved") == 2 and "Finished" not in said and not (folder/"spot/outputs/final_model").exists(), said
    (folder/"notice").touch()
    assert "Stopped before it had saved" in finish(run(), 1) # at its start; nothing is lost
    (folder/"notice").unlink()
    assert "Finished" in finish(run()) and again() == 2
    assert seqgpt("train", *TRAIN, "--output_dir", "one", cwd=folder).returncode == 0
    assert same(folder, "spot/outputs", "one")


def test_spot_gives_up(folder):
    "On mistakes at once, on failures after three."
    run = lambda program: (folder/"python").write_text(f"#!/bin/sh\n{program}\n") and (folder/"python").chmod(0o755) or start(folder, "bash", SCALE/"spot.sh", STATE="wrong", POLL="0.1", bin=[folder])
    assert finish(run("echo a mistake; exit 2"), 2) == "a mistake\n"
    assert finish(run("echo out of memory; exit 1"), 1) == "out of memory\n"*3 + "Failed 3 times; see wrong/train.log.\n"


def test_fsdp():
    "Accelerate takes all that stands in the file, and the block is one of the model's."
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
    assert [(r["model"], r["batch"], r["steps"]) for r in lines] == [("tiny", 1, 2), ("tiny", 2, 2), ("small", 1, 2), ("small", 2, 2)]


def test_measured_model_is_that_of_seqgpt(monkeypatch):
    "measure.py does without seqgpt, so that it runs anywhere."
    monkeypatch.syspath_prepend(SCALE)
    import measure

    from seqgpt.model import make_config
    from seqgpt.tokenizer import make_tokenizer
    ours, theirs = make_config(make_tokenizer(VOCAB, "test"), 64, 2, 2, 32).to_dict(), measure.build(measure.TINY["tiny"], len(VOCAB), 64).config.to_dict()
    assert {k for k in ours if ours[k] != theirs.get(k)} <= {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "architectures"}
