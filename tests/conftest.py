"Everything is offline, small, and in a folder of its own."
import os
import sys
import tempfile
from pathlib import Path

cache = tempfile.TemporaryDirectory() # of encoded data; removed at the end
os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", MPLBACKEND="agg",
    HF_DATASETS_CACHE=cache.name,
    OMP_NUM_THREADS="1", # the tests run in parallel
    TORCH_FAKE_TENSOR_DISPATCH_CACHE="0") # it slows down exports, whose sizes stay open
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

import contextlib
import functools
import gc
import io
import json
import shutil
import socket
import subprocess
from unittest.mock import patch

import fastcore.docments
import matplotlib.figure
import numpy as np
import pytest
from browser import chromium # noqa: F401, a fixture
from filelock import FileLock
from matplotlib.layout_engine import ConstrainedLayoutEngine

# docments reads a module anew for each command; a process has one command, the tests have thousands
fastcore.docments.docments = functools.cache(fastcore.docments.docments)
# what the system was given outlives a process; waiting for the disk takes long
os.fsync = lambda fd: None
# nobody looks at pictures here; arranging them takes long
ConstrainedLayoutEngine.execute = lambda self, figure: None
ROOT = Path(__file__).parent.parent
TINY = "--n_layer 1 --n_head 2 --n_embd 16 --batch_size 16 --learning_rate 3e-3".split()
NOTES = ["C4", "D4", "E4", "F4", "G4"]
NAMES = ["down $", "up"] # of the classes of melodies; a dollar is special in pictures
SHORT = [{"tokens": NOTES[k % 5:] + NOTES[:k % 3], "label": NAMES[k % 2]} for k in range(40)] # sequences
VOCAB = {s: i for i, s in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *NOTES])}


def pytest_configure(config):
    "Starts the process for `forks`, one for all workers."
    if hasattr(config, "workerinput"): return
    os.environ["SEQGPT_FORKS"] = f"{cache.name}/forks"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.environ["SEQGPT_FORKS"])
        listening.listen()
        command = [sys.executable, Path(__file__).with_name("forks.py"), str(listening.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listening.fileno()])
    def end():
        process.stdin.close()
        process.wait()
    config.add_cleanup(end)


def pytest_collection_modifyitems(items):
    "Long ones first, so that no worker is left with one at the end."
    long = ("tests/test_site.py", "tests/test_jupyter.py", "tests/test_project.py::test_page_runs")
    def rank(item): return next((k for k, start in enumerate(long) if item.nodeid.startswith(start)), len(long))
    items.sort(key=rank)


frozen = set()


def pytest_runtest_setup():
    "What has been imported is no garbage: without this, each training would look through all of it."
    if len(sys.modules) < len(frozen) + 50: return
    gc.collect()
    gc.freeze()
    frozen.update(sys.modules)


@pytest.fixture(scope="session")
def forks():
    "Answers jobs in forks of one process, see forks.py: `forks(*argv, cwd=folder)`."
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["SEQGPT_FORKS"])
        with connection.makefile("rw") as lines:
            def ask(*argv, cwd, **job):
                print(json.dumps({"argv": [*map(str, argv)], "cwd": str(cwd), **job}), file=lines, flush=True)
                answer = lines.readline()
                if not answer: raise EOFError("tests/forks.py has ended: see the start of the output.")
                return json.loads(answer)
            yield ask


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    "`once(make)`: a copy of the folder that `make(folder)` fills when the first worker asks for it."
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent # of all workers
    def once(make):
        name = make.__name__
        folder = shared/f"once_{name}"
        done = shared/f"once_{name}.done"
        with FileLock(shared/f"once_{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return shutil.copytree(folder, tmp_path_factory.mktemp(name), dirs_exist_ok=True, symlinks=True)
    return once


@pytest.fixture(scope="session")
def melodies():
    "200 melodies: up or down the scale from a random note, labelled."
    rng = np.random.default_rng(0)
    starts = rng.integers(5, size=200)
    ups = rng.integers(2, size=200)
    def walk(start, step): return [NOTES[(start + step*k) % 5] for k in range(int(rng.integers(3, 12)))]
    return [(walk(start, 1 if up else -1), int(up)) for start, up in zip(starts, ups)]


def write_lines(folder, lines, vocab=VOCAB):
    "A corpus of given lines; bytes are written as they are."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"vocab.json").write_text(json.dumps(vocab))
    written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder/"data.jsonl").write_bytes(b"\n".join(written) + b"\n")
    return folder/"data.jsonl"


