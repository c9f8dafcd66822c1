"""Bad input of every kind: a message of one to three lines says what, where and what to do; nothing is written.

Most cases call the function that the command calls, since reading flags takes ten times as long as
refusing a file. That the command says the same, with exit code 2, is tested where flags are wrong, and in
`test_the_command_says_it_with_exit_code_2`. There are more than 700 cases by hand (the last test counts
them); hypothesis adds 420 that mutate valid input."""
import contextlib
import gzip
import io
import json
import math
import os
import resource
import shutil
import signal
import unicodedata
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import NAMES, NOTES, SHORT, TINY, VOCAB, rebuilt, redirect, refused, seqgpt, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqgpt import classification, cli, config, training  # noqa: F401 so that memory is that of the input
from seqgpt.arguments import printable
from seqgpt.checks import InputError
from seqgpt.commands import evaluate_command
from seqgpt.config import Config
from seqgpt.console import infer_command
from seqgpt.records import BadLine, symbol_ids
from seqgpt.tokenizer import unknown_symbol_hint

TRAIN = ["train", "--data_path", "data.jsonl", "--max_length", 16, "--max_steps", 1, *TINY]
SMALL = dict( # the same in Python
    data_path="data.jsonl", max_length=16, max_steps=1, n_layer=1, n_head=2, n_embd=16, batch_size=16)
DIGITS = "9" * 5000 # more than Python turns into a number


