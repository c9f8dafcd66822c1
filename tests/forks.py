"""Runs and pages, each in a fork of one process that has imported everything, since a new one takes seconds.

`python forks.py FD` waits at a listening socket, which it inherits, until standard input ends. A client sends
jobs, a line of JSON for each, and gets a line in answer. A job works in the folder `cwd`.

- `page`: a notebook, run from top to bottom as `nbdev-test` does; also its cells marked with one of `flags`.
  Or `code`, run as a script. The answer: whether it `passed`, and what was `printed`.
- `argv` of `seqgpt`, with these if wanted:
  - `event`, `seconds` or `step`: a `signal` (default: SIGKILL) comes after so many file operations, after so
    long, or at the end of that step (to the last process only); with `fill`, the disk is filled up instead,
    until so many bytes are left;
  - `bare`: nothing after the training (no curves, evaluation and samples), and nobody waits for the disk;
  - `processes`, that train together, with `fsdp` sharding the model; `runs`, at the same time.

  The answer is a list, for each process: exit code (-9: killed), what was printed, number of file operations,
  and `places`, the files and folders in this one in which they were.
- a command for the `shell`. The answer: its standard error.
- `disk`, a size such as 20m, and `jobs`: they work one after the other on a disk of that size, in the folder
  `disk`, which nobody else sees and which is gone afterwards. The answer: a list of theirs; nothing where
  no disk can be had.
"""
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

if __name__ == "__main__": # what follows takes seconds: nothing of it until somebody asks
    listening = socket.socket(fileno=int(sys.argv[1]))
    if sys.stdin in select.select([listening, sys.stdin], [], [])[0]: sys.exit()

import fastcore.docments
import numpy as np
import torch
from accelerate import DistributedType
from matplotlib.layout_engine import ConstrainedLayoutEngine
from nbdev.config import get_config
from nbdev.test import test_nb
from sklearn.model_selection import train_test_split

from seqgpt import cli, commands, preparing, training
from seqgpt.arguments import parser_for
from seqgpt.callbacks import StopOnSignal
from seqgpt.config import Config
from seqgpt.model import make_config, new_model
from seqgpt.plots import save_curves
from seqgpt.saving import save_model
from seqgpt.tokenizer import make_tokenizer

IMPORTED = """
    fastcore.all optuna IPython.utils.capture matplotlib.pyplot PIL.Image rapidfuzz rouge_score.rouge_scorer sacrebleu
    scipy.optimize scipy.stats seaborn sklearn.calibration sklearn.dummy sklearn.ensemble
    sklearn.feature_extraction.text sklearn.linear_model sklearn.manifold sklearn.neighbors sklearn.svm
    torch.utils.tensorboard transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    transformers.trainer seqgpt.console seqgpt.onnx_folder seqgpt.reports seqgpt.serving"""
for name in IMPORTED.split(): importlib.import_module(name) # so that no run and no page has to

os.fsync = lambda fd: None # what the system was given outlives a killed process; waiting for the disk takes long
ConstrainedLayoutEngine.execute = lambda self, figure: None # nobody looks at pictures here; arranging them takes long
WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def is_counted(event, args):
    "Whether this changes a file in this folder."
    if event not in WRITES: return False
    path = str(args[0])
    if os.path.isabs(path) and not path.startswith(os.getcwd()): return False
    if event == "open" and args[1] in ("r", "rb"): return False
    # tried again and again while another process holds the lock
    if path.endswith(".lock") or event == "os.mkdir" and os.path.isdir(path): return False
    return True


def send_when_it_is_time(job, rank, answer):
    "Counts what is done to files in this folder; sends this process its signal, or fills the disk."
    def send(*_):
        if "fill" in job: fill_up(job["fill"])
        else: os.kill(os.getpid(), job.get("signal", signal.SIGKILL))
    folder = os.getcwd()
    def hook(event, args):
        if not is_counted(event, args): return
        answer["events"] += 1
        place = os.path.relpath(str(args[0]), folder).split(os.sep)[0]
        if place not in answer["places"]: answer["places"].append(place)
        if answer["events"] == job.get("event"): send()
    sys.addaudithook(hook)
    if "seconds" in job:
        signal.signal(signal.SIGALRM, send)
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    if "step" in job and rank == job.get("processes", 1) - 1: at_step(job["step"], send)


def at_step(step, send):
    "Calls `send` at the end of this step of a training."
    on_step_end = StopOnSignal.on_step_end
    def send_and_go_on(self, args, state, control, **kwargs):
        if state.global_step == step: send()
        return on_step_end(self, args, state, control, **kwargs)
    StopOnSignal.on_step_end = send_and_go_on


def fill_up(left):
    "Leaves so many bytes of this disk."
    disk = os.statvfs(".")
    file = os.open("filler", os.O_CREAT | os.O_WRONLY)
    os.posix_fallocate(file, 0, disk.f_bavail*disk.f_frsize - left)
    os.close(file)


