"Every form of data, and every kind of bad line, all at once; one by one they are in test_bad_input.py."
import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import NOTES, TINY, VOCAB, refused, seqgpt, worked, write_lines
from datasets import Dataset
from matplotlib.colors import to_hex

from seqgpt.checks import InputError
from seqgpt.config import Config
from seqgpt.corpora import write_digits
from seqgpt.data import collate, column, given_split, train_validation_split
from seqgpt.encoding import read_corpus
from seqgpt.markov import make_markov, write_markov
from seqgpt.plots import CELL_COLOURS, plot_batch
from seqgpt.records import frame
from seqgpt.resolving import load_data, load_vocab
from seqgpt.sources import corpus_files, find_vocab
from seqgpt.streaming import stream_corpus
from seqgpt.tokenizer import make_tokenizer
from seqgpt.writing import write_corpus

FORMS = {
    "tokens": lambda t, l: {"tokens": t, "label": l},
    "sequence": lambda t, l: {"sequence": t},
    "text": lambda t, l: {"text": " ".join(t), "label": "up" if l else "down"},
    "input_ids": lambda t, l: {"input_ids": [VOCAB[s] for s in t]},
    "framed": lambda t, l: {"tokens": ["<bos>", *t, "<eos>"], "label": l},
}


@pytest.fixture
def encode(tmp_path):
    return lambda path, **kwargs: read_corpus(path, make_tokenizer(VOCAB), cache_dir=tmp_path/"cache", **kwargs)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_corpus(form, melodies, encode, tmp_path):
    path = write_lines(tmp_path, [FORMS[form](t, l) for t, l in melodies])
    assert encode(path).dataset["input_ids"][:] == [[1, *(VOCAB[s] for s in t), 2] for t, _ in melodies]


