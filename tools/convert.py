"""Other people's training rows in the one form that data.py reads; a row a line, in the order of the file.

    python -m tools.convert --format tevatron train.jsonl --out rows.jsonl
    python -m tools.convert --format scores cross-encoder-scores.pkl.gz --out scores.json.gz

What is written: {"qid", "query", "pos", "neg", "pos_scores", "neg_scores", "inline"}, without what the format
lacks. "inline": pos and neg are texts. Rows of ids need --corpus at training, and --queries if they lack the
text of the query. The formats are in the table FORMATS below, and in --help.
"""
import argparse
import gzip
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data import parse_json, parse_row, read_lines, run_command, write_whole


def row_of(qid, query, pos: list, neg: list, scores: list | None = None, inline: bool = False) -> dict:
    """A row in our form. It is checked as it is written, by the function that reads it in training."""
    row = {"qid": qid, "query": query, "pos": pos, "neg": neg}
    if scores is not None:
        # Of pos and then neg; between tabs they are words.
        scores = list(map(float, scores))
        row |= {"pos_scores": scores[:len(pos)], "neg_scores": scores[len(pos):]}
    return {key: value for key, value in row.items() if value is not None} | {"inline": inline}


def read_authors(line: str) -> dict:
    r = parse_json(line)
    scores = [r["pos_score"], *r["neg_scores"]] if "pos_score" in r else None
    return row_of(r.get("qid"), r.get("question", r.get("query")), [r["pos_pid"]], r["neg_pids"], scores)


def read_authors_kd(line: str) -> dict:
    r = parse_json(line)
    return row_of(r.get("qid"), r.get("query"), r["docids"][:1], r["docids"][1:], r.get("scores"))


def read_margin_mse(line: str) -> dict:
    pos_score, neg_score, qid, pos, neg = columns_of(line, 5)
    return row_of(qid, None, [pos], [neg], [pos_score, neg_score])


def read_tevatron(line: str) -> dict:
    r = parse_json(line)
    # A title stands before its text, as in a corpus.
    pos, neg = ([" ".join(filter(None, (passage.get("title"), passage["text"]))) for passage in r[side]]
                for side in ("positive_passages", "negative_passages"))
    return row_of(r.get("query_id"), r["query"], pos, neg, inline=True)


def read_tevatron_ids(line: str) -> dict:
    r = parse_json(line)
    pos, neg = r["positive_document_ids"], r["negative_document_ids"]
    return row_of(r["query_id"], r.get("query_text"), pos, neg)


def read_triplet(line: str) -> dict:
    r = parse_json(line)
    query = r.get("anchor", r.get("query"))
    numbered = sorted((key for key in r if key.startswith("negative_")), key=lambda key: int(key[9:]))
    neg = [r[key] for key in ("negative", *numbered) if key in r]
    # The same columns hold texts or, in the sets named `ids`, numbers.
    if isinstance(query, int):
        return row_of(query, None, [r["positive"]], neg)
    return row_of(None, query, [r["positive"]], neg, inline=True)


def read_hard_negatives(line: str) -> dict:
    r = parse_json(line)
    # What several systems found stands in the list of each, and is one negative.
    neg = dict.fromkeys(pid for found in r["neg"].values() for pid in found)
    return row_of(r["qid"], r.get("query"), r["pos"], list(neg))


def read_ce_scores(line: str) -> dict:
    r = parse_json(line)
    neg = {item["pid"]: item["ce-score"] for found in r["neg"].values() for item in found}
    pos = {item["pid"]: item["ce-score"] for item in r["pos"]}
    return row_of(r["qid"], r.get("query"), list(pos), list(neg), [*pos.values(), *neg.values()])


def read_nway(line: str) -> dict:
    row, scores = json.loads(line), None
    # An object or a string can be taken apart as well, into nonsense.
    if not isinstance(row, list):
        raise ValueError("is no list")
    qid, *pids = row
    if pids and isinstance(pids[0], list):
        pids, scores = map(list, zip(*pids))
    return row_of(qid, None, pids[:1], pids[1:], scores)


def read_id_triple(line: str) -> dict:
    # MS MARCO's own are between tabs, copies of them between blanks.
    qid, pos, neg = columns_of("\t".join(line.split()), 3)
    return row_of(qid, None, [pos], [neg])


def read_text_triple(line: str) -> dict:
    query, pos, neg = columns_of(line, 3)
    return row_of(None, query, [pos], [neg], inline=True)


def columns_of(line: str, n: int) -> list[str]:
    columns = line.split("\t")
    if len(columns) != n:
        raise ValueError(f"expected {n} columns between tabs, got {len(columns)}")
    return columns


class Format(NamedTuple):
    read: Callable[[str], dict]  # from a line to a row in our form
    looks_like: str


