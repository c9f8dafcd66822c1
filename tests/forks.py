"""Runs and pages, each in a fork of one process that has imported everything: starting a new process takes seconds.

`python forks.py`, then a job on each line of standard input, as JSON; the answer is a line of standard output. A job works in the folder `cwd`.

- `page`: a notebook, run from top to bottom as `nbdev-test` does; also its cells marked with one of `flags`. The answer: whether it `passed`, and what was `printed`.
- `argv` of `seqgpt`, with these if wanted: `event`, `seconds` or `step`: a `signal` (default: SIGKILL) comes after so many file operations, after so long, or at the end of that step (to the
  last process only); `processes`, that train together; `runs`, at the same time. The answer is a list, for each process: exit code (-9: killed), what was printed, number of file operations.
- a command for the `shell`. The answer: its standard error.
"""
import atexit
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import fastcore.all # noqa: F401 so that no run and no page has to import anything
import matplotlib.pyplot # noqa: F401
import seaborn # noqa: F401
import torch.utils.tensorboard # noqa: F401
from accelerate import DistributedType
from nbdev.config import get_config
from nbdev.test import test_nb

import seqgpt.bench # noqa: F401
import seqgpt.classification # noqa: F401
import seqgpt.export # noqa: F401
import seqgpt.serving # noqa: F401
from seqgpt import cli, training
from seqgpt.cli import main
from seqgpt.training import StopOnSignal

WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def send_when_it_is_time(job, rank, answer):
    "Counts what is done to files in this folder; sends this process its signal."
    send = lambda *_: os.kill(os.getpid(), job.get("signal", signal.SIGKILL))
    def hook(event, args):
        if event not in WRITES or os.path.isabs(str(args[0])) and not str(args[0]).startswith(os.getcwd()) or event == "open" and args[1] in ("r", "rb"): return
        answer["events"] += 1
        if answer["events"] == job.get("event"): send()
    sys.addaudithook(hook)
    if "seconds" in job: signal.signal(signal.SIGALRM, send), signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    if "step" in job and rank == job.get("processes", 1) - 1:
        end = StopOnSignal.on_step_end
        StopOnSignal.on_step_end = lambda self, args, state, control, **kwargs: (state.global_step == job["step"] and send(), end(self, args, state, control, **kwargs))[1]


def share_out():
    "What `accelerate launch --use_fsdp --fsdp_version 2` does on GPUs; on processors Accelerate shares no model out, though PyTorch can: it is told that these are GPUs."
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP="GPT2Block", FSDP_RESHARD_AFTER_FORWARD="true")
    arguments = training.training_arguments
    def on_gpus(*args):
        made = arguments(*args)
        made.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made
    training.training_arguments = on_gpus


def child(job, rank, write):
    "Runs the command; writes its output, unless it is killed."
    if "port" in job: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]), LOCAL_WORLD_SIZE=str(job["processes"]), MASTER_ADDR="localhost", MASTER_PORT=str(job["port"]))
    if job.get("fsdp"): share_out()
    if job.get("bare"): cli.show_run = lambda config, run: None
    answer, out, err = {"events": 0}, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        send_when_it_is_time(job, rank, answer)
        try: code = main([str(a) for a in job["argv"]])
        except BaseException: code = traceback.print_exc() or 99
    os.write(write, json.dumps({**answer, "code": code, "out": out.getvalue(), "err": err.getvalue()}).encode())
    os._exit(0)


def run_page(path, flags=()):
    "Runs a notebook in a child; at its end what it has started is stopped, and what it has written for itself is removed."
    with tempfile.TemporaryFile("w+") as said:
        if (pid := os.fork()) == 0:
            for stream in (1, 2): os.dup2(said.fileno(), stream)
            config = get_config(Path(path).parent)
            passed, _ = test_nb(path, skip_flags=config.tst_flags.split(), force_flags=flags, basepath=config.config_path)
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr): stream.flush()
            os._exit(not passed) # a whole exit would end threads of this process, which the child does not have
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return {"passed": code == 0, "printed": said.read()}


def run(job):
    "One job, in one process or several."
    if "page" in job: return run_page(job["page"], job.get("flags", ()))
    if "shell" in job: return subprocess.run(job["shell"], shell=True, capture_output=True, text=True).stderr
    if "processes" in job:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            job["port"] = s.getsockname()[1]
    children = []
    for rank in range(job.get("processes", job.get("runs", 1))):
        read, write = os.pipe()
        if (pid := os.fork()) == 0: child(job, rank, write)
        os.close(write)
        children.append((pid, read))
    answers = []
    for pid, read in children:
        with os.fdopen(read) as f: text = f.read()
        os.waitpid(pid, 0)
        answers.append(json.loads(text) if text else {"code": -9})
    return answers


if __name__ == "__main__":
    assert threading.active_count() == 1, threading.enumerate()
    for line in sys.stdin:
        job = json.loads(line)
        os.chdir(job["cwd"])
        print(json.dumps(run(job)), flush=True)