def test_windows_gzip_bom_folder_are_the_same_corpus(melodies, encode, tmp_path):
    lines = [json.dumps({"tokens": t}) for t, _ in melodies]
    plain = "\n".join(lines).encode()
    want = [[1, *(VOCAB[s] for s in t), 2] for t, _ in melodies]
    files = {
        "crlf": plain.replace(b"\n", b"\r\n"), "bom": b"\xef\xbb\xbf" + plain, "zipped": gzip.compress(plain),
        "blank": b"\n\n" + plain + b"\n\n",
    }
    (tmp_path/"shards").mkdir()
    (tmp_path/"shards/a.jsonl").write_bytes("\n".join(lines[:50]).encode())
    (tmp_path/"shards/b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[50:]).encode()))
    for name, content in files.items():
        (tmp_path/name).write_bytes(content)
        assert encode(tmp_path/name).dataset["input_ids"][:] == want, name
    assert encode(tmp_path/"shards").dataset["input_ids"][:] == want


BAD = {
    "malformed JSON": [b'{"tokens": ["C4"'],
    "no tokens": [b'{"note": ["C4"]}', b'{"tokens": 3}', b'{"tokens": null}', b'{"text": ["C4"], "sequence": {}}'],
    "unknown token": [b'{"tokens": ["H4"]}', b'{"tokens": [1, 2]}', b'{"tokens": [["C4"]]}', b'{"text": "C4 c4"}'],
    "id out of range": [b'{"input_ids": [9]}', b'{"input_ids": [-1]}'],
    "id is not a whole number": [b'{"input_ids": [4.5]}', b'{"input_ids": [true]}', b'{"input_ids": ["4"]}'],
    "empty sequence": [b'{"tokens": []}', b'{"text": "  "}'],
    "not UTF-8": [b'{"text": "C4 \xff"}'],
    "not an object": [b'["C4"]', b'"C4"', b'null'],
    "padding inside a sequence": [b'{"tokens": ["C4", "<pad>", "D4"]}'],
}


def test_all_bad_lines_are_counted_with_their_places(melodies, tmp_path):
    good = [{"tokens": t} for t, _ in melodies]
    bad = [line for lines in BAD.values() for line in lines]
    write_lines(tmp_path, good[:10] + bad + good[10:])
    result = seqgpt("train", "--data_path", "data.jsonl", cwd=tmp_path)
    kinds = [f"{kind}: {len(lines)}, at line" for kind, lines in BAD.items()]
    refused(result, f"{len(bad)} of {200 + len(bad)} lines", "--skip_bad_lines", *kinds, "line 11 ")
    assert not (tmp_path/"outputs").exists()
    flags = ["--data_path", "data.jsonl", "--skip_bad_lines", "--max_steps", 2, "--max_length", 16, *TINY]
    result = worked("train", *flags, cwd=tmp_path, bare=True)
    assert "200 sequences" in result.stdout and f"{len(bad)} bad lines left out" in result.stdout


def test_required_labels(melodies, encode, tmp_path):
    rows = [{"tokens": ["C4"], "label": label} for label in (0, None, "two", -1, "")]
    del rows[1]["label"]
    path = write_lines(tmp_path, rows)
    said = r"label missing: 2, at line 2, line 5; unknown label: 2, at line 3 \('two'\), line 4 \(-1\)"
    with pytest.raises(ValueError, match=said): encode(path, classes=["0", "1"])
    with pytest.raises(ValueError, match=r"label missing: 2, at line 2, line 5"): encode(path, classes=[])
    assert encode(path).dataset["label"][:] == ["0", None, "two", "-1", None]
    rows = [{"tokens": ["C4"], "label": label} for label in (" two ", "  ", "t\nwo")]
    padded = write_lines(tmp_path/"padded", rows)
    assert encode(padded, classes=[], skip_bad_lines=True).dataset["label"][:] == ["two"]


def test_a_label_is_a_name_however_it_is_written(encode, tmp_path):
    same = {"1": [1, 1.0, "1", " 1"], "true": [True, "true"], "-3": [-3, -3.0], "0.5": ["0.5"]}
    rows = [{"tokens": ["C4"], "label": label} for labels in same.values() for label in labels]
    path = write_lines(tmp_path, rows)
    assert encode(path, classes=[]).dataset["label"][:] == [name for name, labels in same.items() for _ in labels]
    frame = pd.DataFrame({"tokens": [["C4"], ["D4"], ["E4"]], "label": [1, None, 2]}) # pandas makes floats of it
    frame.to_parquet(tmp_path/"a.parquet")
    assert encode(tmp_path/"a.parquet").dataset["label"][:] == ["1", None, "2"]
    frame.rename(columns={"label": "labels"}).to_parquet(tmp_path/"b.parquet")
    with pytest.raises(InputError, match="label missing: 3, at line 1 \\(no \"label\", but 'labels'\\)"):
        encode(tmp_path/"b.parquet", classes=[])


def test_a_language_model_needs_no_labels_and_says_which_it_ignores(encode, tmp_path):
    labels = [0.5, [1], {"up": 1}, "a\0b", "x"*2000, float("inf"), "up", None, float("nan")]
    path = write_lines(tmp_path, [{"tokens": ["C4"], "label": label} for label in labels])
    corpus = encode(path)
    assert corpus.dataset["label"][:] == [None]*6 + ["up", None, None] and corpus.report["labels_ignored"] == 6
    assert "Labels that are ignored, as neither whole numbers nor names: 6" in str(corpus)
    said = "label is not a whole number or a name: 5, .*label missing: 2, .*label longer"
    with pytest.raises(InputError, match=said): encode(path, classes=[])


def test_whole_floats_are_ids(encode, tmp_path):
    path = write_lines(tmp_path, [{"input_ids": [4.0, 5, 8.0]}])
    assert encode(path).dataset["input_ids"][:] == [[1, 4, 5, 8, 2]]


def test_words_of_letters_that_are_symbols(tmp_path):
    "To leave such lines out would keep the sequences of one letter."
    write_corpus(tmp_path/"dna", ["GATTACA", "ACGT"])
    tokenizer = make_tokenizer(tmp_path/"dna/vocab.json")
    def read(*rows): return read_corpus(write_lines(tmp_path/"c", rows), tokenizer, cache_dir=tmp_path)
    said = r"no spaces between symbols: 2, at line 1 \('GATTACA'\), line 2 \('TA'\)\.\nPut spaces between"
    with pytest.raises(InputError, match=said) as e:
        read({"text": "GATTACA"}, {"tokens": ["TA"]}, {"text": "A"})
    assert "--skip_bad_lines" not in str(e.value)
    with pytest.raises(InputError, match="line 1: no spaces between symbols .*Put spaces between"):
        stream_corpus(tmp_path/"c", make_tokenizer(tmp_path/"dna/vocab.json"), fraction=0.5)
    with pytest.raises(InputError, match="unknown token: 1, at line 1 \\('GATX'\\)"):
        read({"text": "GATX"}, {"text": "A"}, {"text": "A C"})


@pytest.mark.parametrize("rows, words", [
    ([{"token": ["C4"]}]*9,
     ["but 'token')", 'Each line is an object such as {"tokens": ["a", "b"], "label": "name"}.']),
    ([{"tokens": ["H4"]}]*9, ["unknown token", "Mend them."]),
    ([{"tokens": ["C4"], "labels": 1}]*9, ["label missing", "'labels'", '"label": "name"}.']),
    ([{"tokens": "C4"}]*9, ['"tokens" is str, not a list']),
])
def test_where_most_lines_are_bad_they_are_not_to_be_skipped(rows, words, encode, tmp_path):
    path = write_lines(tmp_path, [*rows, *[{"tokens": ["C4"], "label": 0}]*5])
    with pytest.raises(InputError) as e: encode(path, classes=[])
    for word in words: assert word in str(e.value)
    assert "--skip_bad_lines" not in str(e.value)


def test_names_that_begin_with_a_dot_are_not_data(melodies, encode, tmp_path):
    for name in ("a.jsonl", "._a.jsonl", ".copy.jsonl"):
        write_lines(tmp_path/"c", [{"tokens": t} for t, _ in melodies]).rename(tmp_path/"c"/name)
    assert len(encode(tmp_path/"c").dataset) == len(melodies)
    assert len(encode(tmp_path/"c/.copy.jsonl").dataset) == len(melodies) # unless one is named
    (tmp_path/"c/a.jsonl").unlink()
    with pytest.raises(InputError, match="no file in this folder is called"): corpus_files(tmp_path/"c")


LONG_CHOICES = [("truncate", "tokens cut off"), ("split", "split into"), ("error", "longer than max_length")]


@pytest.mark.parametrize("long, said", LONG_CHOICES)
def test_long_sequences_are_always_said(long, said, melodies, tmp_path):
    write_lines(tmp_path, [{"tokens": t} for t, _ in melodies])
    flags = ["--data_path", "data.jsonl", "--max_length", 8, "--long", long, "--max_steps", 2, *TINY]
    result = seqgpt("train", *flags, cwd=tmp_path, bare=True)
    if long == "error": refused(result, said)
    else: assert result.returncode == 0 and said in result.stdout, result.stderr


def test_without_a_length_nothing_is_cut(encode, tmp_path):
    "However long the data is; only a model has a length, and `read_corpus` is told it."
    path = write_lines(tmp_path, [{"tokens": ["C4"]*n} for n in (3, 1100, 70_000)])
    corpus = encode(path)
    stream, _ = stream_corpus(path, make_tokenizer(VOCAB), fraction=0)
    assert [n - 2 for n in corpus.dataset["length"]] == [3, 1100, 70_000]
    assert [n - 2 for n in stream.dataset.first(3)["length"]] == [3, 1100, 70_000]
    assert corpus.report["tokens_lost"] == corpus.report["long_sequences"] == 0 and "cut off" not in str(corpus)


def test_split_keeps_every_token(melodies, encode, tmp_path):
    path = write_lines(tmp_path, [{"tokens": t} for t, _ in melodies])
    uncut = encode(path).dataset["input_ids"]
    pieces = encode(path, max_length=5, long="split").dataset["input_ids"]
    assert sum(len(ids) - 1 for ids in pieces) == sum(len(ids) - 1 for ids in uncut)
    assert max(map(len, pieces)) == 5


# --- files in another form

def of_numpy(save, *arrays):
    out = io.BytesIO()
    save(out, *arrays)
    return out.getvalue()


def archive(kind):
    out = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as f: f.addfile(tarfile.TarInfo("a"))
    else:
        name = "[Content_Types].xml" if kind == "xlsx" else "a.txt"
        with zipfile.ZipFile(out, "w") as f: f.writestr(name, "x")
    return out.getvalue()


def of_arrow(make):
    out = io.BytesIO()
    make(out, pa.schema({"tokens": pa.string()})).close()
    return out.getvalue()


OTHER = { # what is not read, how it is called, and what is advised
    "a.csv": (b'user,event\n1,"in, out"\n2,out\n', "a table (CSV)", "write_corpus"),
    "semicolons.csv": (b"user;event\n1;in\n", "a table (CSV)", "write_corpus"),
    "a.tsv": (b"user\tevent\n1\tin\n", "a table (TSV)", "write_corpus"),
    "wide.csv": (b"1,"*9999 + b"1", "a table (CSV)", ""),
    "a.csv.gz": (
        gzip.compress(b"user,event\n1,in\n"), "a table (CSV), compressed with gzip", "write_corpus"),
    "a.fasta": (b">gene 1\nGATTACA\n", "a FASTA file", "write_corpus"),
    "a.fastq": (b"@read\nGATT\n+\nIIII\n", "a FASTQ file", ""),
    "a.txt": (b"the quick, brown\nfox\n", "a text", "line of its own"),
    "list.json": (json.dumps([{"tokens": ["C4"]}]*9).encode(), "a JSON list", "line of its own"),
    "pretty.json": (
        json.dumps([{"tokens": ["C4"]}]*9, indent=2).encode(), "a JSON list", "line of its own"),
    "lines.json": (b'[\n{"tokens": ["C4"]},\n{"tokens": ["C4"]}\n]', "a JSON list", ""),
    "lists.json": (b'[["C4"], ["D4"]]', "a JSON list", ""),
    "object.json": (
        json.dumps(VOCAB, indent=0).encode(), "one JSON object over many lines", "line of its own"),
    "a.py": (b"{'tokens': ['C4']}\n", "a text", ""),
    "a.xml": (b'<?xml version="1.0"?><a/>', "XML or HTML", ""),
    "utf16": ('{"tokens": []}'.encode("utf-16"), "text in UTF-16", "UTF-8"),
    "latin": ("f\xfcr".encode("latin-1"), "not in UTF-8", "save it in UTF-8"),
    "a.npy": (of_numpy(np.save, np.eye(3)), "a NumPy array", "write_corpus"),
    "a.npz": (of_numpy(np.savez, np.eye(3)), "NumPy arrays", "write_corpus"),
    "a.zip": (archive("zip"), "a zip archive", "Unpack"),
    "a.xlsx": (archive("xlsx"), "an Excel file", "write_corpus"),
    "a.tar": (archive("tar"), "a tar archive", "Unpack"),
    "a.tgz": (gzip.compress(archive("tar")), "a tar archive, compressed with gzip", "Unpack"),
    "a.xz": (lzma.compress(b"{}"), "compressed, but not with gzip", "Unpack"),
    "a.bz2": (bz2.compress(b"{}"), "compressed, but not with gzip", "Unpack"),
    "a.feather": (of_arrow(pa.ipc.new_file), "an Arrow or Feather file", "Parquet"),
    "a.arrow": (of_arrow(pa.ipc.new_stream), "an Arrow or Feather file", "Parquet"),
    "a.mid": (b"MThd\0\0\0\6", "a MIDI file", "MidiTok"),
    "a.pkl": (pickle.dumps([NOTES]), "serialized Python objects", "write_corpus"),
    "twice": (gzip.compress(gzip.compress(b"{}")), "a gzip file, compressed with gzip", "Unpack"),
}
READ = {
    "one line": b'{"tokens": ["C4"]}',
    "a bad line first": b'oops, no\n{"tokens": ["C4"]}',
    "a bad list first": b'["C4", "D4"]\n{"tokens": ["C4"]}',
    "a header first": b'# mine\n\n {"text": "C4"}',
    "long": b'{"tokens": ["C4"' + b', "C4"'*9999 + b"]}",
    "a mark": b'\xef\xbb\xbf{"text": "C4"}',
    "half": b'{"tokens": ["C4"',
    "a brace": b"{",
}


@pytest.mark.parametrize("name", OTHER)
def test_a_file_in_another_form_is_named_as_what_it_is(name, tmp_path, monkeypatch):
    "Before the vocabulary is missed, and by its first bytes alone; also the largest in a folder without data."
    content, what, remedy = OTHER[name]
    (tmp_path/name).write_bytes(content)
    monkeypatch.setattr("seqgpt.sources.read_span", None)
    for path, start in ((tmp_path/name, f"{name}: is "), (tmp_path, f"{name} is ")):
        said = f"{re.escape(start)}.*{re.escape(what)}.*{remedy}"
        with pytest.raises(InputError, match=said): find_vocab(path)


@pytest.mark.parametrize("name", READ)
def test_a_file_with_an_object_on_some_line_is_read(name, tmp_path):
    for file, content in {"a": READ[name], "b": gzip.compress(READ[name])}.items():
        (tmp_path/file).write_bytes(content)
        assert corpus_files(tmp_path/file) == [tmp_path/file]


# --- what users of Python have

V = {s: i for i, s in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *"012"])}
ROWS = [[0, 1, 2], [2, 2, 1]]
SEQUENCES = { # the same
    "pandas": [pd.array(q, dtype="Int64") for q in ROWS],
    "pandas text": [pd.array([*map(str, q)], dtype="string") for q in ROWS],
    "lists": ROWS,
    "tuples": tuple(map(tuple, ROWS)),
    "text": ["012", "221"],
    "arrays": np.array(ROWS),
    "small numbers": [np.array(q, np.uint8) for q in ROWS],
    "numbers": [[np.int64(k) for k in q] for q in ROWS],
    "array of objects": np.array([*map(str, range(3)), *"221"], object).reshape(2, 3),
    "tensor": torch.tensor(ROWS),
    "tensors": [torch.tensor(q, dtype=torch.int16) for q in ROWS],
    "single tensors": [[torch.tensor(k) for k in q] for q in ROWS],
    "column": pd.Series(ROWS, index=[7, 3]),
    "columns": [pd.Series(q, index=[9, 8, 7]) for q in ROWS],
    "column of text": pd.Series(["012", "221"], dtype="string"),
    "categories": [pd.Categorical(q) for q in ROWS],
    "whole numbers of pandas": [pd.Series(q, dtype="Int64") for q in ROWS],
    "Arrow": pa.array(ROWS),
    "generator": (iter(q) for q in ROWS),
}
NAMED = { # labels, and what is written
    "numbers": (np.array([3, 0]), [3, 0]),
    "whole floats": (np.array([3.0, 0.0]), [3, 0]),
    "names": (np.array(["up", "down"]), ["up", "down"]),
    "truths": (np.array([True, False]), ["true", "false"]),
    "tensor": (torch.tensor([3, -1]), [3, -1]),
    "a list": (["3", 4], ["3", 4]),
    "a column with a gap": (pd.Series([3, None], index=[5, 4]), [3, None]),
    "of pandas": (pd.Series([3, None], dtype="Int64"), [3, None]),
    "categories": (pd.Series(["up", None], dtype="category"), ["up", None]),
    "Arrow": (pa.array([3, None]), [3, None]),
    "generator": (iter("ab"), ["a", "b"]),
}