def listing(folder):
    "What is in `folder`: mode, size and time of each path."
    stats = {str(path.relative_to(folder)): path.lstat() for path in sorted(folder.rglob("*"))}
    return {name: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def peak_memory():
    "The most memory that this process has taken, in KiB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def within_reason():
    "Whatever the input, it takes less than a GiB, and less than three minutes of computing."
    def too_long(*_): raise TimeoutError
    handler = signal.signal(signal.SIGPROF, too_long)
    memory = peak_memory()
    signal.setitimer(signal.ITIMER_PROF, 180) # counts the time of this process only, not that of others
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    assert peak_memory() - memory < 2**20


def plain(said):
    "Nothing that a terminal would obey."
    assert all(c.isprintable() or c == "\n" for c in said) and len(said) < 15_000, said[:1000]


def answer(ask, cwd, **given):
    "What `ask` says in one to three lines if it refuses its input; None if it does its work."
    with contextlib.chdir(cwd), redirect(io.StringIO()), within_reason():
        try: ask(**given)
        except InputError as e: said = printable(cli.explain(e))
        else: return
    plain(said)
    assert 1 <= len(said.splitlines()) <= 3
    return said


def refuses(ask, cwd, words=(), **given):
    "`ask` refuses its input, and leaves everything as it was."
    before = listing(cwd)
    said = answer(ask, cwd, **given)
    assert said, "nothing was refused"
    for word in words: assert word in said, f"{word!r} is not in {said!r}"
    assert listing(cwd) == before


def command_refuses(*args, cwd, words=()):
    "The same for the command, which ends with exit code 2."
    before = listing(cwd)
    with within_reason(): result = seqgpt(*args, cwd=cwd)
    plain(result.stderr)
    refused(result, *words)
    assert listing(cwd) == before


def train(**given): return training.train(Config(**{**SMALL, **given}))


@pytest.fixture
def corpus(tmp_path):
    write_lines(tmp_path, SHORT)
    return tmp_path


# --- what can be in the place of a file

def link_to(target): return lambda path: path.symlink_to(target)
def link_to_itself(path): path.symlink_to(path.name)
def nothing(path): pass


def link_to_a_pipe(path):
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def a_terabyte(path):
    "An empty file that claims to be large."
    path.touch()
    os.truncate(path, 2**40)


def writes(content): return lambda path: path.write_bytes(content)


NO_FILES = {
    "a folder": Path.mkdir,
    "dangling link": link_to("nowhere"),
    "/dev/zero": link_to("/dev/zero"),
    "pipe": os.mkfifo,
    "loop": link_to_itself,
}


def put(path, content):
    "Replaces what is at `path` by these bytes, or by what `content(path)` makes."
    path.unlink(missing_ok=True)
    if isinstance(content, bytes): path.write_bytes(content)
    else: content(path)


# --- lines

def line(**record): return json.dumps(record).encode()


def by_name(cases):
    "Cases listed by what the message says, as {name: (content, message)}."
    found = {}
    for message, group in cases.items():
        for name, content in group.items(): found[name] = content, message
    return found


BAD_LINES = {
    "malformed JSON": {
        "half an object": b'{"tokens": ["C4", "D4"',
        "half a string": b'{"tokens": ["C4',
        "a brace": b"{",
        "a word": b"C4",
        "single quotes": b"{'tokens': ['C4']}",
        "a comma too many": b'{"tokens": ["C4",]}',
        "a comment": b'{"tokens": ["C4"]} // note',
        "two objects": b'{"tokens": ["C4"]}{"tokens": ["C4"]}',
        "no quotes": b'{tokens: ["C4"]}',
        "XML": b"<tokens>C4</tokens>",
        "CSV": b"C4,D4,E4",
        "NUL": b'{"tokens": ["C4"]}\0',
        "only NUL": b"\0" * 100,
        "NUL in a string": b'{"tokens": ["C4\0"]}',
        "escape in a string": b'{"tokens": ["\x1b[2J"]}',
        "wrong escape": b'{"tokens": ["\\x43"]}',
        "half an escape": b'{"tokens": ["\\u00',
        "Infinity misspelt": b'{"tokens": Infinite}',
        "Python's True": b'{"tokens": True}',
        "deep lists": b"[" * 100_000,
        "deep lists, closed": b"[" * 100_000 + b"]" * 100_000,
        "deep objects": b'{"tokens":' * 50_000,
        "deep tokens": b'{"tokens": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "5,000 digits": b'{"input_ids": [' + DIGITS.encode() + b"]}",
        "minus 5,000 digits": b'{"input_ids": [-' + DIGITS.encode() + b"]}",
        "label of 5,000 digits": b'{"tokens": ["C4"], "label": ' + DIGITS.encode() + b"}",
        "byte-order mark inside": b'\xef\xbb\xbf{"tokens": ["C4"]}',
        "UTF-16 without mark": '{"tokens": ["C4"]}'.encode("utf-16-le"),
    },
    "appears twice": {
        "tokens twice": b'{"tokens": ["C4"], "tokens": ["D4"]}',
        "label twice": b'{"tokens": ["C4"], "label": 1, "label": 2}',
        "twice inside": b'{"tokens": ["C4"], "more": {"a": 1, "a": 1}}',
    },
    "not UTF-8": {
        "Latin-1": '{"tokens": ["café"]}'.encode("latin-1"),
        "UTF-16": '{"tokens": ["C4"]}'.encode("utf-16"),
        "UTF-32": '{"tokens": ["C4"]}'.encode("utf-32"),
        "overlong": b'{"tokens": ["\xc0\xaf"]}',
        "half a letter": b'{"tokens": ["\xe6\x97"]}',
        "surrogate": b'{"tokens": ["\xed\xa0\x80"]}',
        "random bytes": bytes(range(128, 256)),
        "PNG": b"\x89PNG\x0d\x1a",
    },
    "not an object": {
        "a list": b'["C4", "D4"]',
        "a string": b'"C4 D4"',
        "a number": b"4",
        "null": b"null",
        "true": b"true",
        "NaN": b"NaN",
        "-Infinity": b"-Infinity",
    },
    "no tokens": {
        "an empty object": b"{}",
        "another key": b'{"token": ["C4"]}',
        "upper case": b'{"Tokens": ["C4"]}',
        "only a label": b'{"label": 1}',
        "tokens null": b'{"tokens": null}',
        "tokens a string": b'{"tokens": "C4 D4"}',
        "tokens a number": b'{"tokens": 4}',
        "tokens an object": b'{"tokens": {"C4": 1}}',
        "tokens true": b'{"tokens": true}',
        "tokens NaN": b'{"tokens": NaN}',
        "text a number": b'{"text": 4}',
        "text null": b'{"text": null}',
        "sequence a string": b'{"sequence": "C4"}',
        "input_ids a number": b'{"input_ids": 4}',
        "input_ids a string": b'{"input_ids": "4 5"}',
        "input_ids 1e400": b'{"input_ids": 1e400}',
    },
    "empty sequence": {
        "no tokens in the list": b'{"tokens": []}',
        "empty text": b'{"text": ""}',
        "white text": b'{"text": " \\n\\t "}',
        "no ids": b'{"input_ids": []}',
        "empty sequence": b'{"sequence": []}',
    },
    "unknown token": {
        "unknown": b'{"tokens": ["H4"]}',
        "glued": b'{"text": "C4D4"}',
        "an empty token": b'{"tokens": [""]}',
        "with a space": b'{"tokens": ["C4 "]}',
        "with NUL": b'{"tokens": ["C4\\u0000"]}',
        "with an escape": b'{"tokens": ["\\u001b[2J"]}',
        "null token": b'{"tokens": [null]}',
        "real token": b'{"tokens": [4.5]}',
        "NaN token": b'{"tokens": [NaN]}',
        "true token": b'{"tokens": [true]}',
        "list token": b'{"tokens": [["C4"]]}',
        "object token": b'{"tokens": [{"C4": 4}]}',
        "half a character": b'{"tokens": ["\\ud800"]}',
        "right to left": '{"tokens": ["\u202eC4"]}'.encode(),
        "like C": '{"tokens": ["С4"]}'.encode(),
        "a megabyte": line(tokens=["C4" * 2**19]),
        "token of 4,000 digits": b'{"tokens": [' + b"9" * 4000 + b"]}",
        "many unknown": line(tokens=["H4"] * 100_000),
    },
    "'c4': the vocabulary has 'C4'": {
        "lower case": b'{"text": "c4"}',
    },
    "quote it": {
        "number token": b'{"tokens": [4]}',
    },
    "id out of range": {
        "id -1": b'{"input_ids": [-1]}',
        "id 9": b'{"input_ids": [4, 9]}',
        "id 2**31": b'{"input_ids": [2147483648]}',
        "id 2**64": b'{"input_ids": [18446744073709551616]}',
        "id of 4,000 digits": b'{"input_ids": [' + b"9" * 4000 + b"]}",
        "id 9.0": b'{"input_ids": [9.0]}',
    },
    "id is not a whole number": {
        "id 4.5": b'{"input_ids": [4.5]}',
        "id true": b'{"input_ids": [true]}',
        "id null": b'{"input_ids": [null]}',
        "id a string": b'{"input_ids": ["4"]}',
        "id NaN": b'{"input_ids": [NaN]}',
        "id infinite": b'{"input_ids": [1e999]}',
        "id a list": b'{"input_ids": [[4]]}',
    },
    "padding inside": {
        "padding": b'{"input_ids": [4, 0, 5]}',
        "only padding": b'{"tokens": ["<pad>"]}',
    },
}
LINES = by_name(BAD_LINES)
BAD_LABELS = { # where there must be one
    "label missing": {
        "missing": b'{"tokens": ["C4"]}',
        "null": b'{"tokens": ["C4"], "label": null}',
        "empty": b'{"tokens": ["C4"], "label": ""}',
        "white": b'{"tokens": ["C4"], "label": " \\t"}',
        "label NaN": b'{"tokens": ["C4"], "label": NaN}',
    },
    "label missing: 1, at line 4 (no \"label\", but 'labels')": {
        "another name": b'{"tokens": ["C4"], "labels": 1}',
    },
    "label is not": {
        "label a real": b'{"tokens": ["C4"], "label": 1.5}',
        "label infinite": b'{"tokens": ["C4"], "label": 1e999}',
        "label a list": b'{"tokens": ["C4"], "label": ["up"]}',
        "label an object": b'{"tokens": ["C4"], "label": {"up": 1}}',
        "label with NUL": b'{"tokens": ["C4"], "label": "a\\u0000"}',
        "label with an escape": b'{"tokens": ["C4"], "label": "\\u001b[31mred"}',
        "label half a character": b'{"tokens": ["C4"], "label": "\\udfff"}',
        "label of two lines": b'{"tokens": ["C4"], "label": "a\\nb"}',
    },
    "label longer": {
        "a long label": line(tokens=["C4"], label="x" * 2000),
        "label of 4,000 digits": b'{"tokens": ["C4"], "label": ' + b"7" * 4000 + b"}",
        "label, 5,000 digits as text": line(tokens=["C4"], label=DIGITS),
    },
}
LABELS = by_name(BAD_LABELS)


@pytest.mark.parametrize("name", LINES)
def test_bad_lines(name, corpus):
    content, kind = LINES[name]
    write_lines(corpus, [*SHORT[:3], content, *SHORT[3:]])
    words = ["data.jsonl: 1 of 41 lines cannot be used", kind, "at line 4", "--skip_bad_lines"]
    refuses(train, corpus, words)


@pytest.mark.parametrize("name", LABELS)
def test_lines_without_a_label_cannot_be_classified(name, corpus):
    content, kind = LABELS[name]
    write_lines(corpus, [*SHORT[:3], content, *SHORT[3:]])
    words = ["1 of 41 lines", kind, "at line 4", "--skip_bad_lines"]
    refuses(train, corpus, words, task="classification")


# --- files of lines

def text(records): return "".join(json.dumps(record) + "\n" for record in records).encode()


GZIPPED = gzip.compress(text(SHORT), mtime=0)


def table(records, **types):
    "Parquet; columns of bytes can be given another type, whatever is in them."
    out = pa.BufferOutputStream()
    columns = pa.table({"tokens": pa.array([], pa.list_(pa.string()))})
    if records: columns = pa.Table.from_pylist(records)
    for name, kind in types.items():
        column = columns[name].combine_chunks().view(kind)
        columns = columns.set_column(0, name, column)
    pq.write_table(columns, out, compression="none", use_dictionary=False)
    return out.getvalue().to_pybytes()


PARQUET = table(SHORT)
DATA = { # what is at data.jsonl: bytes, or a function that makes something else
    "empty": (b"", ["no sequences in it"]),
    "a newline": (b"\n", ["no sequences"]),
    "only white": (b" \n\t\n\r\n" * 100, ["no sequences"]),
    "only a mark": (b"\xef\xbb\xbf", ["no sequences"]),
    "one line": (text(SHORT[:1]), ["1 sequences cannot be split"]),
    "one line, no newline": (text(SHORT[:1])[:-1], ["1 sequences cannot be split"]),
    "all bad": (b"{\"x\n" * 1000, ["1,000 of 1,000 lines", "Is it JSON Lines in UTF-8?", "at line 1 ("]),
    "UTF-16": (text(SHORT).decode().encode("utf-16"), ["data.jsonl: is text in UTF-16"]),
    "pretty JSON": (json.dumps(SHORT, indent=1).encode(), ["data.jsonl: is a JSON list", "line of its own"]),
    "one JSON list": (json.dumps(SHORT).encode(), ["data.jsonl: is a JSON list"]),
    "empty gzip": (gzip.compress(b""), ["no sequences"]),
    "gzip head": (GZIPPED[:5], ["data.jsonl, after line 0: the file cannot be read on", "Is it complete?"]),
    "half a gzip": (GZIPPED[:len(GZIPPED)//2], ["after line", "Is it complete?"]),
    "gzip without its end": (GZIPPED[:-4], ["after line", "Is it complete?"]),
    "damaged gzip": (GZIPPED[:60] + bytes(40) + GZIPPED[100:], ["after line", "Is it complete?"]),
    "gzip, wrong sum": (GZIPPED[:-8] + bytes(8), ["after line"]),
    "gzip, wrong method": (GZIPPED[:2] + b"\x07" + GZIPPED[3:], ["after line 0"]),
    "gzip and rubbish": (GZIPPED + b"rubbish", ["after line 40"]),
    "gzip in gzip": (gzip.compress(GZIPPED), ["data.jsonl: is a gzip file, compressed with gzip"]),
    "only two bytes": (b"\x1f\x8b", ["after line 0"]),
    "bzip2": (b"BZh91AY&SY", ["compressed, but not with gzip"]),
    "zip": (b"PK\x03\x04" + bytes(100), ["data.jsonl: is a zip archive"]),
    "Parquet": (b"PAR1" + bytes(range(256)), ["data.jsonl: cannot be read as Parquet", "Is it complete?"]),
    "Parquet head": (b"PAR1", ["data.jsonl: cannot be read as Parquet"]),
    "half a Parquet": (PARQUET[:len(PARQUET)//2], ["cannot be read as Parquet"]),
    "Parquet without its end": (PARQUET[:-1], ["cannot be read as Parquet"]),
    "damaged Parquet": (PARQUET[:4] + bytes(200) + PARQUET[204:], ["data.jsonl: cannot be read as Parquet"]),
    "Parquet, endless footer": (PARQUET[:-8] + b"\xff\xff\xff\x7fPAR1", ["cannot be read as Parquet"]),
    "Parquet of no rows": (table([]), ["no sequences"]),
    "Parquet without columns": (table([{"note": 1}] * 9), ["9 of 9 lines", "no tokens"]),
    "Parquet with a bad row": (
        table(SHORT[:3] + [{"tokens": ["H4"]}] + SHORT),
        ["1 of 44 lines", "unknown token: 1, at line 4 ('H4')"]),
    "Parquet, not UTF-8": (
        table([{"text": b"C4 \xff"}] * 2, text=pa.string()), ["cannot be read as Parquet"]),
    "all one class": (text([{**r, "label": 1} for r in SHORT]), ["all labels are '1'"]),
    "a huge line": (
        b'{"tokens": ["' + b"C" * (2**26 + 9) + b'"]}\n', ["data.jsonl, line 1: is longer than 64 MiB"]),
    "a huge line after others": (
        text(SHORT) + b"[" * (2**26 + 9), ["data.jsonl, line 41: is longer than 64 MiB"]),
    "gzip bomb": (gzip.compress(b" " * 2**28, 6), ["data.jsonl, line 1: is longer than 64 MiB"]),
    "dangling link": (link_to("nowhere"), ["data.jsonl: no such file"]),
    "link to a folder": (link_to("."), ["data.jsonl/data.jsonl: is no regular file"]),
    "link to /dev/zero": (link_to("/dev/zero"), ["data.jsonl: no such file"]),
    "loop": (link_to_itself, ["data.jsonl: no such file"]),
    "pipe": (os.mkfifo, ["data.jsonl: no such file"]),
    "empty folder": (Path.mkdir, ["data.jsonl: no file in this folder"]),
    "link to a pipe": (link_to_a_pipe, ["data.jsonl: no such file"]),
    "gone": (nothing, ["data.jsonl: no such file"]),
}
FOLDERS = {**NO_FILES, "link to a folder": link_to(".")}


@pytest.mark.parametrize("name", DATA)
def test_bad_files_of_lines(name, corpus):
    content, words = DATA[name]
    put(corpus/"data.jsonl", content)
    refuses(train, corpus, words, task="classification" if "class" in name else "clm")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("file", ["more.jsonl", "more.jsonl.gz"])
def test_what_is_no_file_in_a_folder_of_lines_is_not_passed_over(name, file, tmp_path):
    write_lines(tmp_path/"c", SHORT)
    FOLDERS[name](tmp_path/"c"/file)
    refuses(train, tmp_path, [f"c/{file}: is no regular file"], data_path="c")


def test_every_sequence_too_long(corpus):
    write_lines(corpus, [{"tokens": NOTES * 4}] * 10)
    words = ["10 of 10 lines", "longer than max_length: 10, at line 1 (22 tokens)"]
    refuses(train, corpus, words, long="error")


def test_names_of_files_are_shown_escaped(tmp_path):
    write_lines(tmp_path/"c", SHORT)
    for content in (b"x\n", b'{"text": "x"}\n'):
        (tmp_path/"c/\x1b[2J\n.jsonl").write_bytes(content)
        refuses(train, tmp_path, ["\\x1b[2J"], data_path="c")


PATH_FLAGS = "--data_path --vocab_path --validation_path --init_from --output_dir --cache_dir --config".split()


@pytest.mark.parametrize("flag", PATH_FLAGS)
@pytest.mark.parametrize("name", ["x" * 5000, "\x1b[2J", "x/" * 3000, "//"])
def test_impossible_names(flag, name, corpus):
    if flag in ("--output_dir", "--cache_dir") and "x" not in name: return # possible
    command_refuses(*TRAIN, flag, name, cwd=corpus)


# --- vocabularies

def order(symbols): return json.dumps({symbol: i for i, symbol in enumerate(symbols)})


SPECIAL = '"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3'
VOCABS = {
    "empty file": ("", ["vocab.json: not JSON"]),
    "white": (" \n", ["not JSON"]),
    "half": ('{"<pad>": 0, "<bos>', ["vocab.json: not JSON", "line 1 column"]),
    "half, later": ('{"<pad>": 0,\n"<bos>": 1,\n"<eos>', ["line 3 column"]),
    "comma": ('{"a": 0,}', ["not JSON"]),
    "comment": ('{"a": 0} # all', ["not JSON"]),
    "NUL": ('{"a": 0}\0', ["not JSON"]),
    "single quotes": ("{'a': 0}", ["not JSON"]),
    "list": ('["a", "b"]', ["not an object"]),
    "list of pairs": ('[["a", 0]]', ["not an object"]),
    "string": ('"a"', ["not an object"]),
    "number": ("7", ["not an object"]),
    "null": ("null", ["not an object"]),
    "NaN": ("NaN", ["not an object"]),
    "no symbols": ("{}", ["no symbols"]),
    "lines": ('{"a": 0}\n{"b": 1}', ["not JSON", "line 2"]),
    "deep": ('{"a": ' * 50_000, ["not JSON"]),
    "deep list": ("[" * 100_000 + "]" * 100_000, ["not JSON"]),
    "5,000 digits": ('{"a": ' + DIGITS + "}", ["vocab.json: not JSON"]),
    "minus 5,000 digits": ('{"a": -' + DIGITS + "}", ["not JSON"]),
    "4,000 digits": (f'{{{SPECIAL}, "a": {"9" * 4000}}}', ["4 is missing"]),
    "id text": ('{"a": "0"}', ["the id of 'a' is '0'"]),
    "id null": ('{"a": null}', ["is None"]),
    "id true": ('{"a": true}', ["is True"]),
    "id real": ('{"a": 0.0}', ["is 0.0"]),
    "id NaN": ('{"a": NaN}', ["is nan"]),
    "id infinite": ('{"a": 1e999}', ["is inf"]),
    "id list": ('{"a": [0]}', ["is [0]"]),
    "id object": ('{"a": {"b": 0}}', ["is [['b', 0]]"]),
    "id -1": ('{"a": -1, "b": 0}', ["-1 is out of range"]),
    "id 2**64": (f'{{{SPECIAL}, "a": 18446744073709551616}}', ["4 is missing"]),
    "gap": ('{"a": 0, "b": 2}', ["1 is missing"]),
    "from 1": ('{"a": 1, "b": 2}', ["0 is missing"]),
    "same id": ('{"a": 0, "b": 0}', ["id 0 appears 2 times"]),
    "same symbol": ('{"a": 0, "a": 1}', ["symbol 'a' appears 2 times"]),
    "same pair": ('{"a": 0, "a": 0}', ["appears 2 times"]),
    "empty symbol": ('{"": 0}', ["is empty"]),
    "space": ('{"a b": 0}', ["white space"]),
    "newline": ('{"a\\n": 0}', ["white space"]),
    "wide space": ('{"a\u3000b": 0}', ["white space"]),
    "line separator": ('{"a\\u2028": 0}', ["white space"]),
    "NUL symbol": ('{"a\\u0000": 0}', ["control character"]),
    "escape symbol": ('{"\\u001b[2J": 0}', ["control character", "\\x1b"]),
    "C1": ('{"\\u009b2J": 0}', ["control character"]),
    "half a character": ('{"\\ud800": 0}', ["half a character"]),
    "a long symbol": (order(["x" * 10**6, " "]), ["white space"]),
    "a long wrong one": (order(["\0" * 10**5]), ["control character"]),
    "Latin-1": ('{"é": 0}'.encode("latin-1"), ["vocab.json: is not text in UTF-8 (byte 2)"]),
    "UTF-16": ('{"a": 0}'.encode("utf-16"), ["not text in UTF-8"]),
    "random": (bytes(range(256)), ["not text in UTF-8"]),
    "gzip": (gzip.compress(b"{}"), ["not text in UTF-8"]),
    "no padding": (order(["<bos>", "<eos>", "<unk>", *NOTES]), ["pad_token", "--pad_token"]),
    "no bos": (order(["<pad>", "<eos>", "<unk>", *NOTES]), ["bos_token", "--bos_token"]),
    "no eos": (order(["<pad>", "<bos>", "<unk>", *NOTES]), ["eos_token"]),
    "no unk": (order(["<pad>", "<bos>", "<eos>", *NOTES]), ["unk_token", "--unk_token"]),
    "no unk of MidiTok": (
        order(["PAD_None", "BOS_None", "EOS_None", *NOTES]),
        ["no unk_token in it", f'Add "<unk>": {len(NOTES) + 3}, or name yours with --unk_token.']),
    "none of four, and names that may be symbols": (
        order(["s", "end", "Start", "pad", "unk"]),
        ['Add "<pad>": 5, "<bos>": 6, "<eos>": 7, "<unk>": 8, or name',
         "--pad_token and --bos_token and --eos_token and --unk_token"]),
    "one of each mistake": (
        order(["<bos>", "[BOS]", "EOS", *NOTES]),
        ["2 symbols could be the bos_token: <bos>, [BOS]", "no pad_token and no unk_token in it"]),
    "two paddings": (
        order(["<pad>", "[PAD]", "<bos>", "<eos>", "<unk>"]),
        ["2 symbols could be the pad_token", "--pad_token"]),
    "two ends": (order(["<pad>", "<bos>", "<eos>", "</s>", "<unk>"]), ["2 symbols could be"]),
    **{name: (make, ["vocab.json: is no regular file"]) for name, make in FOLDERS.items()},
    "gone": (nothing, ["no vocab.json there", "--vocab_path"]),
    "a terabyte": (a_terabyte, ["vocab.json: is larger than 256 MiB"]),
    "a script": (b"#!/bin/sh\nrm -r /\n", ["not JSON"]),
    "YAML": ("a: 0\n", ["not JSON"]),
    "other symbols": (
        order(["<pad>", "<bos>", "<eos>", "<unk>", "H4"]),
        ["40 of 40 lines", "unknown token"]),
}


@pytest.mark.parametrize("name", VOCABS)
def test_bad_vocabularies(name, corpus):
    content, words = VOCABS[name]
    put(corpus/"vocab.json", content.encode() if isinstance(content, str) else content)
    refuses(train, corpus, words)


@pytest.mark.parametrize("has, found", [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_same_letter_in_another_unicode_form(has, found):
    vocab = {unicodedata.normalize(has, "r\u00e9"): 0}
    written = unicodedata.normalize(found, "r\u00e9")
    with pytest.raises(BadLine) as e: symbol_ids({"text": written}, vocab)
    hint = f"the vocabulary has it in the Unicode form {has}; unicodedata.normalize({has!r}, text) gives that"
    assert hint in e.value.detail
    assert symbol_ids({"text": unicodedata.normalize(has, written)}, vocab) == [0]


HINTS = [
    ("c#4", "the vocabulary has 'C#4'"), ("DO", "the vocabulary has 'Do'"), ("ＣX", ""), ("Ｄｏ", "NFKC"),
    ("AC", "put spaces between symbols"), ("A C", "white space"), ("", "is empty"),
    (4, "quote it"), (np.int64(4), "quote it"), (4.5, "quote it"),
    (float("nan"), "a missing value"), (None, "a missing value"), (["A"], "a list, not text"),
    ("H4", ""), ("A"*10**6 + "H", ""),
]


@pytest.mark.parametrize("symbol, hint", HINTS, ids=lambda v: repr(v)[:20])
def test_hints_without_a_look_at_the_whole_vocabulary(symbol, hint):
    class Vocab(dict):
        def __iter__(self): raise AssertionError("looks at all symbols")
        items = values = __iter__
    said = unknown_symbol_hint(symbol, Vocab({"C#4": 0, "Do": 1, "A": 2, "C": 3}))
    assert hint in said and bool(said) == bool(hint)


# --- settings

FIELDS = { # by type
    "text": """
        data_path task init_from new_symbols class_weights vocab_path pad_token long
        validation_path split cache_dir output_dir optimizer lr_scheduler_type precision""",
    "integer": """
        frozen_layers lora_rank max_length batch_size gradient_accumulation_steps max_steps
        eval_steps logging_steps early_stopping_patience seed n_layer n_head n_embd""",
    "real": "validation_fraction num_epochs learning_rate warmup_steps weight_decay max_grad_norm",
    "boolean": "skip_bad_lines streaming overwrite",
    "dictionary": "model",
}
WRONG = {
    "text": ["[a]", "{a: b}"], "integer": ["many", "1.5", "[1]"], "real": ["many", ".nan", "[1]"],
    "boolean": ["maybe", "[true]"], "dictionary": ["7", "[a]"],
}
TYPES = []
for kind, names in FIELDS.items(): TYPES += [f"{name}: {value}" for name in names.split() for value in WRONG[kind]]
TOLD = [ # found by the reader of flags, which comes first
    "data_path: [a]", "task: [a]", "task: {a: b}", "seed: many", "seed: 1.5", "seed: [1]",
    "num_epochs: many", "num_epochs: .nan", "num_epochs: [1]", "resume: maybe", "resume: [true]",
    "model: 7", "model: [a]",
]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" # each line ten times the one before
for before, after in zip("abcdefghij", "bcdefghijk"):
    aliases = ",".join([f"*{before}"] * 10)
    BOMB += f"{after}: &{after} [{aliases}]\n"
SETTINGS = {
    "model: {resid_drop: 1}": ["Did you mean 'resid_pdrop'"],
    "model: {1: 2}": [],
    "model: {quantization_config: {}}": ["quantization_config"],
    "model: {attn_implementation: kernels-community/x}": ["attn_implementation"],
    "model: {auto_map: {}}": ["auto_map"],
    "model: {torch_dtype: float16}": ["torch_dtype"],
    "!!python/object/apply:os.system ['touch evil']": ["cannot be read", "could not determine a constructor"],
    "seed: !!python/object/apply:os.system ['touch evil']": ["line 1"],
    "seed: !!python/name:os.system": ["constructor"],
    "model: !!python/object/new:dict {}": ["constructor"],
    "seed: !!python/module:os": ["constructor"],
    "!!python/object/apply:subprocess.run\nargs: [[touch, evil]]": ["constructor"],
    "seed: !mine 1": ["constructor"],
    BOMB: ["found an alias", "line 2"],
    "seed: &a 1\nn_layer: *a": ["found an alias", "line 2: "],
    "a: &a [*a]": ["alias"],
    "seed: 1\nseed: 2": ["line 2", "seed is there twice"],
    "model: {n_inner: 8, n_inner: 16}": ["n_inner is there twice"],
    "<<: {seed: 1}\nseed: 2": ["seed is there twice"],
    "": ["no settings"],
    "# nothing": ["no settings"],
    "[1, 2]": ["no settings"],
    "seed": ["no settings"],
    "7": ["no settings"],
    "null": ["no settings"],
    "a: b: c": ["cannot be read", "line 1"],
    "seed: 1\n n_layer: 2": ["line 2"],
    "\tseed: 1": ["cannot be read"],
    "seed: [1": ["cannot be read"],
    "seed: 'x": ["cannot be read"],
    "---\nseed: 1\n---\nseed: 2": ["cannot be read"],
    "%YAML 9": ["cannot be read"],
    "[" * 5000: ["cannot be read"],
    "{a: " * 5000: ["cannot be read"],
    "- " * 5000: ["cannot be read"],
    "seed: " + DIGITS: ["cannot be read"],
    "seed: !!int x": ["cannot be read"],
    "seed: !!int ''": ["cannot be read"],
    "seed: 2001-99-99": ["seed is '2001-99-99'"],
    "seed: !!binary x": ["cannot be read"],
    "seed: \0": ["cannot be read"],
    "seed: \x1b[2J": ["cannot be read", "x001b"],
    "data_path: \"a\\0b\"": [],
    "output_dir: \"a\\0b\"": ["output_dir is 'a\\x00b'", "without the character 0"],
    "learning_rate: 0": ["learning_rate is 0"],
    "learning_rate: .inf": ["learning_rate is inf"],
    "learning_rate: -.inf": ["learning_rate"],
    "learning_rate: -1e-3": ["learning_rate"],
    "num_epochs: 0": ["num_epochs is 0"],
    "num_epochs: -1": ["num_epochs"],
    "num_epochs: .inf": ["num_epochs"],
    "batch_size: 0": ["batch_size is 0"],
    "batch_size: -8": ["batch_size"],
    "gradient_accumulation_steps: 0": ["gradient_accumulation_steps"],
    "logging_steps: 0": ["logging_steps"],
    "eval_steps: -1": ["eval_steps"],
    "warmup_steps: -1": ["warmup_steps"],
    "weight_decay: -1": ["weight_decay"],
    "weight_decay: .inf": ["weight_decay"],
    "max_grad_norm: 0": ["max_grad_norm"],
    "early_stopping_patience: -1": ["early_stopping_patience"],
    "max_steps: -2": ["max_steps"],
    "max_steps: 0": ["max_steps"],
    "batch_size: 1000000000000": ["batch_size", "at most 1e+06"],
    "num_epochs: 1.0e+300": ["num_epochs"],
    "learning_rate: 1.0e+300": ["learning_rate"],
    "model: {n_inner: 0}": ["n_inner is 0"],
    "model: {add_cross_attention: maybe}": ["add_cross_attention"],
    "model: {use_cache: maybe}": ["use_cache"],
    "seed: -1": ["seed is -1"],
    "seed: 4294967296": ["seed is 4294967296"],
    "max_length: 1": ["max_length is 1"],
    "max_length: 0": ["max_length"],
    "max_length: -5": ["max_length"],
    "validation_fraction: 0": ["validation_fraction"],
    "validation_fraction: 1": ["validation_fraction"],
    "validation_fraction: 0.001": ["cannot be split"],
    "precision: int8": ["precision"],
    "precision: fp16": ["fp16 needs a GPU"],
    "task: regression": ["task"],
    "split: half": ["split is 'half'", "sample, content"],
    "{streaming: true, max_steps: 5, task: classification}": ["streaming is for --task clm"],
    "long: cut": ["long is 'cut'"],
    "optimizer: sgd": ["optimizer"],
    "class_weights: balanced": ["class_weights"],
    "lr_scheduler_type: linea": ["linea"],
    "n_layer: 0": ["n_layer is 0"],
    "n_head: 0": ["n_head is 0"],
    "n_embd: 0": ["n_embd is 0"],
    "n_layer: -1": ["n_layer"],
    "n_embd: -16": ["n_embd"],
    "n_head: 3": ["n_embd (16) is not divisible by n_head (3)"],
    "n_embd: 15": ["not divisible"],
    "model: {n_layer: 3}": ["--n_layer"],
    "model: {vocab_size: 3}": ["vocab_size"],
    "n_layer: 1000000000": ["GiB", "Lower n_embd (16), n_layer (1000000000)"],
    "n_layer: 100000000": ["GiB"],
    "n_embd: 1\nn_head: 1\nn_layer: 10000000": ["GiB", "n_layer (10000000)"],
    "n_embd: 1000000000": ["GiB", "n_embd"],
    "n_embd: 1000000": ["GiB"],
    f"n_embd: {10**300}": ["GiB"],
    "max_length: 1000000000000": ["GiB", "max_length"],
    "model: {n_inner: 1000000000000}": ["GiB"],
    f"model: {{n_inner: {10**30}}}": ["GiB"],
    "model: {n_inner: -4}": ["n_inner is -4"],
    "model: {resid_pdrop: 2}": ["resid_pdrop is 2"],
    "model: {attn_pdrop: 1}": ["attn_pdrop is 1"],
    "model: {resid_pdrop: high}": ["resid_pdrop"],
    "model: {resid_pdrop: -0.5}": ["resid_pdrop"],
    "model: {initializer_range: -1.0}": ["initializer_range is -1.0"],
    "model: {initializer_range: .nan}": ["initializer_range is nan"],
    "model: {layer_norm_epsilon: -1.0}": ["layer_norm_epsilon"],
    "model: {layer_norm_epsilon: .inf}": ["layer_norm_epsilon"],
    "model: {activation_function: gulu}": ["gulu"],
    "model: {activation_function: [gelu]}": ["activation_function"],
    "model: {use_cache: 7}": ["use_cache"],
    "model: {n_inner: many}": ["n_inner"],
    "model: {bos_token_id: 2}": ["bos_token_id"],
    "model: {id2label: {}}": ["id2label"],
    "task: classification\nlong: split": ["long is 'split'"],
    "resume: true\noverwrite: true": ["one of"],
    "pad_token: <eos>": ["four different symbols"],
    "unk_token: nothing": ["'nothing', named as the unk_token"],
    "validation_path: nowhere": ["nowhere"],
    "validation_path: vocab.json": ["cannot be used"],
    "init_from: nowhere": ["no config.json there"],
    "init_from: .": ["no config.json there"],
    "new_symbols: zero": ["normal", "random"],
    "frozen_layers: -1": ["frozen_layers is -1"],
    "frozen_layers: 1": ["--init_from"],
    "lora_rank: 4": ["--init_from"],
    "lora_rank: 1000000": ["lora_rank is 1000000"],
    "data_path: .\noutput_dir: .": ["is the folder of the data"],
    "output_dir: data.jsonl": ["data.jsonl"],
}
UNKNOWN = {
    "config: other.yaml": ["there is no setting 'config'"],
    "learning_rat: 1": ["'learning_rat'", "--learning_rate"],
    "Seed: 1": ["'Seed'"],
    "1: 2": [],
    "? [a, b]\n: 1": [],
}
SETTINGS_FILES = {
    **NO_FILES,
    "2 MiB": writes(b"# x\n" * 2**19),
    "a terabyte": a_terabyte,
    "Latin-1": writes(b"long: \xe9"),
    "UTF-16": writes("seed: 1".encode("utf-16-le")),
    "random": writes(bytes(range(256))),
}


def shown(content): return content[:40].encode("unicode_escape").decode()


@pytest.mark.parametrize("content", [*TYPES, *SETTINGS], ids=shown)
def test_bad_settings(content, corpus):
    (corpus/"mine.yaml").write_text(content)
    def ask(): train(**config.read_settings("mine.yaml"))
    refuses(ask, corpus, SETTINGS.get(content, [content.partition(":")[0]]))


@pytest.mark.parametrize("content", [*UNKNOWN, *TOLD], ids=shown)
def test_bad_names_and_types_of_settings(content, corpus):
    (corpus/"mine.yaml").write_text(content)
    words = UNKNOWN.get(content, [content.partition(":")[0]])
    command_refuses("train", "--config", "mine.yaml", cwd=corpus, words=words)


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_bad_files_of_settings(name, corpus):
    SETTINGS_FILES[name](corpus/"mine.yaml")
    command_refuses(*TRAIN, "--config", "mine.yaml", cwd=corpus, words=["mine.yaml"])
    command_refuses(*TRAIN, "--config=mine.yaml", cwd=corpus, words=["mine.yaml"])


DIGITS_FLAGS = [
    "--image_size 3", "--image_size 65", "--image_size big", "--image_size 1000000000",
    "--image_size 8.5", "--grey_levels 1", "--grey_levels 18", "--grey_levels -2",
    "--out_dir " + "x" * 5000, "--size 8", "--config nowhere.yaml",
]
MARKOV_FLAGS = [
    "--order 3", "--order 0", "--branching 0", "--branching 513", "--concentration 0",
    "--concentration nan", "--concentration inf", "--difference -0.1", "--difference 2",
    "--difference nan", "--symbols 1", "--symbols 1000000000", "--classes 0",
    "--classes 1000000000", "--min_length 2", "--max_length 4", "--max_length 1000000000000",
    "--seed -1", "--draw_seed -1", "--num_sequences 0", "--num_sequences -3",
    "--num_sequences 1000000000000", "--num_sequences many", "--markov 1",
    "--ordr 1",
]
REMEDIES = { # what some of them are told
    "--branching 513": "the 512 symbols", "--difference 2": "between 0 and 1", "--min_length 2": "<bos>",
    "--max_length 4": "at least min_length (32). Raise it, or lower min_length", "--ordr 1": "--order",
}
CORPUS_FLAGS = [("digits", *flags.split()) for flags in DIGITS_FLAGS]
CORPUS_FLAGS += [("markov", *flags.split()) for flags in MARKOV_FLAGS]


@pytest.mark.parametrize("kind, flag, value", CORPUS_FLAGS)
def test_bad_corpora(kind, flag, value, tmp_path):
    out = [] if flag == "--out_dir" else ["--out_dir", "new"]
    named = value[:9] if flag in ("--out_dir", "--config") else flag[2:]
    command_refuses("corpus", kind, *out, flag, value, cwd=tmp_path, words=[named, REMEDIES.get(f"{flag} {value}", "")])


IMPOSSIBLE_RUNS = [
    "--n_head 5", "--n_embd 1000000000", "--max_length 1", "--learning_rate nan",
    "--model.resid_pdrop 2", "--pad_token x", "--precision int8", "--long cut", "--vocab_path x",
]


@pytest.mark.parametrize("flags", IMPOSSIBLE_RUNS)
def test_nothing_is_drawn_for_a_run_that_cannot_be(flags, tmp_path):
    command_refuses("train", *flags.split(), cwd=tmp_path)


# --- models

MODEL = "outputs/best_model"
INFER = ["infer", "--mode", "generate", "--max_new_tokens", 2, "--seed", 0, "--model_path", MODEL]
EVALUATE = ["evaluate", "--num_samples", 0, "--model_path"]
def generate(**given): return infer_command(model_path=MODEL, mode="generate", max_new_tokens=2, seed=0, **given)
def classify(): return infer_command(model_path="c/best_model", mode="classify", prompt="C4 D4")
def evaluate(out="outputs"): return evaluate_command(f"{out}/best_model", num_samples=0)
def go_on(**given):
    "Trains on from the language model."
    sizes = dict(max_length=16, n_layer=1, n_head=2, n_embd=16)
    return training.train(Config(init_from=MODEL, output_dir="new", **{**sizes, **given}))
def changed(**fields): return lambda d: {**d, **fields}
def without(*names): return lambda d: {k: v for k, v in d.items() if k not in names}


def within(*path, value):
    "A change of a value deeper in an object."
    def change(d):
        d = json.loads(json.dumps(d))
        part = d
        for name in path[:-1]: part = part[name]
        part[path[-1]] = value
        return d
    return change


DEVICES = {
    **NO_FILES,
    "gone": nothing,
    "empty": Path.touch,
    "random": writes(bytes(range(256)) * 9),
    "text": writes(b"weights"),
    "a terabyte": a_terabyte,
}
TEXTS = {
    "half": lambda t: t[:len(t)//2],
    "a list": lambda t: f"[{t}]",
    "null": lambda t: "null",
    "deep": lambda t: '{"a": ' * 50_000,
    "UTF-16": lambda t: t.encode("utf-16"),
    "5,000 digits": lambda t: t.replace("{", f'{{"x": {DIGITS}, ', 1),
    "NUL": lambda t: t + "\0",
    "twice": lambda t: t.replace("{", '{"x": 1, "x": 1, ', 1),
}
PARTS = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
CONFIG_JSON = {
    "no type": without("model_type"),
    "another type": changed(model_type="bert"),
    "type a list": changed(model_type=["gpt2"]),
    "type null": changed(model_type=None),
    "another architecture": changed(model_type="llama", architectures=["LlamaForCausalLM"]),
    "n_layer text": changed(n_layer="1"),
    "n_layer real": changed(n_layer=1.0),
    "n_layer true": changed(n_layer=True),
    "n_layer null": changed(n_layer=None),
    "n_layer 0": changed(n_layer=0),
    "n_layer -1": changed(n_layer=-1),
    "n_layer 2": changed(n_layer=2),
    "n_layer 10**9": changed(n_layer=10**9),
    "n_layer 10**300": changed(n_layer=10**300),
    "n_embd 10**9": changed(n_embd=10**9),
    "n_embd 32": changed(n_embd=32),
    "n_embd 8": changed(n_embd=8),
    "n_embd 0": changed(n_embd=0),
    "n_embd a list": changed(n_embd=[16]),
    "n_head 3": changed(n_head=3),
    "n_head 0": changed(n_head=0),
    "n_head -2": changed(n_head=-2),
    "n_positions 10**12": changed(n_positions=10**12),
    "n_positions 8": changed(n_positions=8),
    "n_positions 0": changed(n_positions=0),
    "n_positions text": changed(n_positions="16"),
    "vocab_size 10**12": changed(vocab_size=10**12),
    "vocab_size 10": changed(vocab_size=10),
    "vocab_size 8": changed(vocab_size=8),
    "vocab_size -9": changed(vocab_size=-9),
    "vocab_size null": changed(vocab_size=None),
    "n_inner 10": changed(n_inner=10),
    "n_inner 10**15": changed(n_inner=10**15),
    "n_inner -1": changed(n_inner=-1),
    "n_inner text": changed(n_inner="many"),
    "no layers": without("n_layer"),
    "no dimensions": without("n_embd"),
    "no vocab_size": without("vocab_size"),
    "nothing but the type": lambda d: {"model_type": "gpt2"},
    "curve unknown": changed(activation_function="evil"),
    "curve a list": changed(activation_function=["gelu"]),
    "curve null": changed(activation_function=None),
    "dropout text": changed(resid_pdrop="x"),
    "dropout 2": changed(resid_pdrop=2),
    "dropout NaN": changed(embd_pdrop=math.nan),
    "epsilon NaN": changed(layer_norm_epsilon=math.nan),
    "epsilon infinite": changed(layer_norm_epsilon=math.inf),
    "epsilon -1": changed(layer_norm_epsilon=-1.0),
    "epsilon text": changed(layer_norm_epsilon="small"),
    "range -1": changed(initializer_range=-1.0),
    "cross-attention": changed(add_cross_attention=True),
    "untied": changed(tie_word_embeddings=False),
    "use_cache text": changed(use_cache="yes"),
    "bos 10**9": changed(bos_token_id=10**9),
    "bos null": changed(bos_token_id=None),
    "eos a list": changed(eos_token_id=[2]),
    "eos text": changed(eos_token_id="2"),
    "pad 1": changed(pad_token_id=1),
    "pad null": changed(pad_token_id=None),
    "pad gone": without("pad_token_id"),
    "a classifier": changed(architectures=["GPT2ForSequenceClassification"]),
}
C_CONFIG_JSON = {
    "no names": without("id2label"),
    "names null": changed(id2label=None),
    "names a list": changed(id2label=NAMES),
    "no class": changed(id2label={}),
    "one class": changed(id2label={"0": "up"}),
    "three classes": changed(id2label={"0": "a", "1": "b", "2": "c"}),
    "10,000 classes": changed(id2label={str(k): str(k) for k in range(10_000)}),
    "a gap": changed(id2label={"0": "a", "2": "b"}),
    "no numbers": changed(id2label={"a": "b", "c": "d"}),
    "same name": changed(id2label={"0": "a", "1": "a"}),
    "names numbers": changed(id2label={"0": 0, "1": 1}),
    "name null": changed(id2label={"0": None, "1": "a"}),
    "escape": changed(id2label={"0": "\x1b[2J", "1": "a"}),
    "C1": changed(id2label={"0": "\x9b2J", "1": "a"}),
    "NUL": changed(id2label={"0": "\0", "1": "a"}),
    "two lines": changed(id2label={"0": "a\nb", "1": "a"}),
    "right to left": changed(id2label={"0": "\u202ea", "1": "a"}),
    "half a character": changed(id2label={"0": "\ud800", "1": "a"}),
    "a language model": changed(architectures=["GPT2LMHeadModel"]),
    "architecture null": changed(architectures=None),
    "architecture text": changed(architectures="GPT2ForSequenceClassification"),
}


def renamed(symbol, name):
    "A vocabulary in which this symbol has another name."
    return within("model", "vocab", value={name if s == symbol else s: i for s, i in VOCAB.items()})


TOKENIZER_JSON = {
    "no model": without("model"),
    "model null": changed(model=None),
    "model a list": changed(model=[]),
    "no vocabulary": within("model", value={"type": "WordLevel"}),
    "BPE": within("model", "type", value="BPE"),
    "type a list": within("model", "type", value=["WordLevel"]),
    "vocabulary null": within("model", "vocab", value=None),
    "vocabulary a list": within("model", "vocab", value=[*VOCAB]),
    "vocabulary empty": within("model", "vocab", value={}),
    "symbol more": within("model", "vocab", "H4", value=9),
    "symbol with id 10**9": within("model", "vocab", "H4", value=10**9),
    "id -1": within("model", "vocab", "C4", value=-1),
    "id text": within("model", "vocab", "C4", value="4"),
    "id null": within("model", "vocab", "C4", value=None),
    "same id": within("model", "vocab", "C4", value=5),
    "id 10**30": within("model", "vocab", "C4", value=10**30),
    "escape": renamed("C4", "\x1b[2J"),
    "space": renamed("C4", "C 4"),
    "empty symbol": renamed("C4", ""),
    "half a character": renamed("C4", "\udc00"),
    "no eos": renamed("<eos>", "end"),
    "other order": within("model", "vocab", value={**VOCAB, "<pad>": 1, "<bos>": 0}),
}
TOKENIZER_CONFIG = {
    "no padding": without("pad_token"),
    "no end": without("eos_token"),
    "padding null": changed(pad_token=None),
    "padding a list": changed(pad_token=["<pad>"]),
    "padding a number": changed(pad_token=0),
    "unknown padding": changed(pad_token="<padding>"),
    "padding like end": changed(pad_token="<eos>"),
    "another end": changed(eos_token="C4"),
    "nothing": lambda d: {},
    "escape": changed(bos_token="\x1b]0;evil\x07"),
}
RUN_YAML = {
    "gone": None,
    "empty": "",
    "half": "data_path: data.jsonl\nmodel: {",
    "a list": "[1]",
    "unknown key": "data_path: data.jsonl\nevil: 1",
    "a tag": "data_path: !!python/object/apply:os.system ['touch evil']",
    "bomb": BOMB,
    "data gone": "data_path: nowhere",
    "data null": "data_path: null",
    "data a number": "data_path: 7",
    "data a list": "data_path: [data.jsonl]",
    "data a device": "data_path: /dev/zero",
    "data with NUL": 'data_path: "a\\0"',
    "max_length text": "data_path: data.jsonl\nmax_length: long",
    "max_length 0": "data_path: data.jsonl\nmax_length: 0",
    "long": "data_path: data.jsonl\nmax_length: 16\nlong: cut",
    "seed -1": "data_path: data.jsonl\nmax_length: 16\nseed: -1",
    "seed infinite": "data_path: data.jsonl\nseed: .inf",
    "fraction 7": "data_path: data.jsonl\nmax_length: 16\nvalidation_fraction: 7",
    "fraction -1": "data_path: data.jsonl\nmax_length: 16\nvalidation_fraction: -1",
    "fraction nan": "data_path: data.jsonl\nmax_length: 16\nvalidation_fraction: .nan",
    "other seed": "data_path: data.jsonl\nmax_length: 8",
}
SPLIT_JSON = {
    "half": '{"fingerprint": "',
    "empty": "",
    "a list": "[]",
    "null": "null",
    "no fingerprint": "{}",
    "another": '{"fingerprint": "0"}',
    "a number": '{"fingerprint": 7}',
    "deep": '{"a":' * 10**5,
    "digits": f'{{"fingerprint": {DIGITS}}}',
    "binary": b"\xff\xfe\x00",
}


def both_refuse(folder, out, words):
    "Neither inference nor evaluation takes this model."
    refuses(generate if out == "outputs" else classify, folder, words)
    refuses(evaluate, folder, words, out=out)


@pytest.mark.parametrize("file", PARTS)
@pytest.mark.parametrize("name", DEVICES)
def test_parts_of_a_model_that_are_no_files(file, name, copied):
    put(copied/"outputs/best_model"/file, DEVICES[name])
    both_refuse(copied, "outputs", [file])
    refuses(go_on, copied, [file])


@pytest.mark.parametrize("file", PARTS[:3])
@pytest.mark.parametrize("name", TEXTS)
def test_parts_of_a_model_that_are_not_json(file, name, copied):
    path = copied/"outputs/best_model"/file
    damaged = TEXTS[name](path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    both_refuse(copied, "outputs", [f"outputs/best_model/{file}: "])


CHANGES = {
    ("outputs", "config.json"): CONFIG_JSON,
    ("c", "config.json"): C_CONFIG_JSON,
    ("outputs", "tokenizer.json"): TOKENIZER_JSON,
    ("outputs", "tokenizer_config.json"): TOKENIZER_CONFIG,
}
UNFIT = [(out, file, name) for (out, file), changes in CHANGES.items() for name in changes]


@pytest.mark.parametrize("out, file, name", UNFIT)
def test_models_that_do_not_fit_together(out, file, name, copied):
    path = copied/out/"best_model"/file
    content = json.loads(path.read_text())
    path.write_text(json.dumps(CHANGES[out, file][name](content)))
    both_refuse(copied, out, [f"{out}/best_model"])


@pytest.mark.parametrize("name", RUN_YAML)
def test_settings_of_a_model_that_are_damaged(name, copied):
    path = copied/"outputs/best_model/config.yaml"
    path.unlink()
    if RUN_YAML[name] is not None: path.write_text(RUN_YAML[name])
    refuses(evaluate, copied, ["data_path"] if "data" in name else [])
    if "max_length" in name or "long" in name: return
    trainable = "other" in name or "f" in name # refused for its own mistake, so that nothing is trained
    refuses(go_on, copied, **({"learning_rate": math.nan} if trainable else {}))


@pytest.mark.parametrize("name", SPLIT_JSON)
def test_damaged_accounts_of_the_split(name, copied):
    content = SPLIT_JSON[name]
    (copied/"outputs/split.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    other_data = name in ("no fingerprint", "another", "a number")
    refuses(evaluate, copied, ["has changed since the training" if other_data else "split.json"])


KEY = "transformer.h.0.ln_1.weight"


def weight(name=KEY, **fields):
    "Changes what the head says of a weight."
    return lambda head, body: ({**head, name: {**head[name], **fields}}, body)


def shape(*dims): return weight("transformer.wte.weight", shape=dims)


def offsets_turned(head, body):
    start, end = head[KEY]["data_offsets"]
    return weight(data_offsets=[end, start])(head, body)


WEIGHTS = {
    "cut": lambda head, body: (head, body[:-1]),
    "cut in half": lambda head, body: (head, body[:len(body)//2]),
    "no bytes": lambda head, body: (head, b""),
    "bytes after": lambda head, body: (head, body + b"x"),
    "no head": lambda head, body: (b"", body),
    "head a list": lambda head, body: ([], body),
    "head null": lambda head, body: (None, body),
    "half a head": lambda head, body: (json.dumps(head).encode()[:100], body),
    "no weights": lambda head, body: ({}, b""),
    "a weight less": lambda head, body: (without(KEY)(head), body),
    "another name": lambda head, body: ({("x" if k == KEY else k): v for k, v in head.items()}, body),
    "a petabyte": shape(2**30, 2**20),
    "2**64": shape(2**63, 2),
    "-1": shape(-1, 16),
    "0": shape(0, 16),
    "real": shape(9.0, 16),
    "text": shape("9", 16),
    "turned": shape(16, 9),
    "one long row": shape(144),
    "no shape": shape(),
    "deep shape": weight(shape=[1] * 1000 + [16]),
    "another number type": weight(dtype="I32"),
    "8 bits": weight(dtype="I8"),
    "unknown type": weight(dtype="EVIL"),
    "offsets turned": offsets_turned,
    "offsets beyond": weight(data_offsets=[2**50, 2**50 + 64]),
    "offsets -1": weight(data_offsets=[-64, 0]),
    "overlap": weight(data_offsets=[0, 64]),
    "deep head": lambda head, body: (b'{"a":' * 10**5, body),
    "all NaN": lambda head, body: (head, b"\xff" * len(body)),
    "infinite": lambda head, body: (head, body[:-4] + b"\x00\x00\x80\x7f"),
    "metadata of wrong type": lambda head, body: ({**head, "__metadata__": [1]}, body),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights(name, copied):
    rebuilt(copied/"outputs/best_model/model.safetensors", WEIGHTS[name])
    both_refuse(copied, "outputs", ["model.safetensors"])


@pytest.mark.parametrize("size", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_heads_that_cannot_be_so_long(size, copied):
    path = copied/"outputs/best_model/model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    both_refuse(copied, "outputs", ["model.safetensors", "cannot be opened"])


@pytest.mark.parametrize("out", ["outputs", "c"])
def test_weights_far_too_large(out, copied):
    largest = b"\x00\x00\x7f\x7f" # nearly the largest of 32 bits
    rebuilt(copied/out/"best_model/model.safetensors", lambda head, body: (head, largest * (len(body)//4)))
    if out == "c": refuses(classify, copied)
    else: answer(generate, copied)
    refuses(evaluate, copied, out=out)


ASK = [
    "--num_samples 0", "--num_samples -1", "--num_samples many", "--max_new_tokens 0",
    "--max_new_tokens -5", "--temperature -1", "--temperature nan", "--temperature inf",
    "--temperature 1e-300", "--top_k -1", "--top_p 0", "--top_p 1.5", "--top_p nan",
    "--repetition_penalty 0", "--repetition_penalty -1", "--repetition_penalty inf",
    "--repetition_penalty 1e-300", "--seed 1000000000000000000000000", "--seed x", "--top 0",
    "--prompt H4", "--prompt <eos>", "--prompt <pad>", "--prompt \x1b[2J", "--prompt_file nowhere",
    "--prompt_file vocab.json", "--prompt_file /dev/zero", "--num_prompts 0", "--num_prompts -1",
    "--num_prompts 3 --prompt_share 1.5", "--num_prompts 3 --prompt_share nan",
    "--num_prompts 3 --prompt C4", "--out_dir data.jsonl", "--mode sing", "--model_path nowhere",
    "--model_path data.jsonl", "--model_path .", "--model_path /dev/null",
    "--out_dir " + "x" * 5000,
]
MEASURE = [
    "--batch_size 0", "--batch_size -1", "--num_samples -1", "--seed -1", "--data_path nowhere",
    "--data_path vocab.json", "--data_path /dev/zero", "--data_path outputs",
    "--out_dir data.jsonl", "--out_dir outputs/best_model", "--model_path nowhere",
    "--model_path data.jsonl", "--config nowhere.yaml", "--skip_bad_lines maybe",
    "--out_dir " + "x" * 5000,
]


@pytest.mark.parametrize("flags", ASK)
def test_questions_that_cannot_be_answered(flags, copied):
    command_refuses(*INFER, *flags.split(" "), cwd=copied)


@pytest.mark.parametrize("flags", MEASURE)
def test_measurements_that_cannot_be(flags, copied):
    command_refuses(*EVALUATE, "outputs/best_model", *flags.split(" "), cwd=copied)
    assert not plt.get_fignums() # what was drawn for a place that cannot be written to is gone


NEW = ["--output_dir", "new"]
TUNE = ["train", "--init_from", MODEL, *NEW]
SAID = [
    ("data.jsonl", [*TRAIN, *NEW], "data.jsonl: 1 of 1 lines"),
    ("vocab.json", [*TRAIN, *NEW], "vocab.json: not JSON"),
    ("data.jsonl", [*INFER, "--prompt_file", "data.jsonl"], "data.jsonl: 1 of 1 lines"),
    ("data.jsonl", [*EVALUATE, MODEL], "data.jsonl: 1 of 1 lines"),
]
for command in (INFER, [*EVALUATE, MODEL], TUNE):
    SAID += [(f"{MODEL}/config.json", command, "config.json: not JSON"),
             (f"{MODEL}/tokenizer.json", command, "tokenizer.json: not JSON"),
             (f"{MODEL}/model.safetensors", command, "model.safetensors: cannot be opened")]
CLASSIFY = ["infer", "--mode", "classify", "--prompt", "C4 D4", "--model_path", "c/best_model"]
SAID += [
    (f"{MODEL}/config.yaml", [*INFER, "--num_prompts", 2], "config.yaml, line 1: cannot be read"),
    ("outputs/split.json", [*EVALUATE, MODEL], "split.json: not JSON"),
    ("c/best_model/config.json", CLASSIFY, "config.json: not JSON"),
    ("c/best_model/config.json", [*EVALUATE, "c/best_model"], "config.json: not JSON"),
]


@pytest.mark.parametrize("file, ask, said", SAID)
def test_the_command_says_it_with_exit_code_2(file, ask, said, copied):
    (copied/file).write_text("{")
    command_refuses(*ask, cwd=copied, words=[said])


# --- what was right, mutated

def fuzz(examples):
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))
odd = st.sampled_from([10**9, -1, 2**63, 10**30, "C4", "<eos>", "", "\x1b[2J"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | odd
lists = partial(st.lists, max_size=3)
dictionaries = partial(st.dictionaries, st.text(max_size=3), max_size=3)
values = st.recursive(scalars, lambda inner: lists(inner) | dictionaries(inner), max_leaves=5)


@st.composite
def bitten(draw, content: bytes):
    "Some bytes changed, a piece cut out or repeated, or the end gone."
    content = bytearray(content)
    place = st.integers(0, len(content) - 1)
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted((draw(place), draw(place)))
        how = draw(st.sampled_from(["flip", "flip", "cut", "end", "again"]))
        if how == "flip": content[a % len(content)] ^= draw(st.integers(1, 255))
        elif how == "cut": del content[a:min(b, a + 20)]
        elif how == "end": del content[max(1, b):]
        else: content[a:a] = content[a:min(b, a + 200)]
        if not content: break
    return bytes(content)


@st.composite
def replaced(draw, content: str):
    "A value in an object, at any depth, becomes another, goes, or gets a neighbour."
    d = json.loads(content)
    part = d
    key = draw(st.sampled_from(sorted(d)))
    while isinstance(part[key], (dict, list)) and part[key] and draw(st.booleans()):
        part = part[key]
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
    how = draw(st.sampled_from(["value", "value", "gone", "more"]))
    if how == "gone": del part[key]
    elif how == "more" and isinstance(part, dict): part[draw(st.text(max_size=5))] = draw(values)
    else: part[key] = draw(values)
    return json.dumps(d).encode()


@pytest.fixture(scope="module")
def mutated(runs, tmp_path_factory):
    "Puts another content into a file of the runs, asks, and puts the old one back."
    folder = tmp_path_factory.mktemp("mutated")
    shutil.copytree(runs, folder, dirs_exist_ok=True)
    def ask(file, content, ask, **given):
        path = folder/file
        right = path.read_bytes()
        path.write_bytes(content)
        try: answer(ask, folder, **given)
        finally:
            path.write_bytes(right)
            shutil.rmtree(folder/"new", ignore_errors=True)
    return ask


AS_PROMPTS = dict(num_prompts=2, prompt_file="data.jsonl")


@fuzz(40)
@given(st.data())
def test_mutated_lines(runs, mutated, data):
    content = data.draw(bitten((runs/"data.jsonl").read_bytes()[:600]))
    mutated("data.jsonl", content, generate, **AS_PROMPTS)


@fuzz(30)
@given(st.data())
def test_mutated_gzip(mutated, data):
    mutated("data.jsonl", data.draw(bitten(GZIPPED)), generate, **AS_PROMPTS)


@fuzz(40)
@given(st.data())
def test_mutated_records(mutated, data):
    content = data.draw(replaced(json.dumps(SHORT[0])))
    mutated("data.jsonl", content, generate, **AS_PROMPTS)


@fuzz(40)
@given(st.data())
def test_mutated_vocabularies(runs, mutated, data):
    "The vocabulary is the data too, which is refused, so that nothing is trained."
    content = (runs/"vocab.json").read_text()
    changed = data.draw(bitten(content.encode()) | replaced(content))
    mutated("vocab.json", changed, train, output_dir="new", data_path="vocab.json")


@fuzz(80)
@given(st.data())
def test_mutated_configurations(runs, mutated, data):
    out = data.draw(st.sampled_from(["outputs", "c"]))
    content = (runs/out/"best_model/config.json").read_text()
    changed = data.draw(bitten(content.encode()) | replaced(content))
    mutated(f"{out}/best_model/config.json", changed, generate if out == "outputs" else classify)


@fuzz(60)
@given(st.data())
def test_mutated_tokenizers(runs, mutated, data):
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]))
    file = f"{MODEL}/{name}"
    content = (runs/file).read_text()
    mutated(file, data.draw(bitten(content.encode()) | replaced(content)), generate)


@fuzz(80)
@given(st.data())
def test_mutated_weights(runs, mutated, data):
    content = (runs/"outputs/best_model/model.safetensors").read_bytes()
    n = 8 + int.from_bytes(content[:8], "little")
    heads = bitten(content[:n]).map(lambda head: head + content[n:])
    mutated(f"{MODEL}/model.safetensors", data.draw(heads | bitten(content)), generate)


@fuzz(50)
@given(st.data())
def test_mutated_settings(runs, mutated, data):
    content = (runs/"outputs/best_model/config.yaml").read_bytes()
    right = yaml.safe_load(content)
    changes = st.tuples(st.sampled_from(sorted(right)), values)
    changed = changes.map(lambda change: yaml.safe_dump({**right, change[0]: change[1]}).encode())
    mutated(f"{MODEL}/config.yaml", data.draw(bitten(content) | changed), generate, num_prompts=2)


def test_the_cases_are_many():
    tables = [
        LINES, LABELS, DATA, FOLDERS, FOLDERS, VOCABS, {*TYPES, *SETTINGS, *UNKNOWN}, SAID,
        SETTINGS_FILES, SETTINGS_FILES, {*CORPUS_FLAGS}, *[DEVICES] * len(PARTS), TEXTS, TEXTS, TEXTS,
        CONFIG_JSON, C_CONFIG_JSON, TOKENIZER_JSON, TOKENIZER_CONFIG, RUN_YAML, SPLIT_JSON, WEIGHTS,
        {*ASK, *MEASURE},
    ]
    by_hand = sum(map(len, tables))
    assert by_hand >= 700, by_hand
