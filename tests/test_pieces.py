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

import seqgpt.data as D
from seqgpt.checks import InputError
from seqgpt.tokenizer import make_tokenizer

TOKENIZER = make_tokenizer(VOCAB)
KINDS = ("lines", "gzip", "parquet")


@pytest.fixture(autouse=True)
def one_core(monkeypatch): monkeypatch.setattr(D, "cpu_count", lambda: 1) # to start helpers takes seconds


@pytest.fixture
def read(tmp_path):
    "Reads a corpus with pieces of a given size, encoded anew each time."
    def read(path, size=2**26, cache=None, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(D, "SHARD_BYTES", size)
            return D.read_corpus(path, TOKENIZER, cache_dir=cache or tmp_path/f"cache{len([*tmp_path.iterdir()])}", **kwargs)
    return read


def records(n, start=0):
    "Sequences of different lengths, some with a label."
    return [{"tokens": [NOTES[(k // 5**j + j) % 5] for j in range(1 + k % 7)]} | ({"label": f"l{k % 3}"} if k % 2 else {}) for k in range(start, start + n)]


def write(path, kind, rows, group=3):
    "The rows in a file of this kind; bytes are written as they are, where there are lines."
    content = b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    if kind == "parquet": pq.write_table(pa.Table.from_pylist(rows, pa.schema({"tokens": pa.list_(pa.string()), "label": pa.string()})), path, row_group_size=group)
    else: path.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    return path


def same(a, b):
    "Two corpora are the same, whatever they were cut into."
    assert a.dataset[:] == b.dataset[:] and str(a) == str(b)
    assert {**a.report, "fingerprint": 0} == {**b.report, "fingerprint": 0}


LINES = [b"\xef\xbb\xbf" + json.dumps(records(1)[0]).encode(), *records(3), b"", b"x", b"  \r", *records(2, 3), b'{"tokens": ["H4"]}\r', b'{"tokens": ["H4", "I4"]}', b"\xef\xbb\xbf{}", b'{"tokens": ["J4"]}', b'{"tokens": ["K4"]}', *records(1, 9), b""]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_every_cut_of_a_file(end, read, tmp_path):
    path = write(tmp_path/"a", "lines", LINES)
    path.write_bytes(path.read_bytes() + end)
    want = read(path, skip_bad_lines=True)
    assert want.report["lines"] == len([line for line in LINES if line not in (b"", b"  \r")]) and "unknown token: 4, at line 10 ('H4'), line 11 ('H4'), line 13 ('J4') and more" in str(want)
    n, lines = path.stat().st_size, [*D.read_span(D.file_span(path))]
    for size in range(1, n + 2):
        found, before = [], 0
        for (span,) in D.shard_files([path], size):
            part = [*D.read_span(span)]
            found += [(before + number, line) for number, line in part]
            before += len(part)
        assert found == lines, size
    for size in (1, 2, 5, 11, 23, 47, 95, 191, n - 1, n, n + 1): same(read(path, size, tmp_path/"cache", skip_bad_lines=True), want)


@pytest.mark.parametrize("long", ["truncate", "split"])
def test_every_mixture_in_every_size(long, read, tmp_path):
    (tmp_path/"c").mkdir()
    rows = records(60)
    for k in range(6): write(tmp_path/"c"/(f"{k}" + D.SUFFIXES[k % 3]), KINDS[k % 3], rows[10*k:10*k + 10])
    (tmp_path/"c/3.jsonl").touch() # comes between, and is empty
    want = read(write(tmp_path/"all.jsonl", "lines", rows), long=long, max_length=5)
    assert len(want.dataset) == (60 if long == "truncate" else sum(-(-(len(r["tokens"]) + 1)//4) for r in rows)) and want.report["sequences"] == 60
    sizes = {len(D.shard_files(D.corpus_files(tmp_path/"c"), size)): size for size in (*range(1, 2000, 37), 2**26)}
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
    for name in "ab": write(tmp_path/"c"/(name + D.SUFFIXES[KINDS.index(kind)]), kind, rows)
    with pytest.raises(InputError, match="8 of 40 lines") as e: read(tmp_path/"c", size)
    file = f"a{D.SUFFIXES[KINDS.index(kind)]}:"
    assert f"unknown token: 8, at {file}1 ({places.format(file)}" in str(e.value)


@pytest.mark.parametrize("size", [200, 2**26])
def test_a_line_too_long_is_named_in_every_cut(size, read, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "MAX_LINE_BYTES", 2**20)
    path = write(tmp_path/"a", "lines", [*records(20), b"[" * (2**20 + 5), *records(3)])
    with pytest.raises(InputError, match="a, line 21: is longer than 1 MiB"): read(path, size)


def test_long_rows_of_parquet_come_a_few_at_a_time(read, tmp_path, monkeypatch):
    sizes, batches = [], pq.ParquetFile.iter_batches
    def spy(self, batch, *args): sizes.append(batch); return batches(self, batch, *args)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    rows = [{"tokens": NOTES * 20_000}] * 30
    corpus = read(write(tmp_path/"a", "parquet", rows, 30), max_length=200_000)
    assert corpus.report["tokens"] == 30*100_002 and 1 <= max(sizes) <= 11


def keys(cache):
    "The pieces that are finished, and since when."
    return {p.name: p.stat().st_mtime_ns for p in cache.glob("*.arrow") if p.with_suffix(".json").exists()}


def test_added_lines_touched_and_moved_files(read, tmp_path):
    path, cache = write(tmp_path/"a", "lines", records(60)), tmp_path/"cache"
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
    path, cache = write(tmp_path/"a", "lines", records(20)), tmp_path/"cache"
    first, times = read(path, cache=cache), path.stat()
    for _ in range(5): # within a tick of the clock or not
        path.write_bytes(path.read_bytes().replace(b"C4", b"X4").replace(b"D4", b"C4").replace(b"X4", b"D4"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns)) # as `cp -p` does
        again = read(path, cache=cache)
        assert again.report["fingerprint"] != first.report["fingerprint"] and again.dataset[:] != first.dataset[:]
        first = again


def test_a_note_is_believed_only_of_files_left_alone(read, tmp_path, monkeypatch):
    path, cache, hashed, key = write(tmp_path/"a", "lines", records(20)), tmp_path/"cache", [], D.shard_key
    monkeypatch.setattr(D, "shard_key", lambda *args: hashed.append(1) or key(*args))
    read(path, cache=cache), read(path, cache=cache)
    assert len(hashed) == 2 # it is too new
    monkeypatch.setattr(D.time, "time_ns", lambda now=time.time_ns: now() + 3*10**9)
    want = read(path, cache=cache)
    assert len(hashed) == 3
    same(read(path, cache=cache), want)
    assert len(hashed) == 3 # believed
    next(cache.glob("*.arrow")).unlink()
    same(read(path, cache=cache), want)
    assert len(hashed) == 4


ENCODE = """
import os, signal, sys, time, seqgpt.data as D
from seqgpt.tokenizer import make_tokenizer
encode = D.encode_shard

def wait_for_go(number, *args):
    "Says something, encodes six pieces, and the others once there is a file `go`."
    D.attach_to_parent(*args[-1])
    D.tqdm.write("a helper speaks")
    while number >= 6 and not os.path.exists("go"): time.sleep(0.02)
    return encode(number, *args)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler) # ignored where the tests run in the background
    D.SHARD_BYTES, D.encode_shard = 2_000, wait_for_go
    D.cpu_count = lambda: 2
    print(D.read_corpus(sys.argv[1], make_tokenizer(sys.argv[2]), cache_dir=sys.argv[3]), flush=True)
"""


def encode(tmp_path, **kwargs):
    (tmp_path/"vocab.json").write_text(json.dumps(VOCAB))
    (tmp_path/"encode.py").write_text(ENCODE)
    return subprocess.Popen([sys.executable, "encode.py", "a", "vocab.json", "cache"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, **kwargs)


def in_group(group):
    "The processes of a group that still run."
    return [p for p in os.listdir("/proc") if p.isdecimal() and (stat := stat_of(p)) and int(stat[2]) == group and stat[0] != "Z"]


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
    path, cache = write(tmp_path/"a", "lines", records(1_000)), tmp_path/"cache"
    assert len(D.shard_files([path], 2_000)) > 10
    process = encode(tmp_path)
    while process.poll() is None and len(keys(cache)) < 6: time.sleep(0.01)
    os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
    out, err = process.communicate(timeout=600)
    assert process.returncode and "sequences" not in out and all_gone(process.pid), err
    done = keys(cache)
    assert len(done) == 6
    again = read(path, 2_000, cache)
    assert done.items() <= keys(cache).items() and len(keys(cache)) == len(D.shard_files([path], 2_000)) and not [*cache.glob(".*.part")]
    same(again, read(path, cache=tmp_path/"other"))


def test_helpers_report_what_is_broken_and_leave_no_warning(tmp_path):
    (tmp_path/"a").mkdir()
    (tmp_path/"go").touch()
    for k in range(4): write(tmp_path/f"a/{k}.jsonl", "lines", records(400))
    (tmp_path/"a/9.jsonl.gz").write_bytes(gzip.compress(text := b"\n".join(json.dumps(r).encode() for r in records(2000)))[:-9])
    assert len(text) > 2_000
    process = encode(tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode and "Is it complete?" in err, err
    assert err.strip().splitlines()[-1].startswith("seqgpt.checks.InputError: a/9.jsonl.gz, after line"), err
    assert "a helper speaks" in out and "warn" not in err.lower(), err
    assert all_gone(process.pid) and not [*(tmp_path/"cache").glob(".*.part")]


TWICE = """
import json, os, time, seqgpt.data as D
from pathlib import Path
from seqgpt.tokenizer import make_tokenizer
D.SHARD_BYTES, D.cpu_count, encode, chief, one = 2_000, lambda: 1, D.encode_shard, os.getpid(), os.fork()
def wait_for_the_other(*args, **kwargs):
    Path("encodes").touch()
    while one and not Path("waits").exists(): time.sleep(0.02)
    return encode(*args, **kwargs)
D.encode_shard, say = wait_for_the_other, D.tqdm.write
D.tqdm.write = lambda message: Path("waits").touch() or say(message)
if not one:
    while not Path("encodes").exists() and os.getppid() == chief: time.sleep(0.02)
print(D.read_corpus("a", make_tokenizer("vocab.json"), cache_dir="cache"), flush=True)
if not one: os._exit(0)
assert os.waitpid(one, 0)[1] == 0
"""


@pytest.mark.parametrize("rank, said", [("0", "waiting\n"), ("1", "")])
def test_of_the_processes_of_a_run_one_says_that_it_waits(rank, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    acquire = D.FileLock.acquire
    def is_taken(lock, blocking=True):
        if not blocking: raise D.Timeout(lock.lock_file)
        return acquire(lock)
    monkeypatch.setattr(D.FileLock, "acquire", is_taken)
    with D.locked(tmp_path/"lock", "waiting", wait=True): pass
    assert capsys.readouterr().out == said


def test_one_after_the_other_where_two_encode_the_same(forks, tmp_path):
    write(tmp_path/"a", "lines", records(1_000))
    (tmp_path/"vocab.json").write_text(json.dumps(VOCAB))
    ran = forks(code=TWICE, cwd=tmp_path)
    assert ran["passed"] and ran["printed"].count("1,000 sequences") == 2 and ran["printed"].count("Another process is encoding the same data") == 1, ran


# --- the split by content

def test_a_sequence_is_on_the_same_side_wherever_it_stands(read, tmp_path):
    rows = records(400) + [{"text": "C4 C4"}] * 7
    sides = {}
    for name, some in {"all": rows, "turned": rows[::-1], "half": rows[::2], "gone": rows[100:], "split": rows}.items():
        long = {"long": "split", "max_length": 4} if name == "split" else {}
        dataset = read(write(tmp_path/name, "lines", some), **long).dataset
        split = D.split_corpus(dataset, 0.3, 5, by="content")
        assert split.shared == 0 and sorted([*split.train_index, *split.validation_index]) == list(range(len(some))) and len(split.train) + len(split.validation) == len(dataset)
        for part, side in ((split.train, 0), (split.validation, 1)):
            for digest in part["digest"]: assert sides.setdefault(digest, side) == side
        assert D.given_split(split.train, split.validation).shared == 0
    assert 0.2 < sum(sides.values()) / len(sides) < 0.4
    other = D.split_corpus(dataset, 0.3, 6, by="content").validation_index
    assert other.tolist() != split.validation_index.tolist()


def test_a_larger_share_holds_the_smaller_one_and_seeds_are_independent():
    digests = torch.randint(-2**63, 2**63 - 1, (50_000,), generator=torch.Generator().manual_seed(0)).numpy()
    small, large, other = D.split_by_hash(digests, 0.1, 1), D.split_by_hash(digests, 0.3, 1), D.split_by_hash(digests, 0.1, 2)
    assert (small <= large).all() and abs(small.mean() - 0.1) < 0.01 and abs((small & other).mean() - 0.01) < 0.003
    assert not D.split_by_hash(digests, 0.0, 1).any() and D.split_by_hash(digests, 1.0, 1).all()


def test_the_sample_is_drawn_as_ever(read, tmp_path):
    "The split of a run from before is drawn again: the numbers were written down once."
    dataset = read(write(tmp_path/"a", "lines", records(30)), 100).dataset
    assert D.split_corpus(dataset).validation_index.tolist() == [6, 12, 13, 21, 23, 24]


# --- the stream

def epoch(stream, e=0, process=0, processes=1):
    "What a process reads in an epoch: ids, label, digest, length."
    stream.rank, stream.world_size = process, processes
    return [(np.frombuffer(ids, stream.options.dtype).tolist(), label, digest, length) for ids, label, _, digest, length in stream.epoch(e)]


def of(dataset): return [*zip(*(dataset[name][:] for name in ("input_ids", "label", "digest", "length")))]


@pytest.fixture
def mixed(tmp_path):
    "A folder with a file of each kind."
    (tmp_path/"c").mkdir()
    for k in range(3): write(tmp_path/"c"/(f"{k}" + D.SUFFIXES[k]), KINDS[k], records(150, 100*k)) # a third stands in two files
    return tmp_path/"c"


@pytest.mark.parametrize("long", ["truncate", "split"])
@pytest.mark.parametrize("part", [60, 1000, 2**20])
def test_a_stream_gives_what_an_encoded_corpus_has(long, part, mixed, read):
    want = D.split_corpus(read(mixed, long=long, max_length=5).dataset, 0.3, 4, by="content")
    stream = D.Stream(D.corpus_files(mixed), D.encoding_options(TOKENIZER, 5, long, None), 0.3, 4, span_bytes=part)
    whole = epoch(stream)
    assert Counter(map(str, whole)) == Counter(map(str, of(want.train)))
    for processes in (2, 3, 7):
        shares = [epoch(stream, 0, p, processes) for p in range(processes)]
        assert Counter(str(row) for share in shares for row in share) == Counter(map(str, whole)) and all(shares)
        assert max(map(len, shares)) < 2*len(whole)/processes
    assert len(stream.spans) == 1 or epoch(stream, 1) != whole
    assert epoch(stream) == whole and sorted(map(str, epoch(stream, 1))) == sorted(map(str, whole))
    corpus, split = D.stream_corpus(mixed, TOKENIZER, 5, long, fraction=0.3, seed=4)
    assert of(split.validation) == of(want.validation) and split.validation.features == want.validation.features
    few = D.stream_corpus(mixed, TOKENIZER, 5, long, fraction=0.3, seed=4, held_out=7)[1]
    assert of(few.validation) == of(want.validation)[:len(few.validation)] and sum(few.validation["begins"]) == len(few.validation_index) == 7
    assert want.validation["begins"][len(few.validation)] # the last sequence is there with all its pieces


def test_a_stream_begins_anew_in_the_same_way_and_never_ends(mixed):
    def some(n, **settings):
        stream = D.Stream(D.corpus_files(mixed), D.encoding_options(TOKENIZER, 64, "truncate", None), 0.3, settings.pop("seed", 4), span_bytes=300)
        for name, value in {"batch_size": 4, "pool": 10, **settings}.items(): setattr(stream, name, value)
        return [str(row["input_ids"].tolist()) for row in itertools.islice(stream, n)]
    once = some(2000)
    assert once == some(2000) and len(once) == 2000 and once[:300] not in (some(300, seed=5), some(300, rank=1, world_size=2))
    lengths = np.array([len(json.loads(row)) for row in once]).reshape(-1, 4)
    assert (lengths.max(1) - lengths.min(1)).mean() < 0.5 and abs(np.corrcoef(np.arange(len(lengths)), lengths.mean(1))[0, 1]) < 0.2
    stream = D.Stream(D.corpus_files(mixed), D.encoding_options(TOKENIZER, 64, "truncate", None), 0.3, 4, span_bytes=300)
    whole = sorted(str(ids) for ids, *_ in epoch(stream))
    stream.batch_size, stream.pool = 1, len(whole)
    ids = [str(row["input_ids"].tolist()) for row in itertools.islice(stream, 2*len(whole))]
    assert sorted(ids[:len(whole)]) == sorted(ids[len(whole):]) == whole and ids[:len(whole)] != ids[len(whole):]


def test_helpers_of_a_loader_share_the_share(mixed):
    stream = D.Stream(D.corpus_files(mixed), D.encoding_options(TOKENIZER, 64, "truncate", None), 0.3, 4)
    class Once(torch.utils.data.IterableDataset):
        def __iter__(self): return (digest for *_, digest, _ in stream.epoch(0))
    found = torch.utils.data.DataLoader(Once(), batch_size=None, num_workers=2)
    assert sorted(found) == sorted(digest for *_, digest, _ in stream.epoch(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_names_a_bad_line(kind, tmp_path, capsys):
    rows = [{"tokens": ["H4"]} if k in (17, 30) else r for k, r in enumerate(records(40))]
    path = write(tmp_path/"a", kind, rows)
    make = lambda skip: D.Stream([path], D.encoding_options(TOKENIZER, 64, "truncate", None), 1e-6, 0, skip, span_bytes=100)
    with pytest.raises(InputError, match=r"a, line (18|31): unknown token \('H4'\)\. Mend it, or go on without such lines with --skip_bad_lines"): epoch(make(False))
    stream = make(True)
    assert len(epoch(stream)) == len(epoch(stream, 1)) == 38
    assert capsys.readouterr().out.count("H4") == 1
    with pytest.raises(InputError, match=r"a, line 18: unknown token"): D.stream_corpus(path, TOKENIZER)
    nothing = write(tmp_path/"b", kind, [{"tokens": ["H4"]}] * 3)
    with pytest.raises(InputError, match="no sequence in it to train on"): next(iter(D.Stream([nothing], make(True).options, 0.2, 0, True)))
    with pytest.raises(InputError, match="no sequence in it would be set aside"): D.stream_corpus(nothing, TOKENIZER, skip_bad_lines=True)


def test_what_is_known_of_a_stream(mixed, tmp_path):
    corpus, split = D.stream_corpus(mixed, TOKENIZER, held_out=9)
    assert str(corpus).startswith(f"A stream of 3 files, {sum(p.stat().st_size for p in mixed.iterdir())/1000:.1f}kB, read while") and str(split).startswith("9 sequences to validate; what is not set aside")
    assert corpus.report["fingerprint"] == D.stream_corpus(mixed, TOKENIZER)[0].report["fingerprint"] != D.stream_corpus(mixed, TOKENIZER, 20)[0].report["fingerprint"]
    with open(mixed/"0.jsonl", "a") as f: f.write("\n" + json.dumps(records(1)[0]))
    assert corpus.report["fingerprint"] != D.stream_corpus(mixed, TOKENIZER)[0].report["fingerprint"]