def written(folder): return [json.loads(line) for line in open(folder/"sequences.jsonl")]


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_of_every_library_are_the_same_corpus(name, tmp_path):
    folder = write_corpus(tmp_path/"c", SEQUENCES[name])
    assert written(folder) == [{"tokens": [*map(str, row)]} for row in ROWS]
    assert json.loads((folder/"vocab.json").read_text()) == V


@pytest.mark.parametrize("name", NAMED)
def test_labels_of_every_library(name, tmp_path):
    labels, want = NAMED[name]
    found = [row.get("label") for row in written(write_corpus(tmp_path/"c", ROWS, labels))]
    assert found == want and [*map(type, found)] == [*map(type, want)]


def test_missing_values_that_have_become_text(tmp_path):
    with pytest.warns(UserWarning, match="Are these missing values that have become text. 'nan'"):
        write_corpus(tmp_path/"c", np.array([["a", float("nan")], ["b", "a"]]))


MISSING = [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), pd.NaT, pd.NA, np.ma.masked]


@pytest.mark.parametrize("missing", MISSING, ids=repr)
def test_what_is_missing_is_no_symbol(missing, tmp_path):
    with pytest.raises(InputError, match=r"^Sequence 2, symbol 3 is missing \("):
        write_corpus(tmp_path/"c", [["a", "b"], ["a", "b", missing]])
    with pytest.raises(InputError, match=r"^Sequence 2 is missing \("):
        write_corpus(tmp_path/"c", [["a"], missing])
    with pytest.raises(InputError, match=r"^Sequence 1, symbol 2 is missing"):
        write_corpus(tmp_path/"d", [["a", missing]], vocab=V)
    assert not (tmp_path/"d").exists()
    assert not (tmp_path/"c").exists()
    folder = write_corpus(tmp_path/"c", ["a", "b"], [missing, 1]) # but a label may be missing
    assert written(folder) == [{"tokens": ["a"]}, {"tokens": ["b"], "label": 1}]


