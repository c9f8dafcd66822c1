"""Training while the data is read: nothing is written but the run, and a bad line loses none of it. (That a resumed run
equals an uninterrupted one is tested in test_crashes.py.)"""
import json
import shutil
from functools import partial

import pytest
from conftest import NOTES, TINY, write_lines
from test_crashes import history, write_shards

from seqgpt.config import Config
from seqgpt.resolving import load_data, load_vocab

RUN = ["train", *TINY, "--data_path", "shards", "--cache_dir", "cache", "--streaming", "--max_length", 12,
       "--max_steps", 10, "--eval_steps", 4, "--logging_steps", 3, "--validation_fraction", 0.3, "--batch_size", 4,
       "--gradient_accumulation_steps", 2]


@pytest.fixture(scope="module")
def place(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    write_shards(folder)
    ask = partial(forks, cwd=folder, bare=True)
    shown, = ask(*RUN, "--output_dir", "shown", bare=False)
    assert shown["code"] == 0 and "Compared with the first" in shown["out"], shown
    return folder, ask


@pytest.fixture
def fresh(place):
    shutil.rmtree(place[0]/"outputs", ignore_errors=True)
    return place


def test_another_division_goes_on_with_other_shares(fresh):
    folder, ask = fresh
    run = [*RUN, "--gradient_accumulation_steps", 1]
    assert [a["code"] for a in ask(*run, "--max_steps", 4, processes=2)] == [0, 0]
    alone, = ask(*run, "--max_steps", 6, "--resume")
    assert alone["code"] == 0 and "Each step will see 8 sequences" in alone["out"], alone
    assert history(folder/"outputs")[-1]["step"] == 6, alone


def test_no_copy_is_written(fresh):
    folder, ask = fresh
    shutil.rmtree(folder/"cache", ignore_errors=True)
    said = ask(*RUN)[0]["out"]
    assert "A stream of 3 files" in said and not list((folder).glob("cache/*.arrow"))
    split = json.loads((folder/"outputs/split.json").read_text())
    assert split.keys() == {"fingerprint", "vocabulary", "processes", "split", "validation_fraction", "seed"}


def test_sequences_to_validate_on_of_their_own(fresh):
    folder, ask = fresh
    write_lines(folder, [{"tokens": list(NOTES)}]*7)
    said, = ask(*RUN, "--validation_path", "data.jsonl")
    assert said["code"] == 0 and "7 sequences to validate" in said["out"], said
    metrics = json.loads((folder/"shown/best_model/evaluation/metrics.json").read_text())
    assert metrics["sequences"] > 7 # of the run above, with those set aside


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_line_in_the_middle(fresh, processes):
    folder, ask = fresh
    shutil.copytree(folder/"shards", folder/"bad", dirs_exist_ok=True)
    lines = (folder/"bad/1.jsonl").read_text().splitlines()
    lines[20:21] = ["{"]
    (folder/"bad/1.jsonl").write_text("\n".join(lines) + "\n")
    run = [*RUN, "--data_path", "bad"]
    job = {"processes": processes} if processes > 1 else {}
    refused = ask(*run, "--validation_path", "shards/0.jsonl", **job)
    assert any("1.jsonl, line 21" in a["err"] and a["code"] in (1, 2) for a in refused), refused
    went_on = ask(*run, "--validation_path", "shards/0.jsonl", "--skip_bad_lines", "--overwrite", **job)
    assert all(a["code"] == 0 for a in went_on), went_on
    assert sum("1.jsonl, line 21" in a["out"] for a in went_on) == 1, went_on


def test_the_data_of_a_stream_must_be_the_same(fresh):
    folder, ask = fresh
    shutil.copytree(folder/"shards", folder/"more", dirs_exist_ok=True)
    assert ask(*RUN, "--data_path", "more", step=3, signal=15)[0]["code"] == 130
    with open(folder/"more/2.jsonl", "a") as f: f.write(json.dumps({"tokens": list(NOTES)}) + "\n")
    refused, = ask(*RUN, "--data_path", "more", "--resume")
    assert refused["code"] == 2 and "the data" in refused["err"], refused


def test_a_bad_line_after_many_steps_loses_none_of_them(fresh):
    folder, ask = fresh
    shutil.copytree(folder/"shards", folder/"late", dirs_exist_ok=True)
    with open(folder/"late/2.jsonl", "a") as f:
        f.writelines(json.dumps({"tokens": [NOTES[k % 5]]*5}) + "\n" for k in range(1100))
        f.write("{\n")
    run = [*RUN, "--data_path", "late", "--validation_path", "shards/0.jsonl", "--batch_size", 2,
           "--max_steps", 280, "--eval_steps", 280] # 1000 lines are read at once
    refused, = ask(*run)
    assert refused["code"] == 2 and "2.jsonl, line 1131" in refused["err"], refused
    assert ("All is saved. Go on with: seqgpt train --config outputs/config.yaml --resume, "
            "and --skip_bad_lines") in refused["err"], refused
    went_on, = ask("train", "--config", "outputs/config.yaml", "--resume", "--skip_bad_lines")
    assert went_on["code"] == 0 and "Going on from" in went_on["out"], went_on
    assert "It is left out, with 0 others so far" in went_on["out"], went_on


def test_what_is_validated_on_is_not_trained_on(fresh):
    folder, ask = fresh
    write_lines(folder, [json.loads(line) for line in (folder/"shards/0.jsonl").read_text().splitlines()])
    config = Config(str(folder/"shards"), vocab_path=str(folder/"shards/vocab.json"), cache_dir=str(folder/"cache"),
                    validation_path=str(folder/"data.jsonl"), streaming=True, max_steps=1, max_length=12)
    _, split = load_data(config, load_vocab(config))
    validation = {tuple(ids) for ids in split.validation["input_ids"]}
    trained = {tuple(ids) for ids in split.train.first(1000)["input_ids"]}
    assert validation and trained and not validation & trained
