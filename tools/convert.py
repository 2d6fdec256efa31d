"""Other people's training rows, turned into the form that data.py reads; one row a line, in the order of the
file.

    python -m tools.convert --format tevatron train.jsonl --out rows.jsonl
    python -m tools.convert --format scores cross-encoder-scores.pkl.gz --out scores.json.gz

What is written: {"qid", "query", "pos", "neg", "pos_scores", "neg_scores", "inline"}, without what the format
lacks. "inline" says whether pos and neg are texts. Rows of ids need --corpus at training, and --queries if
they lack the text of the query. The formats are in the table FORMATS below, and in --help.
"""
import argparse
import gzip
import json
import pickle
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

from tqdm import tqdm

from data import Row, check_row, parse_json, read_lines, run_command, write_whole


class Format(NamedTuple):
    read: Callable[[str], Row]  # a line; what it refuses is an error at this line
    looks_like: str


def title_and_text(passage: dict) -> str:
    """As a corpus joins them."""
    return " ".join(part for part in (passage.get("title"), passage["text"]) if part)


def read_tevatron(line: str) -> Row:
    r = parse_json(line)
    pos = list(map(title_and_text, r["positive_passages"]))
    neg = list(map(title_and_text, r["negative_passages"]))
    return Row(pos, neg, None, r.get("query_id"), r["query"], inline=True)


def read_tevatron_ids(line: str) -> Row:
    r = parse_json(line)
    return Row(
        r["positive_document_ids"], r["negative_document_ids"], None, r["query_id"], r.get("query_text")
    )


def read_triplet(line: str) -> Row:
    r = parse_json(line)
    query = r.get("anchor", r.get("query"))
    numbered = sorted((key for key in r if key.startswith("negative_")), key=lambda key: int(key[9:]))
    neg = [r[key] for key in ("negative", *numbered) if key in r]
    # The same columns hold texts or, in the sets named `ids`, numbers.
    ids = isinstance(query, int)
    return Row([r["positive"]], neg, None, query if ids else None, None if ids else query, inline=not ids)


def read_ce_scores(line: str) -> Row:
    r = parse_json(line)
    # A passage that several systems found is one negative.
    neg = {item["pid"]: item["ce-score"] for found in r["neg"].values() for item in found}
    pos = {item["pid"]: item["ce-score"] for item in r["pos"]}
    return Row([*pos], [*neg], [*pos.values(), *neg.values()], r["qid"], r.get("query"))


def read_nway(line: str) -> Row:
    qid, *items = json.loads(line)
    if items and isinstance(items[0], list):
        pids, scores = map(list, zip(*items))
    else:
        pids, scores = items, None
    return Row(pids[:1], pids[1:], scores, qid, None)


def three_columns(line: str) -> list[str]:
    columns = line.split("\t")
    if len(columns) != 3:
        raise ValueError(f"expected 3 columns between tabs, got {len(columns)}")
    return columns


def read_id_triple(line: str) -> Row:
    # MS MARCO's own are between tabs, copies of them between blanks.
    qid, pos, neg = three_columns("\t".join(line.split()))
    return Row([pos], [neg], None, qid, None)


def read_text_triple(line: str) -> Row:
    query, pos, neg = three_columns(line)
    return Row([pos], [neg], None, None, query, inline=True)


# Another format is a function and a row of this table.
FORMATS = {
    "tevatron": Format(
        read_tevatron,
        '{"query_id", "query", "positive_passages": [{"docid", "title", "text"}], '
        '"negative_passages": [...]}',
    ),
    "tevatron-ids": Format(
        read_tevatron_ids,
        '{"query_id", "query_text", "positive_document_ids": [...], "negative_document_ids": [...]}',
    ),
    "triplets": Format(
        read_triplet,
        '{"anchor" or "query", "positive", "negative" or "negative_1", "negative_2", ...} '
        "(sentence-transformers)",
    ),
    "ce-scores": Format(
        read_ce_scores,
        '{"qid", "pos": [{"pid", "ce-score"}], "neg": {"bm25": [{"pid", "ce-score"}], ...}} '
        "(sentence-transformers)",
    ),
    "nway": Format(
        read_nway,
        "[qid, [pid, score], [pid, score], ...], or [qid, pid, pid, ...]; the positive first (ColBERT)",
    ),
    "id-triples": Format(read_id_triple, "qid<TAB>pos_pid<TAB>neg_pid (MS MARCO's qidpidtriples)"),
    "text-triples": Format(read_text_triple, "query<TAB>positive<TAB>negative (MS MARCO's triples)"),
}
SCORES = "a pickle {qid: {pid: score}} (sentence-transformers), for --scores; it becomes JSON"


def native(row: Row) -> dict:
    """What data.py reads, as a JSON object."""
    out = {"qid": row.qid, "query": row.query, "pos": row.pos, "neg": row.neg}
    if row.scores is not None:
        n = len(row.pos)
        out |= {"pos_scores": row.scores[:n], "neg_scores": row.scores[n:]}
    return {key: value for key, value in out.items() if value is not None} | {"inline": row.inline}


def convert_rows(path, out, form: Format) -> int:
    """Write every row of `path` in the native form; returns how many."""
    def parse(line: str) -> Row:
        try:
            row = check_row(form.read(line))
        except KeyError as e:
            raise ValueError(f"has no {e}; expected {form.looks_like}") from e
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{e}; expected {form.looks_like}") from e
        if not row.pos:
            raise ValueError(f"has no positive; expected {form.looks_like}")
        return row

    n = 0
    with write_whole(out) as file:
        for _, row in tqdm(
            read_lines(path, parse), desc=f"reading {Path(path).name}", unit=" rows", disable=None
        ):
            file.write(json.dumps(native(row), ensure_ascii=False) + "\n")
            n += 1
        if not n:
            raise ValueError(f"{path}: holds no rows")
    return n


class NumbersOnly(pickle.Unpickler):
    """A pickle can name any function to be called. The scores need dicts, numbers and strings, which name
    none; numpy's numbers name two, which do nothing but make a number."""

    ALLOWED = {("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise ValueError(
                f"asks for {module}.{name}, which is no number: not opened, for it could run any code"
            )
        return super().find_class(module, name)


def convert_scores(path, out) -> int:
    """A pickle {qid: {pid: score}} as JSON; returns the number of queries."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            scores = NumbersOnly(file).load()
        text = {
            str(qid): {str(pid): float(score) for pid, score in found.items()}
            for qid, found in scores.items()
        }
    except (
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        gzip.BadGzipFile,
        zlib.error,
        pickle.UnpicklingError,
    ) as e:
        raise ValueError(f"{path}: {e}; expected {SCORES}") from e
    with write_whole(out, "wb") as file:
        raw = json.dumps(text).encode()
        file.write(gzip.compress(raw, mtime=0) if str(out).endswith(".gz") else raw)
    return len(text)


def main(argv=None):
    shown = [*((name, form.looks_like) for name, form in FORMATS.items()), ("scores", SCORES)]
    p = argparse.ArgumentParser(
        prog="python -m tools.convert",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        epilog="formats:\n" + "\n".join(f"  {name:13} {how}" for name, how in shown),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("input", help="the file, gzipped or not")
    p.add_argument("--format", required=True, choices=[*FORMATS, "scores"])
    p.add_argument("--out", required=True)
    args = p.parse_args(argv)
    if args.format == "scores":
        print(f"{args.out}: the scores of {convert_scores(args.input, args.out):,} queries")
    else:
        print(f"{args.out}: {convert_rows(args.input, args.out, FORMATS[args.format]):,} rows")


if __name__ == "__main__":
    run_command("tools.convert", main)