def enable_fsdp():
    """What `accelerate launch --use_fsdp --fsdp_version 2` does on GPUs.

    Accelerate does not shard a model on CPUs, though PyTorch can: it is told that these are GPUs."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="GPT2Block", FSDP_RESHARD_AFTER_FORWARD="true")
    arguments = preparing.training_arguments
    def on_gpus(*args):
        made = arguments(*args)
        made.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made
    preparing.training_arguments = on_gpus


def child(job, rank, write):
    "Runs the command; writes its output, unless it is killed."
    if "port" in job:
        size = str(job["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
                          MASTER_ADDR="localhost", MASTER_PORT=str(job["port"]))
    if job.get("fsdp"): enable_fsdp()
    if job.get("bare"): commands.show_run = training.save_curves = lambda *_: None
    signal.signal(signal.SIGINT, signal.default_int_handler) # ignored where the tests run in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL) # ignored under nohup
    answer = {"events": 0, "places": []}
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        send_when_it_is_time(job, rank, answer)
        try: code = cli.main([str(a) for a in job["argv"]])
        except BaseException: code = traceback.print_exc() or 99
    answer |= {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    os.write(write, json.dumps(answer).encode())
    os._exit(0)


def run_page(path, flags=()):
    "Runs a notebook as `nbdev-test` does."
    config = get_config(Path(path).parent)
    return test_nb(path, skip_flags=config.tst_flags.split(), force_flags=flags, basepath=config.config_path)[0]


def run_code(code):
    "Runs a script."
    exec(code, {"__name__": "__main__"}) # noqa: S102, it is that of a test
    return True


DONE = 77 # exit code of a page that came to its end: it may have ended itself before, with another


def shown(do):
    "Calls `do` in a child, which says whether it passed; ends what the child has started, and removes its files."
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            for stream in (1, 2): os.dup2(said.fileno(), stream)
            passed = False
            try: passed = do()
            except BaseException: traceback.print_exc()
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr): stream.flush()
            os._exit(DONE if passed else 1) # not `sys.exit`: it would wait for threads that the child does not have
        try: code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
        said.seek(0)
        return {"passed": code == DONE, "printed": f"{said.read()}\n(exit code {code})"}


def mount_disk(size):
    "Mounts a small disk at `disk`, seen by this process alone, as root in its own namespace (`man unshare`)."
    user = os.getuid()
    group = os.getgid()
    if ctypes.CDLL(None).unshare(0x10000000 | 0x20000): return False # CLONE_NEWUSER, CLONE_NEWNS
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "disk"]
    return subprocess.run(mount, capture_output=True).returncode == 0


def on_disk(size, jobs):
    "Jobs on a small disk of their own, in a child."
    os.makedirs("disk", exist_ok=True)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        answers = None
        if mount_disk(size):
            os.chdir("disk")
            answers = [run(job) for job in jobs]
        with os.fdopen(write, "w") as f: json.dump(answers, f)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f: answers = json.load(f)
    os.waitpid(pid, 0)
    return answers


def run(job):
    "The answer to one job."
    if "page" in job: return shown(lambda: run_page(job["page"], job.get("flags", ())))
    if "code" in job: return shown(lambda: run_code(job["code"]))
    if "disk" in job: return on_disk(job["disk"], job["jobs"])
    if "shell" in job: return subprocess.run(job["shell"], shell=True, capture_output=True, text=True).stderr
    return run_command(job)


def run_command(job):
    "The command, in one process or several."
    if "processes" in job:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            job["port"] = s.getsockname()[1]
    children = []
    for rank in range(job.get("processes", job.get("runs", 1))):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0: child(job, rank, write)
        os.close(write)
        children.append((pid, read))
    answers = []
    for pid, read in children:
        with os.fdopen(read) as f: text = f.read()
        os.waitpid(pid, 0)
        answers.append(json.loads(text) if text else {"code": -9})
    return answers


def warm_up():
    "Makes what takes long and is made once in a process; and no child looks through all objects for garbage."
    fastcore.docments.docments = functools.cache(fastcore.docments.docments) # reads a module anew for each command
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        tokenizer = make_tokenizer({s: k for k, s in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "a"])})
        model = new_model(make_config(tokenizer, 4, 1, 1, 2), 0)
        save_model(Path(folder)/"model", model, tokenizer, Config(folder), {})
        save_curves([], Path(folder))
    parser_for("train", Config)
    train_test_split(np.arange(4))
    gc.collect()
    gc.freeze()


def serve(listening):
    "Answers each who connects in a process of its own, until standard input ends."
    while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            with connection.makefile("rw") as lines:
                for line in lines:
                    job = json.loads(line)
                    os.chdir(job["cwd"])
                    print(json.dumps(run(job)), file=lines, flush=True)
            os._exit(0)
        connection.close()
    with contextlib.suppress(ChildProcessError):
        while True: os.wait()


if __name__ == "__main__":
    warm_up()
    assert threading.active_count() == 1, threading.enumerate()
    serve(listening)