@pytest.mark.parametrize("rows, words", [
    (pd.DataFrame({"tokens": ROWS}), "given as a table"),
    ({"tokens": ROWS}, "given as dict"),
    ("dna.fasta", "given as one text"),
    (7, "given as int"),
    (np.arange(3), "Sequence 1 is of the type int64"),
    (torch.arange(3), "Sequence 1 is of the type int"),
    (["A C"], "Sequence 1 is a text with white space"),
    ([{"a", "b"}], "Sequence 1 is of the type set"),
    ([{"tokens": ROWS}], "Sequence 1 is of the type dict"),
    ([b"ACGT"], "Sequence 1 is of the type bytes"),
    ([["a"], [["a"]]], "Sequence 2, symbol 1 is of the type list"),
    ([[torch.tensor([1])]], "symbol 1 is of the type list"),
    (pd.Series(ROWS).groupby([0, 1]), "symbol 2 is of the type Series"),
])
def test_what_is_no_sequence(rows, words, tmp_path):
    with pytest.raises(InputError, match=words): write_corpus(tmp_path/"c", rows)
    assert not (tmp_path/"c").exists()


@pytest.mark.parametrize("labels, words", [
    ([1, 0.5], r"Label 2 cannot be used: .*\(0.5\)"),
    ([1, [2]], "Label 2 cannot"),
    (pd.DataFrame({"label": [1, 2]}), "given as a table"),
    (3, "given as int"),
    ({"a": 1}, "given as dict"),
])
def test_what_is_no_label(labels, words, tmp_path):
    with pytest.raises(InputError, match=words): write_corpus(tmp_path/"c", ROWS, labels)
    assert not (tmp_path/"c/sequences.jsonl").exists()


