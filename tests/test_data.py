"Every form of data, and every kind of bad line, all at once; one by one they are in test_bad_input.py."
import gzip
import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import TINY, VOCAB, refused, seqgpt, write_lines
from matplotlib.colors import to_hex
from seqgpt.data import CELL_COLOURS, collate, corpus_files, plot_batch, read_corpus, stream_corpus, write_corpus
from seqgpt.tokenizer import InputError, make_tokenizer

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
    plain, want = "\n".join(lines).encode(), [[1, *(VOCAB[s] for s in t), 2] for t, _ in melodies]
    (tmp_path/"shards").mkdir()
    (tmp_path/"shards/a.jsonl").write_bytes("\n".join(lines[:50]).encode())
    (tmp_path/"shards/b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[50:]).encode()))
    for name, content in {"crlf": plain.replace(b"\n", b"\r\n"), "bom": b"\xef\xbb\xbf" + plain, "zipped": gzip.compress(plain), "blank": b"\n\n" + plain + b"\n\n"}.items():
        (tmp_path/name).write_bytes(content)
        assert encode(tmp_path/name).dataset["input_ids"][:] == want, name
    assert encode(tmp_path/"shards").dataset["input_ids"][:] == want


@pytest.mark.parametrize("form", ["sequence", "text", "input_ids"])
def test_trains_on_each_form(form, melodies, tmp_path):
    write_lines(tmp_path, [FORMS[form](t, l) for t, l in melodies])
    result = seqgpt("train", "--data_path", "data.jsonl", "--max_steps", 3, "--max_length", 16, *TINY, cwd=tmp_path, bare=True)
    assert result.returncode == 0, result.stderr
    assert "200 sequences" in result.stdout and (tmp_path/"outputs/final_model/model.safetensors").exists()


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
    refused(result, f"{len(bad)} of {200 + len(bad)} lines", "--skip_bad_lines", *(f"{kind}: {len(lines)}, at line" for kind, lines in BAD.items()), "line 11 ")
    assert not (tmp_path/"outputs").exists()
    result = seqgpt("train", "--data_path", "data.jsonl", "--skip_bad_lines", "--max_steps", 2, "--max_length", 16, *TINY, cwd=tmp_path, bare=True)
    assert result.returncode == 0 and "200 sequences" in result.stdout and f"{len(bad)} bad lines left out" in result.stdout, result.stderr


def test_required_labels(melodies, encode, tmp_path):
    path = write_lines(tmp_path, [{"tokens": ["C4"], "label": 0}, {"tokens": ["C4"]}, {"tokens": ["C4"], "label": "two"}, {"tokens": ["C4"], "label": -1}, {"tokens": ["C4"], "label": ""}])
    with pytest.raises(ValueError, match=r"label missing: 2, at line 2, line 5; unknown label: 2, at line 3 \('two'\), line 4 \(-1\)"): encode(path, classes=["0", "1"])
    with pytest.raises(ValueError, match=r"label missing: 2, at line 2, line 5"): encode(path, classes=[])
    assert encode(path).dataset["label"][:] == ["0", None, "two", "-1", None]
    padded = write_lines(tmp_path/"padded", [{"tokens": ["C4"], "label": label} for label in (" two ", "  ", "t\nwo")])
    assert encode(padded, classes=[], skip_bad_lines=True).dataset["label"][:] == ["two"]


def test_a_label_is_a_name_however_it_is_written(encode, tmp_path):
    same = {"1": [1, 1.0, "1", " 1"], "true": [True, "true"], "-3": [-3, -3.0], "0.5": ["0.5"]}
    path = write_lines(tmp_path, [{"tokens": ["C4"], "label": label} for labels in same.values() for label in labels])
    assert encode(path, classes=[]).dataset["label"][:] == [name for name, labels in same.items() for _ in labels]
    frame = pd.DataFrame({"tokens": [["C4"], ["D4"], ["E4"]], "label": [1, None, 2]}) # pandas makes floats of it
    frame.to_parquet(tmp_path/"a.parquet")
    assert encode(tmp_path/"a.parquet").dataset["label"][:] == ["1", None, "2"]


def test_a_language_model_needs_no_labels_and_says_which_it_ignores(encode, tmp_path):
    labels = [0.5, [1], {"up": 1}, "a\0b", "x"*2000, float("inf"), "up", None, float("nan")]
    path = write_lines(tmp_path, [{"tokens": ["C4"], "label": label} for label in labels])
    corpus = encode(path)
    assert corpus.dataset["label"][:] == [None]*6 + ["up", None, None] and corpus.report["labels_ignored"] == 6
    assert "Labels that are ignored, as neither whole numbers nor names: 6" in str(corpus)
    with pytest.raises(InputError, match="label is not a whole number or a name: 5, .*label missing: 2, .*label longer"): encode(path, classes=[])


def test_whole_floats_are_ids(encode, tmp_path):
    assert encode(write_lines(tmp_path, [{"input_ids": [4.0, 5, 8.0]}])).dataset["input_ids"][:] == [[1, 4, 5, 8, 2]]


def test_words_of_letters_that_are_symbols(tmp_path):
    "To leave such lines out would keep the sequences of one letter."
    write_corpus(tmp_path/"dna", ["GATTACA", "ACGT"])
    read = lambda *rows: read_corpus(write_lines(tmp_path/"c", rows), make_tokenizer(tmp_path/"dna/vocab.json"), cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"no spaces between symbols: 2, at line 1 \('GATTACA'\), line 2 \('TA'\)\.\nPut spaces between") as e:
        read({"text": "GATTACA"}, {"tokens": ["TA"]}, {"text": "A"})
    assert "--skip_bad_lines" not in str(e.value)
    with pytest.raises(InputError, match="unknown token: 1, at line 1 \\('GATX'\\)"): read({"text": "GATX"}, {"text": "A"}, {"text": "A C"})


@pytest.mark.parametrize("rows, words", [
    ([{"token": ["C4"]}]*9, ["but 'token')", 'Each line is an object such as {"tokens": ["a", "b"], "label": "name"}.']), ([{"tokens": ["H4"]}]*9, ["unknown token", "Mend them."]),
    ([{"tokens": ["C4"], "labels": 1}]*9, ["label missing", "'labels'", '"label": "name"}.']), ([{"tokens": "C4"}]*9, ['"tokens" is str, not a list']),
])
def test_where_most_lines_are_bad_they_are_not_to_be_skipped(rows, words, encode, tmp_path):
    with pytest.raises(InputError) as e: encode(write_lines(tmp_path, [*rows, *[{"tokens": ["C4"], "label": 0}]*5]), classes=[])
    for word in words: assert word in str(e.value)
    assert "--skip_bad_lines" not in str(e.value)


def test_names_that_begin_with_a_dot_are_not_data(melodies, encode, tmp_path):
    for name in ("a.jsonl", "._a.jsonl", ".copy.jsonl"): write_lines(tmp_path/"c", [{"tokens": t} for t, _ in melodies]).rename(tmp_path/"c"/name)
    assert len(encode(tmp_path/"c").dataset) == len(melodies) == len(encode(tmp_path/"c/.copy.jsonl").dataset) # unless one is named
    (tmp_path/"c/a.jsonl").unlink()
    with pytest.raises(InputError, match="no file in this folder is called"): corpus_files(tmp_path/"c")


@pytest.mark.parametrize("long, said", [("truncate", "tokens cut off"), ("split", "split into"), ("error", "longer than max_length")])
def test_long_sequences_are_always_said(long, said, melodies, tmp_path):
    write_lines(tmp_path, [{"tokens": t} for t, _ in melodies])
    result = seqgpt("train", "--data_path", "data.jsonl", "--max_length", 8, "--long", long, "--max_steps", 2, *TINY, cwd=tmp_path, bare=True)
    if long == "error": refused(result, said)
    else: assert result.returncode == 0 and said in result.stdout, result.stderr


def test_without_a_length_nothing_is_cut(encode, tmp_path):
    "However long the data is; only a model has a length, and `read_corpus` is told it."
    path = write_lines(tmp_path, [{"tokens": ["C4"]*n} for n in (3, 1100, 70_000)])
    corpus, (stream, _) = encode(path), stream_corpus(path, make_tokenizer(VOCAB), fraction=0)
    assert [n - 2 for n in corpus.dataset["length"]] == [3, 1100, 70_000] == [n - 2 for n in stream.dataset.first(3)["length"]]
    assert corpus.report["tokens_lost"] == corpus.report["long_sequences"] == 0 and "cut off" not in str(corpus)


def test_split_keeps_every_token(melodies, encode, tmp_path):
    path = write_lines(tmp_path, [{"tokens": t} for t, _ in melodies])
    whole, pieces = encode(path).dataset, encode(path, max_length=5, long="split").dataset
    assert sum(len(i) - 1 for i in pieces["input_ids"]) == sum(len(i) - 1 for i in whole["input_ids"])
    assert max(map(len, pieces["input_ids"])) == 5


@pytest.fixture
def drawn():
    "What `plot_batch` draws: names of the rows, texts and colours of their cells, and the arrows (from where, to where)."
    def look(batch):
        ax = plot_batch(batch, make_tokenizer(VOCAB)).axes[0]
        arrows, texts = [t for t in ax.texts if not t.get_text()], [t.get_text() for t in ax.texts if t.get_text()]
        return [t.get_text() for t in ax.get_yticklabels()], texts, [[to_hex(c) for c in row.get_array()[0]] for row in ax.collections], [(a.xyann, a.xy) for a in arrows]
    yield look
    plt.close("all")


def test_picture_of_a_batch(drawn):
    batch = collate([{"input_ids": [1, 4, 5, 6, 2]}, {"input_ids": [1, 4, 6, 8, 6, 4, 2]}], 0)
    rows, texts, colours, arrows = drawn(batch)
    assert rows == ["input_ids", "labels", "attention_mask"]*2
    assert texts[:21] == ["<bos>", "C4", "D4", "E4", "<eos>", "<pad>", "<pad>", "<bos>", "C4", "D4", "E4", "<eos>", "-100", "-100", *"1111100"]
    for k, row in enumerate(colours): assert [c == CELL_COLOURS["pad_token"] for c in row] == (batch["attention_mask"][k//3] == 0).tolist(), k
    assert colours[0][0] == colours[1][0] == CELL_COLOURS["bos_token"] and colours[3][6] == colours[4][6] == CELL_COLOURS["eos_token"]
    assert len({*colours[0][:5]}) == 5 and colours[0][1] == colours[1][1] # a colour for each symbol
    middle = lambda t: t + 0.5
    assert [(x0, x1) for (x0, _), (x1, _) in arrows] == [(middle(t), middle(t + 1)) for n in (5, 7) for t in range(n - 1)]
    assert all(y1 > y0 for (_, y0), (_, y1) in arrows) # from the inputs down to the labels


def test_picture_of_other_batches(drawn):
    whole, classes = [{"input_ids": [1, 4, 2], "label": "x"}], {"w": 0, "x": 1}
    assert drawn(collate(whole, 0))[0] == ["input_ids", "labels"] # nothing is padded
    rows, texts, _, arrows = drawn(collate([*whole, {"input_ids": [1, 2], "label": "w"}], 0, classes))
    assert rows == ["input_ids (label 1)", "attention_mask", "input_ids (label 0)", "attention_mask"] and not arrows
    long = torch.full((2, 300), 4)
    rows, texts, colours, arrows = drawn({"input_ids": long, "labels": long})
    assert len(rows) == 4 and len(colours[0]) == 300 and not texts and not arrows # no room
