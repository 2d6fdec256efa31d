"""An index, and the queries that fit it, as what other engines read; or straight into a Milvus collection.

    python -m tools.export --index indexes/sp-1b --queries queries.tsv --format anserini --out export/sp-1b
    python -m tools.export --index indexes/sp-1b indexes/ds-1b --format milvus --uri ./demo.db

What surprises:
- With --queries an export ends by printing the command that searches it; CIFF's says who imports it. Milvus
  takes no --queries: the lines that are printed for it encode a query themselves.
- Lucene and CIFF hold whole numbers: weights become round(scale * weight), at least 1. The others keep them.
- Lucene has no weights for the words of a query, so a topic repeats a word as often as its weight says.
- Milvus takes one index, or a sparse and a dense one of the same passages. Killed? The same line goes on.
"""
import argparse
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Help, locked, new_folder, positive, positive_int, read_queries, run_command
from index import PIECE, SparseIndex, created, invert, open_index, query_encoder, read_manifest, vocabulary

# Postings of the documents that are turned at once: 3 GB of memory.
RANGE = 1 << 27
# The jar lies in the wheel of pyserini.
JAR = "java -cp anserini-1.7.1-fatjar.jar"


# Documents and queries, one at a time.


def pieces_of(ix: SparseIndex, starts: Tensor, lowest: int, end: int) -> Iterator[tuple]:
    """The index's lists without the documents that are not in a range, in pieces as `invert` takes them."""
    first = 0
    while first < ix.n_terms:
        # As many whole lists as a piece holds, and at least one.
        last = int(torch.searchsorted(starts, starts[first] + PIECE, right=True)) - 1
        last = max(first + 1, last)
        here = slice(ix.starts[first], ix.starts[last])
        inside = (ix.rows[here] >= lowest) & (ix.rows[here] < end)
        ends = F.pad(inside.cumsum(0), (1, 0))[starts[first : last + 1] - starts[first]]
        yield first, ends, ix.rows[here][inside] - lowest, ix.weights[here][inside] * ix.scale
        first = last