def test_floats_as_symbols_get_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"^Of 6 symbols 4 are floats, such as 0\.5: 3 different values"):
        write_corpus(tmp_path/"c", [[0.5, 1, 2.5], np.array([0.5, 1.5]), "a"])


def test_a_vocabulary_may_be_a_file_and_must_hold_all_symbols(tmp_path):
    (tmp_path/"vocab.json").write_text(json.dumps(V))
    folder = write_corpus(tmp_path/"c", ROWS, vocab=tmp_path/"vocab.json")
    assert json.loads((folder/"vocab.json").read_text()) == V
    with pytest.raises(InputError, match="^Sequence 2: '7' is not in the vocabulary"):
        write_corpus(tmp_path/"d", [[0], [7]], vocab=V)
    with pytest.raises(InputError, match="given as list"): write_corpus(tmp_path/"d", ROWS, vocab=[*V])


def test_paths_begin_at_home_and_settings_may_be_of_numpy(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_corpus("~/c", ROWS, [0, 1])
    assert {p.name for p in (tmp_path/"c").iterdir()} == {"sequences.jsonl", "vocab.json"}
    assert find_vocab("~/c") == tmp_path/"c/vocab.json"
    numpy_ids = make_tokenizer({s: np.int64(i) for s, i in V.items()})
    corpus = read_corpus("~/c", numpy_ids, np.int64(4), classes=np.array([0, 1]), cache_dir="~/cache")
    same = read_corpus(tmp_path/"c", make_tokenizer(V), 4, classes=["0", "1"], cache_dir="~/cache")
    assert (tmp_path/"cache").is_dir() and corpus.report["max_length"] == 4
    assert corpus.report["fingerprint"] == same.report["fingerprint"]
    with pytest.raises(InputError, match="max_length is 4.5. It must be a whole number"):
        read_corpus("~/c", make_tokenizer(V), 4.5)
    with pytest.raises(InputError, match="given as list"): read_corpus(["~/c"], make_tokenizer(V))


def test_sizes_of_numpy_make_the_same_corpora(tmp_path):
    sizes = dict(symbols=6, branching=2, classes=2, min_length=3, max_length=7, seed=1)
    for name, number in {"python": int, "numpy": np.int64, "floats": float}.items():
        markov = make_markov(**{setting: number(value) for setting, value in sizes.items()})
        write_markov(tmp_path/name/"markov", markov, number(9), 2)
        write_digits(tmp_path/name/"digits", number(4), number(2))
    def files(name):
        folder = tmp_path/name
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json*")}
    assert files("python") == files("numpy") == files("floats") and len(files("python")) == 5
    with pytest.raises(InputError, match="image_size is '8'. It must be a whole number"):
        write_digits(tmp_path/"d", "8")
    with pytest.raises(InputError, match="symbols is 2.5. It must be a whole number"): make_markov(symbols=2.5)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor], ids=lambda make: make.__name__)
