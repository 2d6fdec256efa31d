"""tools/score.py against transformers, one pair at a time; killed, doubled, and with another teacher."""
import argparse
import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from conftest import read_jsonl, run
from data import TrainingRows, locked
from tools import score

QUERIES = {f"q{i}": f"query {i}" for i in range(5)}


def tsv(path, rows):
    path.write_text("".join(f"{docid}\t{text}\n" for docid, text in rows))
    return path


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("cross")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "query", "passage", *map(str, range(50)), "hi", "yes", "no"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    # Two threads would wait for each other over matrices this small.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=1, initializer_range=0.5, max_position_embeddings=64)
    ).save_pretrained(folder)
    return folder


def one_at_a_time(folder, pairs):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (AutoModelForSequenceClassification.from_pretrained(folder).eval(),
                        AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        return [model(**tokenizer(query, text, return_tensors="pt")).logits.item() for query, text in pairs]


@pytest.fixture(scope="module")
def four_hundred(tmp_path_factory, cross_encoder):
    """(arguments, texts, rows); passages of many lengths, as the batches are sorted by length."""
    folder, rng = tmp_path_factory.mktemp("four_hundred"), np.random.default_rng(0)
    texts = {f"p{i}": f"passage {i}" + " yes" * (i * 7 % 20) for i in range(50)}
    records = [{"qid": f"q{i % 5}", "pos": [f"p{i % 50}"],
                "neg": [f"p{j}" for j in rng.choice(50, 8, replace=False) if j != i % 50]}
               for i in range(400)]
    tsv(folder / "collection.tsv", texts.items())
    tsv(folder / "queries.tsv", QUERIES.items())
    args = dict(teacher=str(cross_encoder), teacher_kind="cross-encoder", corpus=folder,
                train=jsonl(folder / "t.jsonl", records), queries=folder / "queries.tsv", negatives=None,
                scale=2.0, seed=0, max_length=64, tokens_per_batch=512, device="cpu", dtype="float32")
    score.score(argparse.Namespace(**args, out=folder / "whole.jsonl"))
    return args, texts, records


def test_score_equals_one_pair_at_a_time(cross_encoder, four_hundred):
    args, texts, records = four_hundred
    scored = read_jsonl(args["corpus"] / "whole.jsonl")
    assert ([(r["qid"], r["pos"], r["neg"]) for r in scored]
            == [(r["qid"], r["pos"], r["neg"]) for r in records])
    for r in scored[:2] + scored[-2:]:
        pairs = [(r["query"], texts[docid]) for docid in [*r["pos"], *r["neg"]]]
        want = [2 * value for value in one_at_a_time(cross_encoder, pairs)]
        assert [*r["pos_scores"], *r["neg_scores"]] == pytest.approx(want, abs=1e-4)
    rows = TrainingRows(args["corpus"] / "whole.jsonl", args["corpus"], need_scores=True)
    assert rows.example(0, 4, np.random.default_rng(0)).scores


def test_score_goes_on_where_it_was_killed(tmp_path, four_hundred):
    """Killed in the second chunk, started again: the file is that of an uninterrupted run, byte for byte."""
    calls, make = [], score.CrossEncoder

    def mortal(args):
        scores = make(args)

        def call(pairs):
            calls.append(len(pairs))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return scores(pairs)
        return call
    args = argparse.Namespace(**four_hundred[0], out=tmp_path / "torn.jsonl")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(score.TEACHERS, "cross-encoder", mortal)
        score.score(args)
    left, = tmp_path.glob("torn.jsonl.*.partial")
    assert not args.out.exists() and len(read_jsonl(left)) > 100
    # The line that a kill cuts.
    with open(left, "ab") as file:
        file.write(b'{"qid": "q1", "ques')
    score.score(args)
    assert args.out.read_bytes() == (args.corpus / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_score_with_a_retriever_and_inline_texts(tmp_path, tiny_model):
    from model import Retriever
    teacher = Retriever.load(tiny_model, head="dense")
    teacher.save(tmp_path / "teacher")
    jsonl(tmp_path / "t.jsonl",
          [{"query": "the cat", "pos": ["cat sat on the mat", "x"], "neg": ["a dog", "numbers", "a dog"],
            "inline": True}])
    run("-m", "tools.score", "--teacher", tmp_path / "teacher", "--teacher_kind", "retriever",
        "--train", tmp_path / "t.jsonl", "--out", tmp_path / "s.jsonl")
    row, = read_jsonl(tmp_path / "s.jsonl")
    q, d = teacher.encode([row["query"]], "query"), teacher.encode(row["pos"] + row["neg"], "passage")
    assert row["pos"] == ["cat sat on the mat", "x"] and row["neg"] == ["a dog", "numbers"]
    assert [*row["pos_scores"], *row["neg_scores"]] == pytest.approx((q @ d.T)[0].tolist(), abs=1e-4)


def flags(folder, teacher, **more):
    """Fifty rows of ten pairs each, as arguments."""
    tsv(folder / "collection.tsv", [(f"p{i}", f"passage {i}") for i in range(50)])
    jsonl(folder / "t.jsonl", [
        {"query": f"query {i}", "pos": [f"p{i}"],
         "neg": [f"p{(i + j) % 50}" for j in range(1, 10)]} for i in range(50)])
    return argparse.Namespace(**dict(
        teacher=str(teacher), teacher_kind="cross-encoder", train=folder / "t.jsonl",
        corpus=folder / "collection.tsv", queries=None, negatives=None, scale=1.0, seed=0, max_length=64,
        tokens_per_batch=512, device="cpu", dtype="float32", out=folder / "out.jsonl") | more)


def test_two_processes_do_not_score_into_one_file(tmp_path, cross_encoder):
    args = flags(tmp_path, cross_encoder)
    with (locked(args.out),
          pytest.raises(ValueError, match=f"out.jsonl: process {os.getpid()} is writing there")):
        score.score(args)
    assert not args.out.exists()
    # Two at the same moment: one writes, the other says why not.
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=score.score, args=(args,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert 0 in [process.exitcode for process in both]
    assert [row["pos"] for row in read_jsonl(args.out)] == [[f"p{i}"] for i in range(50)]


def test_a_retrained_teacher_begins_anew(tmp_path, cross_encoder, monkeypatch):
    """Killed after the first chunk, and then the teacher's folder gets other weights under the same name: no
    row may stay."""
    import torch
    from transformers import AutoModelForSequenceClassification

    teacher = tmp_path / "teacher"
    shutil.copytree(cross_encoder, teacher)
    args = flags(tmp_path, teacher)
    monkeypatch.setattr(score, "CHUNK", 100)

    class Mortal(score.CrossEncoder):
        calls = 0

        def __call__(self, pairs):
            Mortal.calls += 1
            if Mortal.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(pairs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(score.TEACHERS, "cross-encoder", Mortal)
        score.score(args)
    left, = tmp_path.glob("out.jsonl.*.partial")
    assert len(read_jsonl(left)) == 20
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(teacher)
    score.score(args)
    score.score(flags(tmp_path, teacher, out=tmp_path / "fresh.jsonl"))
    assert args.out.read_bytes() == (tmp_path / "fresh.jsonl").read_bytes()


@pytest.mark.parametrize("flag", ["--scale=nan", "--scale=-1", "--negatives=0", "--max_length=0",
                                  "--tokens_per_batch=-1", "--see=1"])
def test_numbers_out_of_range_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        score.main(["--teacher", "t", "--train", "t.jsonl", "--out", "o", flag])
    assert "expected a" in (said := capsys.readouterr().err) or "unrecognized" in said
