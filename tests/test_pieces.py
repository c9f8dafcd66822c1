"A corpus in pieces is the same as in one; what is finished stays; what has changed is noticed."
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import NOTES, VOCAB
from filelock import FileLock, Timeout

from seqgpt.checks import InputError
from seqgpt.data import given_split, hash_below, train_validation_split
from seqgpt.encoding import read_corpus, shard_key
from seqgpt.files import locked
from seqgpt.rows import encoding_options
from seqgpt.sources import SUFFIXES, corpus_files, file_span, read_span, shard_files
from seqgpt.streaming import Stream, stream_corpus
from seqgpt.tokenizer import make_tokenizer

TOKENIZER = make_tokenizer(VOCAB)
KINDS = ("lines", "gzip", "parquet")


@pytest.fixture(autouse=True)
def one_core(monkeypatch): monkeypatch.setattr("seqgpt.encoding.cpu_count", lambda: 1) # to start helpers takes seconds


@pytest.fixture
def read(tmp_path):
    "Reads a corpus with pieces of a given size, encoded anew each time."
    def read(path, size=2**26, cache=None, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("seqgpt.encoding.SHARD_BYTES", size)
            kwargs["cache_dir"] = cache or tmp_path/f"cache{len([*tmp_path.iterdir()])}"
            return read_corpus(path, TOKENIZER, **kwargs)
    return read


def records(n, start=0):
    "Sequences of different lengths, some with a label."
    def record(k):
        notes = [NOTES[(k // 5**j + j) % 5] for j in range(1 + k % 7)]
        return {"tokens": notes} | ({"label": f"l{k % 3}"} if k % 2 else {})
    return [record(k) for k in range(start, start + n)]


def write(path, kind, rows, group=3):
    "The rows in a file of this kind; bytes are written as they are, where there are lines."
    content = b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    if kind == "parquet":
        schema = pa.schema({"tokens": pa.list_(pa.string()), "label": pa.string()})
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    else: path.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    return path


def same(a, b):
    "Two corpora are the same, whatever they were cut into."
    assert a.dataset[:] == b.dataset[:] and str(a) == str(b)
    assert {**a.report, "fingerprint": 0} == {**b.report, "fingerprint": 0}


LINES = [
    b"\xef\xbb\xbf" + json.dumps(records(1)[0]).encode(), *records(3), b"", b"x", b"  \r", *records(2, 3),
    b'{"tokens": ["H4"]}\r', b'{"tokens": ["H4", "I4"]}', b"\xef\xbb\xbf{}",
    b'{"tokens": ["J4"]}', b'{"tokens": ["K4"]}', *records(1, 9), b"",
]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_every_cut_of_a_file(end, read, tmp_path):
    path = write(tmp_path/"a", "lines", LINES)
    path.write_bytes(path.read_bytes() + end)
    want = read(path, skip_bad_lines=True)
    assert want.report["lines"] == len([line for line in LINES if line not in (b"", b"  \r")])
    assert ("unknown token: 4, at line 10 ('H4'), line 11 ('H4'), "
            "line 13 ('J4') and more") in str(want)
    n = path.stat().st_size
    lines = [*read_span(file_span(path))]
    for size in range(1, n + 2):
        found = []
        before = 0
        for (span,) in shard_files([path], size):
            part = [*read_span(span)]
            found += [(before + number, line) for number, line in part]
            before += len(part)
        assert found == lines, size
    for size in (1, 2, 5, 11, 23, 47, 95, 191, n - 1, n, n + 1):
        same(read(path, size, tmp_path/"cache", skip_bad_lines=True), want)


@pytest.mark.parametrize("long", ["truncate", "split"])
def test_every_mixture_in_every_size(long, read, tmp_path):
    (tmp_path/"c").mkdir()
    rows = records(60)
    for k in range(6): write(tmp_path/"c"/(f"{k}" + SUFFIXES[k % 3]), KINDS[k % 3], rows[10*k:10*k + 10])
    (tmp_path/"c/3.jsonl").touch() # comes between, and is empty
    want = read(write(tmp_path/"all.jsonl", "lines", rows), long=long, max_length=5)
    pieces = sum(-(-(len(r["tokens"]) + 1)//4) for r in rows)
    assert len(want.dataset) == (60 if long == "truncate" else pieces)
    assert want.report["sequences"] == 60
    files = corpus_files(tmp_path/"c")
    sizes = {len(shard_files(files, size)): size for size in (*range(1, 2000, 37), 2**26)}
    assert len(sizes) > 8 and min(sizes) == 1
    for size in sizes.values(): same(read(tmp_path/"c", size, long=long, max_length=5), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 50, 2**26])
def test_messages_name_the_line(kind, size, read, tmp_path):
    rows = [{"tokens": ["H4"]} if k in (0, 4, 17, 18) else r for k, r in enumerate(records(20))]
    places = "'H4'), {0}5 ('H4'), {0}18 ('H4') and more"
    with pytest.raises(InputError, match="4 of 20 lines") as e: read(write(tmp_path/"one", kind, rows), size)
    assert f"unknown token: 4, at line 1 ({places.format('line ')}" in str(e.value)
    (tmp_path/"c").mkdir()
    for name in "ab": write(tmp_path/"c"/(name + SUFFIXES[KINDS.index(kind)]), kind, rows)
    with pytest.raises(InputError, match="8 of 40 lines") as e: read(tmp_path/"c", size)
    file = f"a{SUFFIXES[KINDS.index(kind)]}:"
    assert f"unknown token: 8, at {file}1 ({places.format(file)}" in str(e.value)


@pytest.mark.parametrize("size", [200, 2**26])
def test_a_line_too_long_is_named_in_every_cut(size, read, tmp_path, monkeypatch):
    monkeypatch.setattr("seqgpt.sources.MAX_LINE_BYTES", 2**20)
    path = write(tmp_path/"a", "lines", [*records(20), b"[" * (2**20 + 5), *records(3)])
    with pytest.raises(InputError, match="a, line 21: is longer than 1 MiB"): read(path, size)


def test_long_rows_of_parquet_come_a_few_at_a_time(read, tmp_path, monkeypatch):
    sizes = []
    batches = pq.ParquetFile.iter_batches
    def spy(self, batch, *args):
        sizes.append(batch)
        return batches(self, batch, *args)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    rows = [{"tokens": NOTES * 20_000}] * 30
    corpus = read(write(tmp_path/"a", "parquet", rows, 30), max_length=200_000)
    assert corpus.report["tokens"] == 30*100_002 and 1 <= max(sizes) <= 11


def keys(cache):
    "The pieces that are finished, and since when."
    return {p.name: p.stat().st_mtime_ns for p in cache.glob("*.arrow") if p.with_suffix(".json").exists()}


def test_added_lines_touched_and_moved_files(read, tmp_path):
    path = write(tmp_path/"a", "lines", records(60))
    cache = tmp_path/"cache"
    first = read(path, 400, cache)
    done = keys(cache)
    assert len(done) > 5
    os.utime(path)
    same(read(path, 400, cache), first)
    assert keys(cache) == done
    moved = path.rename(tmp_path/"b")
    assert read(moved, 400, cache).report == first.report and keys(cache) == done
    with open(moved, "a") as f: f.write("\n" + json.dumps(records(1, 60)[0]))
    more = read(moved, 400, cache)
    assert more.report["sequences"] == 61 and more.report["fingerprint"] != first.report["fingerprint"]
    assert done.items() <= keys(cache).items() and len(keys(cache)) == len(done) + 1


def test_a_change_of_the_same_size_is_noticed(read, tmp_path):
    path = write(tmp_path/"a", "lines", records(20))
    cache = tmp_path/"cache"
    first = read(path, cache=cache)
    times = path.stat()
    for _ in range(5): # within a tick of the clock or not
        path.write_bytes(path.read_bytes().replace(b"C4", b"X4").replace(b"D4", b"C4").replace(b"X4", b"D4"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns)) # as `cp -p` does
        again = read(path, cache=cache)
        assert again.report["fingerprint"] != first.report["fingerprint"]
        assert again.dataset[:] != first.dataset[:]
        first = again


def test_a_note_is_believed_only_of_files_left_alone(read, tmp_path, monkeypatch):
    path = write(tmp_path/"a", "lines", records(20))
    cache = tmp_path/"cache"
    hashed = []
    key = shard_key
    monkeypatch.setattr("seqgpt.encoding.shard_key", lambda *args: hashed.append(1) or key(*args))
    for _ in range(2): read(path, cache=cache)
    assert len(hashed) == 2 # it is too new
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 3*10**9)
    want = read(path, cache=cache)
    assert len(hashed) == 3
    same(read(path, cache=cache), want)
    assert len(hashed) == 3 # believed
    next(cache.glob("*.arrow")).unlink()
    same(read(path, cache=cache), want)
    assert len(hashed) == 4


ENCODE = """
import os, signal, sys, time, seqgpt.encoding as E
from seqgpt.progress import attach_to_parent, tqdm
from seqgpt.tokenizer import make_tokenizer
encode = E.encode_shard

def wait_for_go(spans, *args):
    "Says something, encodes what begins in the first 12,000 bytes, and the rest once there is a file `go`."
    attach_to_parent(*args[-1])
    tqdm.write("a helper speaks")
    while spans[0].start >= 12_000 and not os.path.exists("go"): time.sleep(0.02)
    return encode(spans, *args)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler) # ignored where the tests run in the background
    E.SHARD_BYTES = 2_000
    E.encode_shard = wait_for_go
    E.cpu_count = lambda: 2
    print(E.read_corpus(sys.argv[1], make_tokenizer(sys.argv[2]), cache_dir=sys.argv[3]), flush=True)
"""


def encode(tmp_path, **kwargs):
    (tmp_path/"vocab.json").write_text(json.dumps(VOCAB))
    (tmp_path/"encode.py").write_text(ENCODE)
    command = [sys.executable, "encode.py", "a", "vocab.json", "cache"]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=env, **kwargs)


def in_group(group):
    "The processes of a group that still run."
    stats = {p: stat_of(p) for p in os.listdir("/proc") if p.isdecimal()}
    return [p for p, stat in stats.items() if stat and int(stat[2]) == group and stat[0] != "Z"]


def all_gone(group):
    "Whether nothing of it runs any more, some minutes later at the latest."
    for _ in range(6000):
        if not in_group(group): return True
        time.sleep(0.1)


def stat_of(pid):
    try:
        with open(f"/proc/{pid}/stat") as f: return f.read().rpartition(") ")[2].split()
    except OSError: return None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_goes_on_and_leaves_no_helpers(how, read, tmp_path):
    path = write(tmp_path/"a", "lines", records(1_000))
    cache = tmp_path/"cache"
    assert len(shard_files([path], 2_000)) > 10
    process = encode(tmp_path)
    while process.poll() is None and len(keys(cache)) < 6: time.sleep(0.01)
    os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
    out, err = process.communicate(timeout=600)
    assert process.returncode and "sequences" not in out and all_gone(process.pid), err
    done = keys(cache)
    assert len(done) == 6
    again = read(path, 2_000, cache)
    assert done.items() <= keys(cache).items() and len(keys(cache)) == len(shard_files([path], 2_000))
    assert not [*cache.glob(".*.part")]
    same(again, read(path, cache=tmp_path/"other"))


def test_helpers_report_what_is_broken_and_leave_no_warning(tmp_path):
    (tmp_path/"a").mkdir()
    (tmp_path/"go").touch()
    for k in range(4): write(tmp_path/f"a/{k}.jsonl", "lines", records(400))
    text = b"\n".join(json.dumps(r).encode() for r in records(2000))
    assert len(text) > 2_000
    (tmp_path/"a/9.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    process = encode(tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode and "Is it complete?" in err, err
    assert err.strip().splitlines()[-1].startswith("seqgpt.checks.InputError: a/9.jsonl.gz, after line"), err
    assert "a helper speaks" in out and "warn" not in err.lower(), err
    assert all_gone(process.pid) and not [*(tmp_path/"cache").glob(".*.part")]


TWICE = """
import json, os, time, seqgpt.encoding as E
from seqgpt.progress import tqdm
from pathlib import Path
from seqgpt.tokenizer import make_tokenizer
E.SHARD_BYTES = 2_000
E.cpu_count = lambda: 1
encode = E.encode_shard
chief = os.getpid()
one = os.fork()
def wait_for_the_other(*args, **kwargs):
    Path("encodes").touch()
    while one and not Path("waits").exists(): time.sleep(0.02)
    return encode(*args, **kwargs)
E.encode_shard = wait_for_the_other
say = tqdm.write
tqdm.write = lambda message: Path("waits").touch() or say(message)
if not one:
    while not Path("encodes").exists() and os.getppid() == chief: time.sleep(0.02)
print(E.read_corpus("a", make_tokenizer("vocab.json"), cache_dir="cache"), flush=True)
if not one: os._exit(0)
assert os.waitpid(one, 0)[1] == 0
"""


@pytest.mark.parametrize("rank, said", [("0", "waiting\n"), ("1", "")])
def test_of_the_processes_of_a_run_one_says_that_it_waits(rank, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    acquire = FileLock.acquire
    def is_taken(lock, blocking=True):
        if not blocking: raise Timeout(lock.lock_file)
        return acquire(lock)
    monkeypatch.setattr(FileLock, "acquire", is_taken)
    with locked(tmp_path/"lock", "waiting", wait=True): pass
    assert capsys.readouterr().out == said


def test_one_after_the_other_where_two_encode_the_same(forks, tmp_path):
    write(tmp_path/"a", "lines", records(1_000))
    (tmp_path/"vocab.json").write_text(json.dumps(VOCAB))
    ran = forks(code=TWICE, cwd=tmp_path)
    assert ran["passed"] and ran["printed"].count("1,000 sequences") == 2, ran
    assert ran["printed"].count("Another process is encoding the same data") == 1, ran


# --- the split by content

def test_a_sequence_is_on_the_same_side_wherever_it_is(read, tmp_path):
    rows = records(400) + [{"text": "C4 C4"}] * 7
    sides = {}
    cases = {"all": rows, "turned": rows[::-1], "half": rows[::2], "gone": rows[100:], "split": rows}
    for name, some in cases.items():
        long = {"long": "split", "max_length": 4} if name == "split" else {}
        dataset = read(write(tmp_path/name, "lines", some), **long).dataset
        split = train_validation_split(dataset, 0.3, 5, by="content")
        assert split.shared == 0 and len(split.train) + len(split.validation) == len(dataset)
        assert sorted([*split.train_index, *split.validation_index]) == list(range(len(some)))
        for part, side in ((split.train, 0), (split.validation, 1)):
            for digest in part["digest"]: assert sides.setdefault(digest, side) == side
        assert given_split(split.train, split.validation).shared == 0
    assert 0.2 < sum(sides.values()) / len(sides) < 0.4
    other = train_validation_split(dataset, 0.3, 6, by="content").validation_index
    assert other.tolist() != split.validation_index.tolist()


def test_a_larger_share_holds_the_smaller_one_and_seeds_are_independent():
    generator = torch.Generator().manual_seed(0)
    digests = torch.randint(-2**63, 2**63 - 1, (50_000,), generator=generator).numpy()
    small = hash_below(digests, 0.1, 1)
    large = hash_below(digests, 0.3, 1)
    other = hash_below(digests, 0.1, 2)
    assert (small <= large).all()
    assert abs(small.mean() - 0.1) < 0.01 and abs((small & other).mean() - 0.01) < 0.003
    assert not hash_below(digests, 0.0, 1).any() and hash_below(digests, 1.0, 1).all()


def test_the_sample_is_drawn_as_ever(read, tmp_path):
    "The split of a run from before is drawn again: the numbers were written down once."
    dataset = read(write(tmp_path/"a", "lines", records(30)), 100).dataset
    assert train_validation_split(dataset).validation_index.tolist() == [6, 12, 13, 21, 23, 24]


# --- the stream

def stream_of(files, *args, max_length=64, long="truncate", **kwargs):
    return Stream(files, encoding_options(TOKENIZER, max_length, long, None), *args, **kwargs)


def epoch(stream, e=0, rank=0, world_size=1):
    "What a process reads in an epoch: ids, label, digest, length."
    stream.rank = rank
    stream.world_size = world_size
    def decode(ids): return np.frombuffer(ids, stream.options.dtype).tolist()
    return [(decode(ids), label, digest, length) for ids, label, _, digest, length in stream.epoch(e)]


def of(dataset): return [*zip(*(dataset[name][:] for name in ("input_ids", "label", "digest", "length")))]


@pytest.fixture
def mixed(tmp_path):
    "A folder with a file of each kind."
    (tmp_path/"c").mkdir()
    for k in range(3): # a third is in two files
        write(tmp_path/"c"/(f"{k}" + SUFFIXES[k]), KINDS[k], records(150, 100*k))
    return tmp_path/"c"


@pytest.mark.parametrize("long", ["truncate", "split"])
@pytest.mark.parametrize("part", [60, 1000, 2**20])
def test_a_stream_gives_what_an_encoded_corpus_has(long, part, mixed, read):
    want = train_validation_split(read(mixed, long=long, max_length=5).dataset, 0.3, 4, by="content")
    stream = stream_of(corpus_files(mixed), 0.3, 4, max_length=5, long=long, span_bytes=part)
    first = epoch(stream)
    assert Counter(map(str, first)) == Counter(map(str, of(want.train)))
    for processes in (2, 3, 7):
        shares = [epoch(stream, 0, p, processes) for p in range(processes)]
        assert Counter(str(row) for share in shares for row in share) == Counter(map(str, first)) and all(shares)
        assert max(map(len, shares)) < 2*len(first)/processes
    assert len(stream.spans) == 1 or epoch(stream, 1) != first
    assert epoch(stream) == first and sorted(map(str, epoch(stream, 1))) == sorted(map(str, first))
    corpus, split = stream_corpus(mixed, TOKENIZER, 5, long, fraction=0.3, seed=4)
    assert of(split.validation) == of(want.validation) and split.validation.features == want.validation.features
    few = stream_corpus(mixed, TOKENIZER, 5, long, fraction=0.3, seed=4, held_out=7)[1]
    assert of(few.validation) == of(want.validation)[:len(few.validation)]
    assert sum(few.validation["begins"]) == len(few.validation_index) == 7
    assert want.validation["begins"][len(few.validation)] # the last sequence is there with all its pieces


def test_a_stream_begins_anew_in_the_same_way_and_never_ends(mixed):
    def some(n, **settings):
        stream = stream_of(corpus_files(mixed), 0.3, settings.pop("seed", 4), span_bytes=300)
        for name, value in {"batch_size": 4, "pool": 10, **settings}.items(): setattr(stream, name, value)
        return ids_of(stream, n)
    def ids_of(stream, n): return [str(row["input_ids"].tolist()) for row in itertools.islice(stream, n)]
    once = some(2000)
    assert once == some(2000) and len(once) == 2000
    assert once[:300] not in (some(300, seed=5), some(300, rank=1, world_size=2))
    lengths = np.array([len(json.loads(row)) for row in once]).reshape(-1, 4)
    assert (lengths.max(1) - lengths.min(1)).mean() < 0.5
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths.mean(1))[0, 1]) < 0.2
    stream = stream_of(corpus_files(mixed), 0.3, 4, span_bytes=300)
    whole = sorted(str(ids) for ids, *_ in epoch(stream))
    n = len(whole)
    stream.batch_size = 1
    stream.pool = n
    ids = ids_of(stream, 2*n)
    assert sorted(ids[:n]) == sorted(ids[n:]) == whole and ids[:n] != ids[n:]


def test_helpers_of_a_loader_share_the_share(mixed):
    stream = stream_of(corpus_files(mixed), 0.3, 4)
    class Once(torch.utils.data.IterableDataset):
        def __iter__(self): return (digest for *_, digest, _ in stream.epoch(0))
    found = torch.utils.data.DataLoader(Once(), batch_size=None, num_workers=2)
    assert sorted(found) == sorted(digest for *_, digest, _ in stream.epoch(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_names_a_bad_line(kind, tmp_path, capsys):
    rows = [{"tokens": ["H4"]} if k in (17, 30) else r for k, r in enumerate(records(40))]
    path = write(tmp_path/"a", kind, rows)
    def make(skip): return stream_of([path], 1e-6, 0, skip, span_bytes=100)
    says = (r"a, line (18|31): unknown token \('H4'\)\. "
            r"Mend it, or go on without such lines with --skip_bad_lines")
    with pytest.raises(InputError, match=says): epoch(make(False))
    stream = make(True)
    assert len(epoch(stream)) == len(epoch(stream, 1)) == 38
    assert capsys.readouterr().out.count("H4") == 1
    with pytest.raises(InputError, match=r"a, line 18: unknown token"): stream_corpus(path, TOKENIZER)
    nothing = write(tmp_path/"b", kind, [{"tokens": ["H4"]}] * 3)
    with pytest.raises(InputError, match="no sequence in it to train on"):
        next(iter(Stream([nothing], stream.options, 0.2, 0, True)))
    with pytest.raises(InputError, match="no sequence in it would be set aside"):
        stream_corpus(nothing, TOKENIZER, skip_bad_lines=True)


def test_what_is_known_of_a_stream(mixed):
    def fingerprint(*args): return stream_corpus(mixed, TOKENIZER, *args)[0].report["fingerprint"]
    size = sum(p.stat().st_size for p in mixed.iterdir())/1000
    corpus, split = stream_corpus(mixed, TOKENIZER, held_out=9)
    assert str(corpus).startswith(f"A stream of 3 files, {size:.1f}kB, read while")
    assert str(split).startswith("9 sequences to validate, the rest to train")
    assert corpus.report["fingerprint"] == fingerprint() != fingerprint(20)
    with open(mixed/"0.jsonl", "a") as f: f.write("\n" + json.dumps(records(1)[0]))
    assert corpus.report["fingerprint"] != fingerprint()