def test_arrays_are_framed_as_lists_are(make):
    framed = [frame(make(ids), 1, 2) for ids in ([4, 5], [1, 4], [4, 2], [1, 2])]
    assert framed == [[1, 4, 5, 2], [1, 4, 2], [1, 4, 2], [1, 2]]


# --- the split of a classifier

@pytest.mark.parametrize("by", ["sample", "content"])
def test_each_class_has_a_sequence_to_train_on(by, encode, tmp_path):
    rows = [{"tokens": NOTES[k % 5:] + NOTES[:k % 4], "label": "common"} for k in range(30)]
    rows[4:7] = [{"tokens": [NOTES[k], NOTES[0]], "label": f"single {k}"} for k in range(3)]
    rows[20:22] = [{"tokens": NOTES*3, "label": "the same twice"}]*2
    dataset = encode(write_lines(tmp_path, rows), classes=[]).dataset
    given_back = 0
    for seed in range(12):
        before = train_validation_split(dataset, 0.3, seed, by)
        split = train_validation_split(dataset, 0.3, seed, by, each_label=True)
        assert set(split.train["label"]) == set(dataset["label"])
        assert sorted([*split.train_index, *split.validation_index]) == list(range(30))
        moved = {*before.validation_index} - {*split.validation_index}
        given_back += len(moved)
        assert {*split.validation_index} <= {*before.validation_index} and moved.isdisjoint(before.train_index)
        for k in moved: assert dataset[int(k)]["label"] not in before.train["label"]
        if by == "content": assert split.shared == 0
        assert split.shared == given_split(split.train, split.validation).shared
    assert given_back > 5