def read_json(path): return json.loads(path.read_text())
def read_lines(path): return [json.loads(line) for line in path.read_text().splitlines()]


def write_named(folder, melodies):
    "The melodies, with names for labels."
    return write_lines(folder, [{"tokens": t, "label": NAMES[l]} for t, l in melodies])


def seqgpt(*args, cwd, input="", bare=False, drawn=True):
    "Runs the command in this process, since a new one takes seconds. `bare`, `drawn`: see `left_out`."
    from seqgpt.cli import main
    with contextlib.chdir(cwd), left_out(bare, drawn), redirect(io.StringIO(input)) as (out, err):
        code = main([str(a) for a in args])
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def worked(*args, **options):
    "What `seqgpt` answers, with exit code 0."
    result = seqgpt(*args, **options)
    assert result.returncode == 0, result.stderr
    return result


@contextlib.contextmanager
def left_out(bare, drawn):
    """Leaves out what takes ten times as long as a few steps of a tiny model.

    `bare`: without the curves and everything after a training. Not `drawn`: the pictures are blank."""
    from seqgpt.commands import task_evaluation
    def blank(task): return task_evaluation(task)[0], lambda evaluation: matplotlib.figure.Figure()
    with contextlib.ExitStack() as stack:
        if bare: stack.enter_context(patch("seqgpt.commands.show_run"))
        if bare or not drawn:
            for module in ("training", "plots"): stack.enter_context(patch(f"seqgpt.{module}.save_curves"))
        if not drawn: stack.enter_context(patch("seqgpt.commands.task_evaluation", blank))
        yield


@contextlib.contextmanager
def redirect(stdin):
    "Standard input from `stdin`, standard output and error into strings."
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        before, sys.stdin = sys.stdin, stdin
        try: yield out, err
        finally: sys.stdin = before


def installed(*args, cwd):
    "Runs the installed command in `cwd`, with its progress bars."
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    command = ["seqgpt", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def refused(result, *words):
    "Exit code 2, one to three lines that hold `words`, no traceback."
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 3 and "Traceback" not in result.stderr, result.stderr
    for word in words: assert word in result.stderr, f"{word!r} is not in {result.stderr!r}"


@pytest.fixture(scope="session")
def runs(once):
    "A language model (outputs) and a classifier (c) of two steps with their data, no checkpoints and logs."
    def runs(folder):
        write_lines(folder, SHORT)
        for task, out in (("clm", "outputs"), ("classification", "c")):
            worked("train", "--task", task, "--data_path", "data.jsonl", "--output_dir", out, "--max_length", 16,
                   "--max_steps", 2, *TINY, cwd=folder, bare=True)
            for part in ("checkpoints", "runs", "final_model"): shutil.rmtree(folder/out/part)
    return once(runs)


@pytest.fixture
def copied(runs, tmp_path): return shutil.copytree(runs, tmp_path/"work")


def rebuilt(path, change):
    "A file of safetensors with another head, or other bytes."
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    head, body = change(json.loads(content[8:8 + n]), content[8 + n:])
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)


@pytest.fixture(scope="session")
def trained(melodies, once):
    "The folder of a finished run on the melodies, with the output of the command."
    def trained(folder):
        write_lines(folder, [{"tokens": t, "label": l} for t, l in melodies])
        flags = ["--data_path", "data.jsonl", "--num_epochs", 2, "--max_length", 16, *TINY]
        result = installed("train", *flags, cwd=folder)
        assert result.returncode == 0, result.stderr
        (folder/"printed.txt").write_text(result.stdout)
        (folder/"bars.txt").write_text(result.stderr)
    return once(trained)


@pytest.fixture(scope="session")
def classifier(melodies, once):
    "The folder of a language model of the melodies, and of a classifier made from it."
    def classifier(folder):
        write_named(folder, melodies)
        flags = ["--data_path", "data.jsonl", "--output_dir", "lm", "--num_epochs", 4, "--max_length", 16]
        worked("train", *flags, *TINY, cwd=folder, bare=True)
        flags = ["--task", "classification", "--init_from", "lm/best_model", "--output_dir", "c",
                 "--num_epochs", 60, "--eval_steps", 100, "--learning_rate", 1e-2, "--batch_size", 16,
                 "--precision", "fp32"]
        no_dropout = ["--model.resid_pdrop", 0, "--model.embd_pdrop", 0, "--model.attn_pdrop", 0]
        result = worked("train", *flags, *no_dropout, cwd=folder)
        (folder/"printed.txt").write_text(result.stdout)
    return once(classifier)