# Another format is a function and a row of this table.
FORMATS = {
    "authors": Format(read_authors, '{"question" or "qid", "pos_pid", "neg_pids": [...], "pos_score", '
                      '"neg_scores": [...]} (the paper\'s code)'),
    "authors-kd": Format(read_authors_kd, '{"query" or "qid", "docids": [the positive first, ...], "scores": '
                         '[...]} (the paper\'s code)'),
    "margin-mse": Format(read_margin_mse, "pos_score<TAB>neg_score<TAB>qid<TAB>pos_pid<TAB>neg_pid"),
    "tevatron": Format(read_tevatron, '{"query_id", "query", "positive_passages": [{"docid", "title", '
                       '"text"}], "negative_passages": [...]}'),
    "tevatron-ids": Format(read_tevatron_ids, '{"query_id", "query_text", "positive_document_ids": [...], '
                           '"negative_document_ids": [...]}'),
    "triplets": Format(read_triplet, '{"anchor" or "query", "positive", "negative" or "negative_1", '
                       '"negative_2", ...} (sentence-transformers)'),
    "hard-negatives": Format(read_hard_negatives, '{"qid", "pos": [pid], "neg": {"bm25": [pid], ...}} '
                             "(sentence-transformers)"),
    "ce-scores": Format(read_ce_scores, '{"qid", "pos": [{"pid", "ce-score"}], "neg": {"bm25": [{"pid", '
                        '"ce-score"}], ...}} (sentence-transformers)'),
    "nway": Format(read_nway, "[qid, [pid, score], [pid, score], ...], or [qid, pid, pid, ...]; the positive "
                   "first (ColBERT)"),
    "id-triples": Format(read_id_triple, "qid<TAB>pos_pid<TAB>neg_pid (MS MARCO's qidpidtriples)"),
    "text-triples": Format(read_text_triple, "query<TAB>positive<TAB>negative (MS MARCO's triples)"),
}
SCORES = "a pickle {qid: {pid: score}} (sentence-transformers), for --scores; it becomes JSON"


def convert_rows(path, out, form: Format) -> str:
    """Write every row of `path` that has a positive in our form; returns how many there were."""
    def convert(line: str) -> str | None:
        try:
            row = form.read(line)
            ours = json.dumps(row, ensure_ascii=False)
            parse_row(ours)
        except KeyError as e:
            raise ValueError(f"has no {e}; expected {form.looks_like}") from e
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{e}; expected {form.looks_like}") from e
        # sentence-transformers' hard negatives hold queries that nobody has judged, too.
        return ours if row["pos"] else None

    written = bare = 0
    with write_whole(out) as file:
        lines = read_lines(path, convert)
        for _, row in tqdm(lines, desc=f"reading {Path(path).name}", unit=" rows", disable=None):
            if row:
                file.write(f"{row}\n")
            written, bare = written + bool(row), bare + (not row)
        if not written:
            raise ValueError(f"{path}: holds no rows with a positive")
    return f"{written:,} rows" + f"; {bare:,} without a positive left out" * (bare > 0)


class NumbersOnly(pickle.Unpickler):
    """A pickle can name any function to be called. The scores need dicts, numbers and strings, which name
    none; numpy's numbers name these, which do nothing but make a number, of bytes in old pickles."""

    ALLOWED = {("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
               ("_codecs", "encode")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"asks for {module}.{name}, which is no number: not opened, for it could run "
                             "any code")
        return super().find_class(module, name)


def convert_scores(path, out) -> int:
    """A pickle {qid: {pid: score}} as JSON; returns the number of queries."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            scores = NumbersOnly(file).load()
        text = {str(qid): {str(pid): float(score) for pid, score in found.items()}
                for qid, found in scores.items()}
    # Whatever a damaged pickle, or one of something else, makes of being read.
    except (ValueError, TypeError, AttributeError, EOFError, gzip.BadGzipFile, zlib.error,
            pickle.UnpicklingError) as e:
        raise ValueError(f"{path}: {e}; expected {SCORES}") from e
    with write_whole(out, "wb") as file:
        raw = json.dumps(text).encode()
        file.write(gzip.compress(raw, mtime=0) if str(out).endswith(".gz") else raw)
    return len(text)


def main(argv=None):
    shown = [*((name, form.looks_like) for name, form in FORMATS.items()), ("scores", SCORES)]
    p = argparse.ArgumentParser(
        prog="python -m tools.convert", description=__doc__.split("\n")[0], allow_abbrev=False,
        epilog="formats:\n" + "\n".join(f"  {name:15} {how}" for name, how in shown),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("input", help="the file, gzipped or not")
    p.add_argument("--format", required=True, choices=[*FORMATS, "scores"])
    p.add_argument("--out", required=True)
    args = p.parse_args(argv)
    if args.format == "scores":
        print(f"{args.out}: the scores of {convert_scores(args.input, args.out):,} queries")
    else:
        print(f"{args.out}: {convert_rows(args.input, args.out, FORMATS[args.format])}")


if __name__ == "__main__":
    run_command("tools.convert", main)