def test_a_run_that_classifies_is_split_so(tmp_path):
    rows = [{"tokens": NOTES[k % 5:] + NOTES[:k % 4], "label": "common"} for k in range(20)]
    rows[7]["label"] = "single"
    path = write_lines(tmp_path, rows)
    def is_held_out(task, seed):
        config = Config(str(path), task=task, seed=seed, validation_fraction=0.4, cache_dir=str(tmp_path/"cache"))
        return "single" in load_data(config, load_vocab(config))[1].validation["label"][:]
    seeds = [seed for seed in range(8) if is_held_out("clm", seed)]
    assert seeds and not any(is_held_out("classification", seed) for seed in seeds)


def test_classes_of_one_sequence_each_leave_none_to_validate_on(encode, tmp_path):
    dataset = encode(write_lines(tmp_path, [{"tokens": [n], "label": n} for n in NOTES]), classes=[]).dataset
    assert len(train_validation_split(dataset).validation) == 1
    with pytest.raises(InputError, match="5 sequences with 5 labels leave none to validate on"):
        train_validation_split(dataset, each_label=True)


@pytest.fixture
def drawn():
    "What `plot_batch` draws: names of the rows, texts and colours of their cells, ends of the arrows."
    def look(batch):
        ax = plot_batch(batch, make_tokenizer(VOCAB)).axes[0]
        rows = [t.get_text() for t in ax.get_yticklabels()]
        texts = [t.get_text() for t in ax.texts if t.get_text()]
        colours = [[to_hex(c) for c in row.get_array()[0]] for row in ax.collections]
        arrows = [(t.xyann, t.xy) for t in ax.texts if not t.get_text()]
        return rows, texts, colours, arrows
    yield look
    plt.close("all")