class Documents:
    """A sparse index by documents: row r's terms and weights stand between ends[r] and ends[r + 1]."""

    def __init__(self, ix: SparseIndex, folder: Path):
        # To invert an inverted index is to turn it back; into files of `folder`, since it may be larger than
        # memory. A range of documents at a time: every list has a posting for documents everywhere, and to
        # scatter them over 11 GB of mapped file took over half an hour, most of it in writing pages again.
        self.docids, starts = ix.docids, torch.tensor(ix.starts)
        counts = torch.zeros(ix.n_docs, dtype=torch.int64)
        for rows in ix.rows.split(8 * PIECE):
            counts += rows.bincount(minlength=ix.n_docs)
        self.ends = F.pad(counts.cumsum(0), (1, 0))
        self.terms = created(folder, "terms", (len(ix.rows),), torch.int32)
        self.weights = created(folder, "weights", (len(ix.rows),), torch.float32)
        first = 0
        while first < ix.n_docs:
            # As many documents as have RANGE postings, and at least one.
            last = int(torch.searchsorted(self.ends, self.ends[first] + RANGE, right=True)) - 1
            last = max(first + 1, last)
            pieces = functools.partial(pieces_of, ix, starts, first, last)
            (_, terms, weights), _ = invert(pieces, last - first, "fp32")
            here = slice(int(self.ends[first]), int(self.ends[last]))
            self.terms[here], self.weights[here] = terms, weights
            first = last

    def rows(self, first: int = 0, last: int | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(id, terms, weights) of documents first to last."""
        ends = self.ends[first : None if last is None else last + 1].tolist()
        for row, (start, end) in enumerate(zip(ends, ends[1:]), first):
            yield str(self.docids[row]), self.terms[start:end], self.weights[start:end]


class Source(NamedTuple):
    """What is exported: an opened index, the names of its terms, the vectors of some queries (or none)."""

    index: object
    documents: Documents | None  # of a sparse one
    names: list[str]
    qids: list[str]
    queries: Tensor | None
    scale: float


def ids_of(ix) -> list[str]:
    return list(ix.docids)


def used_terms(ix: SparseIndex) -> list[int]:
    """Those that some document holds."""
    return [term for term in range(ix.n_terms) if ix.starts[term] < ix.starts[term + 1]]


def check_names(names: list[str], terms: list[int]) -> None:
    """Lucene parts the words of a document and of a topic at white space, and a topic is one line."""
    for term in terms:
        if names[term].split() != [names[term]]:
            raise ValueError(f"term {term} is named {names[term]!r}, which would be parted at its white "
                             "space: export to seismic or npz, or to ciff without --queries")


def queries_of(source: Source) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(id, terms, weights) of every query."""
    if source.queries is None:
        return
    ends = source.queries.crow_indices().tolist()
    terms, weights = source.queries.col_indices(), source.queries.values()
    for qid, start, end in zip(source.qids, ends, ends[1:]):
        yield qid, terms[start:end], weights[start:end]


def quantised(weights: Tensor, scale: float) -> Tensor:
    """Whole numbers of at least 1: an entry that is there stays there."""
    return (weights * scale).round().clamp(1).int()


def named(names: list[str], terms: Tensor, weights: Tensor) -> dict:
    """{term: weight} with the terms' names."""
    return {names[term]: weight for term, weight in zip(terms.tolist(), weights.tolist())}


# The formats. Each writes into a folder that appears when it is whole.


def write_anserini(source: Source, folder: Path) -> None:
    """documents/ in JsonVectorCollection's form, and topics.tsv. Anserini takes every file of a folder for
    documents, which is why these have one of their own."""
    # First, since a fault in the names shows here: the documents may take an hour.
    write_topics(source, folder)
    check_names(source.names, used_terms(source.index))
    (folder / "documents").mkdir()
    with open(folder / "documents" / "vectors.jsonl", "w", encoding="utf-8") as file:
        for docid, terms, weights in source.documents.rows():
            vector = named(source.names, terms, quantised(weights, source.scale))
            file.write(json.dumps({"id": docid, "contents": "", "vector": vector}, ensure_ascii=False) + "\n")


def write_topics(source: Source, folder: Path) -> None:
    """qid<TAB>words, where a word stands as often as its weight says."""
    if source.queries is None:
        return
    check_names(source.names, source.queries.col_indices().unique().tolist())
    with open(folder / "topics.tsv", "w", encoding="utf-8") as file:
        for qid, terms, weights in queries_of(source):
            counts = quantised(weights, source.scale).tolist()
            words = [" ".join([source.names[term]] * count) for term, count in zip(terms.tolist(), counts)]
            file.write(f"{qid}\t{' '.join(words)}\n")


def write_seismic(source: Source, folder: Path) -> None:
    """vectors.jsonl, and queries.jsonl in the same form: id, content, {term: weight}."""
    sides = {"vectors.jsonl": source.documents.rows()}
    if source.queries is not None:
        sides["queries.jsonl"] = queries_of(source)
    for name, entries in sides.items():
        with open(folder / name, "w", encoding="utf-8") as file:
            for key, terms, weights in entries:
                record = {"id": key, "content": "", "vector": named(source.names, terms, weights)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_npz(source: Source, folder: Path) -> None:
    """vectors.npz, documents x terms, and queries.npz, for scipy.sparse.load_npz."""
    documents, n_terms = source.documents, source.index.n_terms
    save_npz(folder / "vectors.npz", documents.ends, documents.terms, documents.weights, n_terms)
    if source.queries is not None:
        queries = source.queries
        parts = queries.crow_indices(), queries.col_indices(), queries.values()
        save_npz(folder / "queries.npz", *parts, n_terms)


def save_npz(path: Path, ends: Tensor, terms: Tensor, weights: Tensor, n_terms: int) -> None:
    """The layout of scipy.sparse.save_npz for a CSR matrix."""
    arrays = {"data": weights.numpy(), "indices": terms.numpy(), "indptr": ends.numpy()}
    np.savez(path, format=b"csr", shape=(len(ends) - 1, n_terms), **arrays)


def write_npy(source: Source, folder: Path) -> None:
    """vectors.npy and queries.npy, rows of floats, for faiss."""
    vectors = source.index.vectors
    # faiss reads fp32, and numpy has no bf16.
    kind = np.float16 if vectors.dtype == torch.float16 else np.float32
    out = np.lib.format.open_memmap(folder / "vectors.npy", "w+", kind, tuple(vectors.shape))
    for first in range(0, len(vectors), PIECE // 64):
        some = slice(first, first + PIECE // 64)
        out[some] = vectors[some].float().numpy()
    if source.queries is not None:
        np.save(folder / "queries.npy", source.queries.numpy())


def write_ciff(source: Source, folder: Path) -> None:
    """index.ciff, the Common Index File Format: a header, the terms sorted by their bytes, the documents."""
    # First, as it looks at the names.
    write_topics(source, folder)
    ix, names, scale = source.index, source.names, source.scale
    used = sorted(used_terms(ix), key=lambda term: names[term].encode())
    lengths = torch.zeros(ix.n_docs, dtype=torch.int64)
    for rows, weights in zip(ix.rows.split(PIECE), ix.weights.split(PIECE)):
        lengths.index_add_(0, rows, quantised(weights.float() * ix.scale, scale).long())
    total = int(lengths.sum())
    mean = total / max(1, ix.n_docs)
    with open(folder / "index.ciff", "wb") as file:
        about = f"round({scale} x weight)"
        file.write(delimited(message(1, len(used), ix.n_docs, len(used), ix.n_docs, total, mean, about)))
        for term in used:
            file.write(delimited(postings_list(ix, term, names[term], scale)))
        for row, length in enumerate(lengths.tolist()):
            file.write(delimited(message(row, ix.docids[row], length)))


def postings_list(ix: SparseIndex, term: int, name: str, scale: float) -> bytes:
    """One term: its name, its counts, and its documents as gaps, each with its impact."""
    start, end = ix.starts[term], ix.starts[term + 1]
    impacts = quantised(ix.weights[start:end].float() * ix.scale, scale)
    gaps = ix.rows[start:end].diff(prepend=ix.rows.new_zeros(1))
    parts = [message(name, end - start, int(impacts.sum()))]
    for posting in zip(gaps.tolist(), impacts.tolist()):
        # 0x22: field 4, a message.
        parts.append(b"\x22" + delimited(message(*posting)))
    return b"".join(parts)


def varint(n: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth bit says that more follow.

    >>> varint(300)
    b'\\xac\\x02'
    """
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(*values) -> bytes:
    """A protobuf message, fields numbered from 1: ints as varints, floats as doubles, texts with a length."""
    out = b""
    for number, value in enumerate(values, 1):
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 1) + np.float64(value).tobytes()
        else:
            out += varint(number << 3 | 2) + delimited(value.encode())
    return out


def delimited(content: bytes) -> bytes:
    return varint(len(content)) + content


class Format(NamedTuple):
    """How to write an index, which kind of index it takes, what to do with the folder afterwards, and how to
    search it with the exported queries."""
    write: Callable[[Source, Path], None]
    sparse: bool
    afterwards: str
    search: str


FORMATS = {
    "anserini": Format(write_anserini, True, f"""
{JAR} io.anserini.index.IndexCollection -collection JsonVectorCollection -input OUT/documents \\
  -generator DefaultLuceneDocumentGenerator -index OUT/lucene -impact -pretokenized -threads 4""", f"""
{JAR} io.anserini.search.SearchCollection -index OUT/lucene -topics OUT/topics.tsv \\
  -topicReader TsvString -impact -pretokenized -hits 1000 -output OUT/run.trec"""),
    "ciff": Format(write_ciff, True, """
The importers of PISA, JASS, Terrier and OldDog read OUT/index.ciff.""", """
A line of OUT/topics.tsv is qid<TAB>words: a word stands as often as its weight says."""),
    "seismic": Format(write_seismic, True, """
python -c 'from seismic import SeismicIndex
SeismicIndex.build("OUT/vectors.jsonl").save("OUT/index")'""", """
python -c 'import json, numpy as np
from seismic import SeismicIndex, get_seismic_string
index = SeismicIndex.load("OUT/index.index.seismic")
for query in map(json.loads, open("OUT/queries.jsonl")):
    terms = np.array(list(query["vector"]), get_seismic_string())
    weights = np.array(list(query["vector"].values()), "float32")
    print(index.search(query["id"], terms, weights, k=10, query_cut=len(terms), heap_factor=1))'"""),
    "npz": Format(write_npz, True, "", """
python -c 'from scipy.sparse import load_npz
print(load_npz("OUT/queries.npz") @ load_npz("OUT/vectors.npz").T)'"""),
    "npy": Format(write_npy, False, "", """
python -c 'import faiss, numpy as np
vectors, queries = (np.load(f"OUT/{name}.npy").astype("float32") for name in ("vectors", "queries"))
index = faiss.IndexFlatIP(vectors.shape[1])
index.add(vectors)
print(index.search(queries, 10))'"""),
}


# Milvus: rows into a collection instead of files into a folder.


def into_milvus(folders: list, uri: str, collection: str, batch: int = 1000) -> None:
    """Upsert the vectors of one or two indexes, row by row, beside their ids."""
    try:
        from pymilvus import MilvusClient
    except ImportError as e:
        raise ValueError(f"milvus needs pymilvus ({e}): pip install -r tools/requirements-engines.txt") from e
    indexes = [open_index(folder) for folder in folders]
    check_same_passages(indexes, folders)
    client, n_docs = MilvusClient(uri), indexes[0].n_docs
    if not client.has_collection(collection):
        make_collection(client, collection, indexes)
    # What a killed run left there counts, after a look at whether it is ours.
    done = client.query(collection, filter="", output_fields=["count(*)"])[0]["count(*)"]
    # The last batch again, for nobody knows whether all of it arrived. Upserting twice changes nothing.
    first = max(0, done - batch)
    with tempfile.TemporaryDirectory() as folder:
        sides = [Documents(ix, Path(folder)) if isinstance(ix, SparseIndex) else ix for ix in indexes]
        check_collection(client, collection, sides, done, n_docs)
        with tqdm(total=n_docs, initial=first, unit=" passages", desc=f"into {collection}") as bar:
            for start in range(first, n_docs, batch):
                rows = rows_for_milvus(sides, start, min(start + batch, n_docs))
                client.upsert(collection, rows)
                bar.update(len(rows))
    client.flush(collection)
    client.close()


def make_collection(client, collection: str, indexes: list) -> None:
    """Ids, and a field for each index: exact search by inner product."""
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    how = client.prepare_index_params()
    schema.add_field("docid", DataType.VARCHAR, is_primary=True, max_length=512)
    for ix in indexes:
        if isinstance(ix, SparseIndex):
            schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
            how.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        else:
            schema.add_field("dense", DataType.FLOAT_VECTOR, dim=ix.vectors.shape[1])
            how.add_index("dense", index_type="FLAT", metric_type="IP")
    client.create_collection(collection, schema=schema, index_params=how)


def rows_for_milvus(sides: list, start: int, end: int) -> list[dict]:
    """Documents start to end as Milvus takes them: {"docid", "sparse": {term: weight}, "dense": [number]}."""
    rows = [{"docid": str(sides[0].docids[row])} for row in range(start, end)]
    for side in sides:
        if isinstance(side, Documents):
            for row, (_, terms, weights) in zip(rows, side.rows(start, end)):
                row["sparse"] = dict(zip(terms.tolist(), weights.tolist()))
        else:
            for row, vector in zip(rows, side.vectors[start:end].float().tolist()):
                row["dense"] = vector
    return rows


def check_same_passages(indexes: list, folders: list) -> None:
    """Two indexes in one collection must be of two kinds, and row for row of the same passages."""
    if len(indexes) > 2 or len({type(ix) for ix in indexes}) < len(indexes):
        raise ValueError(f"--index {' '.join(map(str, folders))}: expected one sparse, one dense, or both")
    if len(indexes) == 2 and ids_of(indexes[0]) != ids_of(indexes[1]):
        raise ValueError(f"{folders[0]} and {folders[1]} hold other passages, or in another order")


def check_collection(client, collection: str, sides: list, done: int, n_docs: int) -> None:
    """What is in the collection must be the first rows of these indexes: the last of them is looked up."""
    if not done:
        return
    fields = [field["name"] for field in client.describe_collection(collection)["fields"]]
    # A collection that is longer than the indexes has no such row, and no passage has the id "".
    [want] = rows_for_milvus(sides, done - 1, done) if done <= n_docs else [{"docid": ""}]
    got = client.get(collection, ids=[want["docid"]], output_fields=fields)
    same_fields = bool(got) and sorted(fields) == sorted(want)
    if not same_fields or not all(alike(got[0][name], want[name]) for name in fields):
        raise ValueError(f"collection {collection!r} holds {done:,} passages that are not the index's first: "
                         "give another --collection, or drop it there")


def alike(a, b) -> bool:
    """Equal ids, or equal vectors up to the rounding of a store."""
    if isinstance(a, str):
        return a == b
    if isinstance(a, dict):
        return a.keys() == b.keys() and np.allclose(list(a.values()), [b[key] for key in a], rtol=1e-5)
    return np.allclose(a, b, rtol=1e-5)


def loaded_by(folder, manifest: dict) -> str:
    """The Python expression that loads what encodes an index's queries."""
    encoder = manifest.get("encoder") or {}
    if encoder.get("kind") == "bm25":
        return f"Words({str(folder)!r})"
    # Where the index came from arrays, the reader knows the model.
    given = [repr(encoder.get("model") or "MODEL")]
    given += [f"{key}={encoder[key]!r}" for key in ("adapter", "base", "head") if encoder.get(key)]
    return f"Retriever.load({', '.join(given)})"


def milvus_lines(folders: list, uri: str, collection: str) -> str:
    """The Python lines that search the collection; with two fields, also both fused."""
    encoders = [loaded_by(folder, read_manifest(folder)) for folder in folders]
    imports = {"Words": "from tools.bm25 import Words", "Retriever": "from model import Retriever"}
    lines = ["from pymilvus import AnnSearchRequest, MilvusClient, RRFRanker",
             *(line for name, line in imports.items() if any(e.startswith(name) for e in encoders)),
             f'client, texts = MilvusClient({uri!r}), ["how do tides work"]']
    for folder, encoder in zip(folders, encoders):
        kind = read_manifest(folder)["kind"]
        lines.append(f'q = {encoder}.encode(texts, "query")')
        if kind == "sparse":
            lines.append("sparse = [dict(zip(q.col_indices().tolist(), q.values().tolist()))]")
        else:
            lines.append("dense = q.tolist()")
        lines.append(f'print(client.search({collection!r}, {kind}, anns_field="{kind}", limit=10))')
    if len(folders) == 2:
        each = ", ".join(f'AnnSearchRequest({kind}, "{kind}", {{}}, 100)' for kind in ("sparse", "dense"))
        lines.append(f'print(client.hybrid_search({collection!r}, [{each}], RRFRanker(60), limit=10))')
    return "\n".join(lines)


# The command.


def encoded_queries(folder, manifest: dict, queries, model=None) -> tuple[list[str], Tensor | None]:
    """Ids and vectors of a file of queries, encoded as search would."""
    if queries is None:
        return [], None
    texts = read_queries(queries)
    # With a --model, query_encoder says that it cannot be.
    if not model and (manifest.get("encoder") or {}).get("kind") == "bm25":
        from tools.bm25 import Words

        return list(texts), Words(folder).encode(list(texts.values()))
    r = query_encoder(folder, manifest, model)
    return list(texts), r.encode(list(texts.values()), "query")


def export(folder, out, format: str, scale: float = 100.0, queries=None, model=None) -> Path:
    """Write the index `folder` and the vectors of `queries` into the folder `out`, ids into docids.txt."""
    form, manifest = FORMATS[format], read_manifest(folder)
    kind = manifest["kind"]
    if (kind == "sparse") != form.sparse:
        fits = ", ".join(name for name, other in FORMATS.items() if other.sparse != form.sparse)
        raise ValueError(f"{folder} is {kind}: it exports as {fits} or milvus, not {format}")
    ix = open_index(folder)
    names = vocabulary(folder) if form.sparse else []
    qids, vectors = encoded_queries(folder, manifest, queries, model)
    with locked(out), new_folder(out) as aside:
        # Turned once for all formats, aside, since it may be larger than memory.
        by_document = aside / ".documents"
        by_document.mkdir()
        documents = Documents(ix, by_document) if form.sparse else None
        form.write(Source(ix, documents, names, qids, vectors, scale), aside)
        shutil.rmtree(by_document)
        lines = {"docids.txt": ids_of(ix), "qids.txt": qids}
        for name, ids in lines.items():
            if ids:
                (aside / name).write_text("".join(f"{key}\n" for key in ids), encoding="utf-8")
    return Path(out)


def check_flags(args) -> None:
    """What would be ignored is refused."""
    if args.format == "milvus":
        given = [f"--{flag} {getattr(args, flag)}" for flag in ("out", "queries", "model")
                 if getattr(args, flag) is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: --format milvus writes no files; leave it out, and encode "
                             "queries by the lines that it prints")
        return
    if len(args.index) > 1 or not args.out:
        raise ValueError(f"--format {args.format} takes one --index and an --out folder to make")
    if args.model and not args.queries:
        raise ValueError(f"--model {args.model} encodes queries: give --queries, too, or leave it out")


def run(args) -> None:
    """The command: export, and say what was written and what comes next."""
    check_flags(args)
    if args.format == "milvus":
        into_milvus(args.index, args.uri, args.collection, args.batch)
        print(f"{args.uri}, collection {args.collection}. To search it from here:\n")
        print(milvus_lines(args.index, args.uri, args.collection))
        return
    out = export(args.index[0], args.out, args.format, args.scale, args.queries, args.model)
    for file in sorted(file for file in out.rglob("*") if file.is_file()):
        print(f"{os.path.relpath(file, out.parent):<40} {file.stat().st_size / 1e6:9.1f} MB")
    form = FORMATS[args.format]
    print((form.afterwards + (form.search if args.queries else "")).replace("OUT", str(out)))
    if not args.queries:
        print("\nQueries were not exported: --queries FILE writes them, too, and prints how to search.")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--index", required=True, nargs="+", help="folder; milvus: also one of each kind")
    parser.add_argument("--format", required=True, choices=[*FORMATS, "milvus"])
    parser.add_argument("--out", help="folder to make (not for milvus)")
    parser.add_argument("--queries", help="write the vectors of these queries, too")
    parser.add_argument("--model", help="that encodes them, if not the one that the index was built with")
    parser.add_argument("--scale", type=positive, default=100.0,
                        help="anserini, ciff: weights are stored as round(scale x weight)")
    g = parser.add_argument_group("milvus")
    g.add_argument("--uri", default="./milvus.db", help="a file for milvus-lite, or http://HOST:19530")
    g.add_argument("--collection", default="passages")
    g.add_argument("--batch", type=positive_int, default=1000, help="passages a request")
    args = parser.parse_args(argv)
    run_command(parser.prog, functools.partial(run, args))


if __name__ == "__main__":
    main()
