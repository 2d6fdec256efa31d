"""A teacher's scores for every pair of the training rows, for --objective kd and cl+kd.

    python -m tools.score --teacher cross-encoder/ms-marco-MiniLM-L-6-v2 --train train.jsonl \\
        --corpus collection.tsv --out scored.jsonl

The teacher is a cross-encoder of the hub, or a checkpoint of this project (--teacher_kind retriever). A row's
positives are all scored. A killed run, started again, goes on where it was, as long as the teacher and the
rows are the same."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (Help, Row, TrainingRows, digest, fingerprint, locked, natural, positive, positive_int,
                  run_command)
from model import HEADS, Retriever, longest_first

# Pairs scored at once: enough to sort by length, little enough to lose in a kill.
CHUNK = 1024


class CrossEncoder:
    """A Hugging Face model with one output, such as cross-encoder/ms-marco-MiniLM-L-6-v2."""

    def __init__(self, args):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.max_length, self.tokens_per_batch = args.max_length, args.tokens_per_batch
        self.tokenizer = AutoTokenizer.from_pretrained(args.teacher)
        model = AutoModelForSequenceClassification.from_pretrained(
            args.teacher, dtype=getattr(torch, args.dtype))
        self.model = model.to(args.device).eval()
        if model.config.num_labels != 1:
            raise ValueError(f"--teacher {args.teacher}: has {model.config.num_labels} outputs, "
                             "and a relevance score is one")
        # Decoders often lack a padding token, and find a row's last token by it.
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
            model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.inference_mode()
    def __call__(self, pairs: list[tuple[str, str]]) -> list[float]:
        queries, passages = map(list, zip(*pairs))
        tokens = self.tokenizer(queries, passages, truncation=True, max_length=self.max_length)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        scores = torch.empty(len(pairs))
        # Texts of like length together waste the least on padding; each score goes to its pair's place.
        for batch in longest_first(lengths, self.tokens_per_batch):
            batch = batch.tolist()
            inputs = self.tokenizer.pad({key: [values[k] for k in batch] for key, values in tokens.items()},
                                        return_tensors="pt").to(self.model.device)
            scores[batch] = self.model(**inputs).logits[:, 0].float().cpu()
        return scores.tolist()


class DotProducts:
    """A checkpoint of this project; every text is encoded once a chunk."""

    def __init__(self, args):
        self.model = Retriever.load(args.teacher, head=args.head, base=args.base,
                                    dtype=getattr(torch, args.dtype), device=args.device)
        self.tokens_per_batch = args.tokens_per_batch

    def encoded(self, texts: list[str], kind: str) -> tuple:
        # A query stands in as many pairs as it has passages.
        unique = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        reps = self.model.encode(list(unique), kind, tokens_per_batch=self.tokens_per_batch)
        return reps.to_dense(), [unique[text] for text in texts]

    def __call__(self, pairs: list[tuple[str, str]]) -> list[float]:
        queries, passages = zip(*pairs)
        q, q_rows = self.encoded(queries, "query")
        d, d_rows = self.encoded(passages, "passage")
        # Pair by pair: all at once would copy a vector as wide as the vocabulary for every pair.
        return [float(q[i] @ d[j]) for i, j in zip(q_rows, d_rows)]


TEACHERS = {"cross-encoder": CrossEncoder, "retriever": DotProducts}


def scored_row(row: Row, passages: list, scores: list[float]) -> dict:
    """The row with its teacher's scores; `passages` are ids or texts, as it has them, positives first."""
    n = len(row.pos)
    scored = {"qid": row.qid, "query": row.query, "pos": passages[:n], "neg": passages[n:],
              "pos_scores": scores[:n], "neg_scores": scores[n:]}
    return scored | {"inline": True} if row.inline else scored


def score(args) -> int:
    """Write the scored rows to --out, and return how many there are."""
    if Path(args.out).is_dir():
        raise ValueError(f"{args.out}: is a folder; --out is a file to write")
    rows = TrainingRows(args.train, args.corpus, args.queries)
    # All that the scores depend on is part of the name: what another teacher began is never gone on with.
    made_from = (args.teacher, fingerprint(args.teacher), args.teacher_kind, args.max_length, args.dtype,
                 args.negatives, args.scale, args.seed, rows.store.made_from)
    aside = Path(f"{args.out}.{digest(*map(str, made_from))}.partial")
    with locked(args.out), open(aside, "a+b") as out:
        # A killed run has left its lines. The last may be cut, and is scored again.
        out.seek(0)
        whole = out.read()
        done = whole.count(b"\n")
        out.truncate(whole.rfind(b"\n") + 1)
        print(f"{args.train}: {rows.report}" + (f"; {done:,} of them scored before" if done else ""))
        teacher = TEACHERS[args.teacher_kind](args)

        # A chunk of rows is scored together. The draw depends on the row alone, and so not on where a killed
        # run stopped.
        chunk, waiting = [], 0
        for i in tqdm(range(done, len(rows)), desc="scoring", unit=" rows", initial=done, total=len(rows),
                      disable=None):
            row = rows[i]
            drawn = np.random.default_rng((args.seed, i)).permutation(len(row.neg))[:args.negatives]
            passages = row.pos + [row.neg[k] for k in sorted(drawn)]
            # Rows of the corpus, or texts.
            names = passages if row.inline else list(map(rows.corpus.docid, passages))
            chunk.append((row, names, passages if row.inline else rows.corpus.texts(passages)))
            waiting += len(passages)
            if waiting < CHUNK and i + 1 < len(rows):
                continue
            scores = iter(teacher([(row.query, text) for row, _, texts in chunk for text in texts]))
            for row, names, _ in chunk:
                # Scores come in the order of the pairs: each row takes as many as it has passages.
                own = [round(args.scale * next(scores), 5) for _ in names]
                out.write((json.dumps(scored_row(row, names, own), ensure_ascii=False) + "\n").encode())
            out.flush()
            chunk, waiting = [], 0
        # On the disk before it gets its name: a power cut must not leave the name without the lines.
        os.fsync(out.fileno())
        os.replace(aside, args.out)
    return len(rows)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.score", description=__doc__.split("\n")[0],
                                allow_abbrev=False, formatter_class=Help)
    p.add_argument("--teacher", required=True, help="model folder or hub name")
    p.add_argument("--teacher_kind", choices=TEACHERS, default="cross-encoder")
    p.add_argument("--head", choices=HEADS, help="of a retriever, if the checkpoint does not say")
    p.add_argument("--base", help="of a retriever's adapter, if it is not where adapter_config.json says")
    p.add_argument("--train", required=True, help="rows, of ids or of texts")
    p.add_argument("--corpus", help="for rows that hold ids; read once into a store beside it, or in the "
                   "folder $CORPUS_CACHE")
    p.add_argument("--queries", help="for rows that hold qids")
    p.add_argument("--out", required=True)
    p.add_argument("--negatives", type=positive_int,
                   help="score so many a row, drawn at random; all of them without it")
    p.add_argument("--scale", type=positive, default=1.0,
                   help="multiplies the scores: a softmax over them, later, is sharper with more")
    p.add_argument("--seed", type=natural, default=0)
    g = p.add_argument_group("machine")
    g.add_argument("--max_length", type=positive_int, default=512, help="tokens of a pair (cross-encoder)")
    g.add_argument("--tokens_per_batch", type=positive_int, default=16384,
                   help="halve it if you run out of memory")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
                   help="bfloat16 on a GPU")
    args = p.parse_args(argv)
    n = score(args)
    print(f"{args.out}: {n:,} rows with the scores of {args.teacher}")


if __name__ == "__main__":
    run_command("tools.score", main)