def test_picture_of_a_batch(drawn):
    batch = collate([{"input_ids": [1, 4, 5, 6, 2]}, {"input_ids": [1, 4, 6, 8, 6, 4, 2]}], 0)
    rows, texts, colours, arrows = drawn(batch)
    assert rows == ["input_ids", "labels", "attention_mask"]*2
    first = ["<bos>", "C4", "D4", "E4", "<eos>"]
    assert texts[:21] == [*first, "<pad>", "<pad>", *first, "-100", "-100", *"1111100"]
    for k, row in enumerate(colours):
        padded = (batch["attention_mask"][k//3] == 0).tolist()
        assert [c == CELL_COLOURS["pad_token"] for c in row] == padded, k
    assert colours[0][0] == colours[1][0] == CELL_COLOURS["bos_token"]
    assert colours[3][6] == colours[4][6] == CELL_COLOURS["eos_token"]
    assert len({*colours[0][:5]}) == 5 and colours[0][1] == colours[1][1] # a colour for each symbol
    middles = [(t + 0.5, t + 1.5) for n in (5, 7) for t in range(n - 1)]
    assert [(x0, x1) for (x0, _), (x1, _) in arrows] == middles
    assert all(y1 > y0 for (_, y0), (_, y1) in arrows) # from the inputs down to the labels


def test_picture_of_other_batches(drawn):
    unpadded = [{"input_ids": [1, 4, 2], "label": "x"}]
    assert drawn(collate(unpadded, 0))[0] == ["input_ids", "labels"]
    labelled = collate([*unpadded, {"input_ids": [1, 2], "label": "w"}], 0, {"w": 0, "x": 1})
    rows, texts, _, arrows = drawn(labelled)
    assert rows == ["input_ids (label 1)", "attention_mask", "input_ids (label 0)", "attention_mask"]
    assert not arrows
    long = torch.full((2, 300), 4)
    rows, texts, colours, arrows = drawn({"input_ids": long, "labels": long})
    assert len(rows) == 4 and len(colours[0]) == 300 and not texts and not arrows # no room


def test_a_column_of_selected_rows_has_their_values():
    "`column` reads `Dataset._indices`, the only private part of datasets: its name or its form has changed."
    dataset = Dataset.from_dict({"length": range(100, 110)})
    for rows in ([7, 2, 2], [*range(3, 6)], []):
        some = dataset.select(rows)
        assert column(some, "length").tolist() == some["length"][:]
        assert column(some.select(range(0, len(some), 2)), "length").tolist() == some["length"][::2]
