"""Encode a corpus into an index, and search it exactly.

    torchrun --nproc_per_node=4 index.py build --model runs/sp-1b --corpus collection.tsv --out indexes/sp-1b
    python index.py search --index indexes/sp-1b --queries dev.tsv --k 1000 --out runs/sp-1b/dev.trec

    ix = SparseIndex.of(D, ids)           # in Python: D, Q as `encode` returns them; or DenseIndex
    scores, rows = ix.search(Q, k=10)     # best first; ids[row] is a document, a row of -1 is none

What surprises:
- A build that was killed goes on when the same line is given again.
- An inverted index is three arrays: where each term's list starts, and all lists' documents and weights.
  To search is to add up a few slices of them. Nothing is compressed, nothing is skipped.
- A sparse score is the float32 sum of float32 products in the order of the term ids: the same bits on any
  device, with any number of threads or ranks. A dense score is what the processor's matrix product makes it.
- Equal scores are ordered by document row. A sparse search finds what shares a term with the query.
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (Corpus, Help, check_files, check_id, check_qid, checksum, discard, fingerprint,
                  leave_with_parent, locked, naming, new_folder, positive_int, rank_and_world, read_json,
                  read_queries, run_command, stamp, write_whole)

# Postings in memory at once where all of them pass by: 100 MB.
PIECE = 1 << 21
# Scores of which the search for the k best looks at the largest first.
BLOCK = 256
# Documents in one dense product; and of these, those that a CPU's cache holds while all queries pass by.
CHUNK, TILE = 1 << 14, 2048
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.uint8}
# What a device computes fast in, where --compute says nothing; any other device takes fp32.
FAST = {"cuda": "bf16"}


class Index:
    """What both kinds share: arrays, here or on a GPU, ids, and a folder to `save` to and `open` again."""

    def __init__(self, arrays: tuple, n_docs: int, docids=None, manifest: dict | None = None, device="cpu"):
        self.arrays, self.n_docs, self.manifest = arrays, n_docs, manifest or {}
        self.docids = range(n_docs) if docids is None else docids
        if len(self.docids) != n_docs:
            raise ValueError(f"{len(self.docids)} ids for {n_docs} vectors, expected one for each")
        # What would leave a search no room on the GPU stays here, and is copied there as it is read.
        self.device, self.fits = torch.device(device), True
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            self.fits = sum(array.nbytes for array in arrays) < 0.7 * free
        # Each under its name: ix.rows, ix.weights, ix.vectors.
        for name, array in zip(self.names, arrays):
            setattr(self, name, array.to(self.device) if self.fits else array)

    def save(self, path) -> Path:
        with new_folder(path) as aside:
            for name, array in zip(self.names, self.arrays):
                created(aside, name, array.shape, array.dtype).copy_(array)
            finish(aside, self.arrays, self.manifest, self.docids)
        return Path(path)

    @classmethod
    def open(cls, path, device="cpu"):
        """Maps the files: there at once, in memory as far as it is read."""
        manifest = read_manifest(path)
        if manifest["kind"] != cls.kind:
            raise ValueError(f"{path} is a {manifest['kind']} index, not a {cls.kind} one")
        arrays = [mapped(path, name) for name in cls.names]
        arrays[-1] = arrays[-1].view(DTYPES[manifest["dtype"]])
        return cls(arrays, manifest["documents"], Docids(path), manifest, device)


class SparseIndex(Index):
    """For each term a list, a slice starts[t] : starts[t + 1] of `rows` and of `weights`: the documents that
    hold it, ascending, and its weights there.

    >>> D = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 2.0]]).to_sparse_csr()  # 2 documents, 3 terms
    >>> SparseIndex.of(D).search(torch.tensor([[0.0, 0.0, 1.0]]).to_sparse_csr(), k=2)
    (tensor([[2.0000, 0.5000]]), tensor([[1, 0]]))
    """

    kind, names, dtypes = "sparse", ("starts", "rows", "weights"), ("fp32", "fp16", "int8")

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # Python's ints: no tensor arithmetic between the lists.
        self.starts = self.arrays[0].tolist()
        self.n_terms = len(self.starts) - 1
        # Of 8-bit weights. A query's weights carry it, so that the stored ones are added as they are.
        self.scale = self.manifest.get("scale", 1.0)
        # Kept, at a kilobyte a term: to slice a tensor takes longer than to add up a short list.
        if self.fits and self.weights.dtype == torch.float32:
            self.list_of = functools.cache(self.list_of)

    @classmethod
    def of(cls, vectors: Tensor, docids=None, device="cpu", dtype: str = "fp32") -> "SparseIndex":
        """From documents x terms, as `encode` returns them."""
        return cls.from_csr(*csr_of(vectors), vectors.shape[1], docids, device, dtype)

    @classmethod
    def from_csr(cls, indptr, indices, values, n_terms: int, docids=None, device="cpu", dtype: str = "fp32"):
        """From the three arrays of documents x terms in CSR, numpy's or torch's."""
        indptr, terms, weights = csr_of((indptr, indices, values))
        n_docs = len(indptr) - 1
        step = max(1, PIECE * n_docs // max(1, len(terms)))

        def pieces():
            for row in range(0, n_docs, step):
                ends = indptr[row : row + step + 1]
                yield row, ends - ends[0], terms[ends[0] : ends[-1]], weights[ends[0] : ends[-1]]

        arrays, scale = invert(pieces, n_terms, dtype)
        return cls(arrays, n_docs, docids, {"scale": scale}, device)

    def search(self, queries, k: int = 1000, threads: int | None = None) -> tuple[Tensor, Tensor]:
        """queries (Q, terms) as `encode` returns them, or a CSR triple. The k best of each: scores (Q, k) and
        documents' rows (Q, k), padded with -inf and -1. On a CPU, `threads` queries at a time."""
        queries, on_cpu = self.terms_of(queries), self.device.type == "cpu"
        threads = (threads or torch.get_num_threads()) if on_cpu else 1
        # A group of queries shares the work of finding the k best; on a CPU its scores stay in the cache.
        # Whole blocks of scores: the last ones are nobody's, and stay zero.
        n_scores = self.n_docs + -self.n_docs % BLOCK
        size = (2**19 if on_cpu else 2**28) // max(1, n_scores)
        size = max(1, min(size, 128, math.ceil(len(queries) / threads)))
        best, rows = empty_top_k(len(queries), k)

        def work(worker: int) -> None:
            scores = torch.empty(size, n_scores, device=self.device)
            for first in range(worker * size, len(queries), threads * size):
                group = slice(first, first + size)
                best[group], rows[group] = self.search_group(queries[group], k, scores)

        if threads == 1:
            work(0)
            return best, rows
        # Threads, not processes: torch lets go of Python's lock while it adds. Each has a core to itself.
        before = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, range(threads)))
        torch.set_num_threads(before)
        return best, rows

    @torch.inference_mode()  # saves a tenth of what a call costs
    def search_group(self, queries: list, k: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        # Clever engines skip what cannot win. To add up everything is faster here: a list is a slice of rows
        # and one of weights, read at the speed of memory, on a GPU by one kernel. A document stands in a
        # list once, so the order in which a GPU's threads add changes no sum.
        scores = scores[: len(queries)].zero_()
        for own, terms in zip(scores.unbind(), queries):
            add = own.index_add_
            for term, factor in terms:
                rows, weights = self.list_of(term)
                # BM25's queries hold most words once, and `alpha` is a quarter of a short call.
                if factor == 1:
                    add(0, rows, weights)
                else:
                    add(0, rows, weights, alpha=factor)
        return top_k(scores, k, scores.new_zeros(len(scores)))

    def list_of(self, term: int) -> tuple[Tensor, Tensor]:
        here = slice(self.starts[term], self.starts[term + 1])
        return self.rows[here].to(self.device), self.weights[here].to(self.device).float()

    def terms_of(self, queries) -> list[list[tuple[int, float]]]:
        """Each query's (term, weight), ascending: the one order in which every search adds."""
        ends, terms, weights = csr_of(queries)
        check_weights(ends, terms, weights, self.n_terms, "query")
        ends, terms, weights = ends.tolist(), terms.tolist(), (weights.float() * self.scale).tolist()
        return [sorted(zip(terms[start:end], weights[start:end])) for start, end in zip(ends, ends[1:])]


class DenseIndex(Index):
    """A row of `vectors` for each document, in fp32, fp16 or bf16.

    >>> DenseIndex.of(torch.eye(3)).search(torch.tensor([[1.0, 3.0, 2.0]]), k=2)
    (tensor([[3., 2.]]), tensor([[1, 2]]))
    """

    kind, names, dtypes = "dense", ("vectors",), ("fp16", "fp32", "bf16")

    @classmethod
    def of(cls, vectors, docids=None, device="cpu") -> "DenseIndex":
        """From documents x dimensions, as `encode` returns them."""
        vectors = torch.as_tensor(vectors)
        if vectors.ndim != 2 or vectors.dtype not in [DTYPES[name] for name in cls.dtypes]:
            raise ValueError(f"vectors are {vectors.dtype} {tuple(vectors.shape)}, expected documents x "
                             f"dimensions in {', '.join(cls.dtypes)}")
        return cls((vectors,), len(vectors), docids, None, device)

    def search(self, queries, k: int = 1000, batch: int = 128, threads: int | None = None) -> tuple:
        """queries (Q, dimensions). The k best by dot product, in fp32: scores and rows as SparseIndex's."""
        queries, width = torch.as_tensor(queries).detach().float(), self.vectors.shape[1]
        if queries.shape[1] != width or not torch.isfinite(queries).all():
            raise ValueError(f"queries {tuple(queries.shape)} must be finite and {width} wide, as this index")
        # More arithmetic for every chunk that is copied.
        batch = batch if self.fits else 4096
        best, rows = empty_top_k(len(queries), k)
        with contextlib.ExitStack() as at_the_end:
            if threads:
                at_the_end.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(threads)
            for first in range(0, len(queries), batch):
                some = slice(first, first + batch)
                best[some], rows[some] = self.search_batch(queries[some].to(self.device), k)
        return best, rows

    def search_batch(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = empty_top_k(len(queries), k, self.device)
        # A million scores at a time on a CPU; on a GPU so many that a kernel is worth its launch.
        step = CHUNK * max(1, (4096 if queries.is_cuda else 64) // len(queries))
        for first in range(0, self.n_docs, step):
            scores = products(queries, self.vectors[first : first + step])  # (B, step)
            # The sum is the cheaper look, though finite numbers may overflow it.
            if not scores.sum().isfinite() and not scores.isfinite().all():
                row = first + int((~scores.isfinite()).nonzero()[0, 1])
                raise ValueError(f"document row {row} ({self.docids[row]}) holds NaN or infinity; did the "
                                 "model diverge?")
            # Above the k-th best so far: an equal score of a later row does not enter. Soon few scores do.
            new, rows = top_k(scores, k, best[0][:, -1], first, few=first >= 4 * k)
            width = int((rows >= 0).sum(1).amax())
            if width:
                best = merge(best, (new[:, :width], rows[:, :width]))
        return best


def products(queries: Tensor, vectors: Tensor) -> Tensor:
    """queries (B, D) times vectors (N, D), in fp32, on the queries' device: (B, N)."""
    if queries.is_cuda or not torch.backends.mkldnn.is_available():
        pieces = vectors.split(16 * CHUNK if queries.is_cuda else CHUNK)
        return torch.cat([queries @ piece.to(queries.device).float().T for piece in pieces], 1)
    # On a CPU by oneDNN, on AMD's 1.2 to 3 times as fast as `@`, which is MKL. Queries are laid out once.
    blocked, found = queries.to_mkldnn(), []
    for piece in map(Tensor.float, vectors.split(TILE)):
        if len(queries) == 1 and len(piece) % 64 == 0:
            # Both libraries read memory at two thirds of its speed for a matrix times one vector, at all of
            # it for a batch of small matrices.
            piece = piece.unflatten(0, (-1, 64))
            found.append(torch.bmm(piece, queries.T.expand(len(piece), -1, 1)).view(1, -1))
        else:
            found.append(F.linear(blocked, piece).to_dense())
    return torch.cat(found, 1)


# The k best are two lists: scores (B, k), best first, and documents' rows (B, k), the lower first among
# equals, padded with -inf and -1.

def empty_top_k(B: int, k: int, device="cpu") -> tuple[Tensor, Tensor]:
    return torch.full((B, k), -math.inf, device=device), torch.full((B, k), -1, device=device)


def top_k(scores: Tensor, k: int, above: Tensor, first: int = 0, few: bool = False) -> tuple[Tensor, Tensor]:
    """The k best of every row of scores (B, N) that are greater than `above` (B,). Column 0 is document row
    `first`. `few`: so few are greater that none need be ruled out beforehand.

    >>> top_k(torch.tensor([[2.0, 5.0, 0.0, 5.0]]), 3, torch.zeros(1))
    (tensor([[5., 5., 2.]]), tensor([[1, 3, 0]]))
    """
    if not scores.numel():
        return empty_top_k(len(scores), k, scores.device)
    threshold = torch.nextafter(above, torch.full_like(above, math.inf))
    query, column, best = candidates(scores, k, threshold, few)
    return sorted_lists(query, column + first, best, len(scores), k)


def candidates(scores: Tensor, k: int, threshold: Tensor, few: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(query, column, score), in the order of query and column, of the scores (B, N) that reach their
    query's threshold (B,) and can be among its k best."""
    # Blocks of a size that makes 4k of them or more: then the threshold gets high, and the maxima stay few.
    N = scores.shape[1]
    size = min(BLOCK, 2 ** (max(1, N // (4 * k)).bit_length() - 1))
    if N % size:
        scores = F.pad(scores, (0, -N % size), value=-math.inf)
    blocks = scores.unflatten(1, (-1, size))  # (B, N / size, size)
    maxima = blocks.amax(2)
    # Where k blocks have a maximum of at least x, k scores are at least x. So x is a threshold, too, and only
    # blocks that reach it need a look: a tenth of torch.topk's time for a million scores.
    if not few and maxima.shape[1] > k:
        threshold = torch.maximum(threshold, maxima.topk(k, sorted=False).values.amin(1))
    query, block = (maxima >= threshold[:, None]).nonzero(as_tuple=True)
    scores = blocks[query, block]
    hit, column = (scores >= threshold[query, None]).nonzero(as_tuple=True)
    return query[hit], block[hit] * size + column, scores[hit, column]


def sorted_lists(query: Tensor, row: Tensor, scores: Tensor, B: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of triples that come in the order of query and row."""
    # Stable: equals stay in the order of their rows, and then each query's scores in theirs.
    scores, order = scores.sort(descending=True, stable=True)
    query, row = query[order], row[order]
    query, order = query.sort(stable=True)
    start = torch.searchsorted(query, torch.arange(B, device=query.device))
    # All after the k-th go to one place more, which is cut off: nobody waits for a GPU to count them.
    place = (torch.arange(len(query), device=query.device) - start[query]).clamp(max=k)
    best, rows = empty_top_k(B, k + 1, query.device)
    best[query, place], rows[query, place] = scores[order], row[order]
    return best[:, :k], rows[:, :k]


def merge(best: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The k best with those of later rows."""
    scores, rows = (torch.cat(lists, 1) for lists in zip(best, later))
    # Stable: among equals the lower row stays first.
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    k = best[0].shape[1]
    return scores[:, :k], rows.gather(1, order[:, :k])


# Documents x terms become terms x documents.

def csr_of(vectors) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, terms, weights) of a CSR tensor, or of such a triple."""
    if not isinstance(vectors, Tensor):
        return tuple(map(torch.as_tensor, vectors))
    # A transposed one is in CSC.
    if vectors.layout != torch.sparse_csr:
        raise ValueError(f"vectors are {vectors.layout}, expected CSR: D.to_sparse_csr() makes that")
    return vectors.crow_indices().cpu(), vectors.col_indices().cpu(), vectors.values().detach().cpu()


def check_weights(ends, terms, weights, n_terms: int, what: str, first=0, dtype: str = "fp32") -> None:
    # NaN is not above 0 either. From 65520 on fp16 rounds to infinity.
    limit = 65520 if dtype == "fp16" else math.inf
    good = (terms >= 0) & (terms < n_terms) & (weights >= 0) & (weights.float() < limit)
    if not good.all():
        i = int((~good).nonzero()[0])
        text = first + int(torch.searchsorted(ends, i, right=True)) - 1
        raise ValueError(f"{what} {text}: term {int(terms[i])} with weight {float(weights[i])}, outside the "
                         f"vocabulary of {n_terms} terms, or not a finite, not negative weight of {dtype}")


def invert(pieces: Callable, n_terms: int, dtype: str, folder: Path | None = None) -> tuple[tuple, float]:
    """Documents x terms, in pieces of (first row, offsets, terms, weights), to (an index's arrays, scale), in
    memory or as mapped files of a folder."""
    # Two passes, never with more than a piece in memory. The first counts how many documents hold each term,
    # which gives every list its place.
    counts, largest = torch.zeros(n_terms, dtype=torch.int64), 0.0
    for first, ends, terms, weights in pieces():
        check_weights(ends, terms, weights, n_terms, "document row", first, dtype)
        counts += torch.bincount(terms, minlength=n_terms)
        largest = max(largest, float(weights.max())) if len(weights) else largest
    scale = (largest or 1.0) / 255 if dtype == "int8" else 1.0
    starts = created(folder, "starts", (n_terms + 1,), torch.int64).copy_(F.pad(counts.cumsum(0), (1, 0)))
    all_rows = created(folder, "rows", (int(starts[-1]),), torch.int32)
    all_weights = created(folder, "weights", (int(starts[-1]),), DTYPES[dtype])

    # The second sorts each piece by term, and puts its runs behind those of the pieces before.
    filled = starts[:-1].clone()
    for first, ends, terms, weights in pieces():
        rows = torch.arange(first, first + len(ends) - 1, dtype=torch.int32).repeat_interleave(ends.diff())
        # Stable: within a list the rows stay ascending.
        terms, order = terms.sort(stable=True)
        rows, weights = rows.index_select(0, order), weights.index_select(0, order)
        # Added twice, a score would depend on the order of a GPU's threads.
        twice = (terms[1:] == terms[:-1]) & (rows[1:] == rows[:-1])
        if twice.any():
            row, term = int(rows[1:][twice][0]), int(terms[1:][twice][0])
            raise ValueError(f"document row {row} holds term {term} twice; add the weights up before")
        if dtype != "fp32":
            # A term that is there keeps some weight.
            stored = (weights / scale).round().clamp(1) if dtype == "int8" else weights.clamp(2**-24)
            weights = torch.where(weights > 0, stored, 0)
        # From a run's place in the piece to its place in the index.
        counts = torch.bincount(terms, minlength=n_terms)
        places = (filled - counts.cumsum(0) + counts).repeat_interleave(counts) + torch.arange(len(terms))
        # scatter_ does what [] would do, three times as fast.
        all_rows.scatter_(0, places, rows)
        all_weights.scatter_(0, places, weights.to(all_weights.dtype))
        filled += counts
    return (starts, all_rows, all_weights), scale


# Folders: arrays, ids and a manifest.

def created(folder: Path | None, name: str, shape: tuple, dtype: torch.dtype) -> Tensor:
    """A new mapped file, to fill through the tensor; without a folder, memory."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    file = Path(folder) / f"{name}.npy"
    # numpy has no bfloat16: its bits go as int16.
    kind = "int16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    array = np.lib.format.open_memmap(file, "w+", np.dtype(kind), tuple(shape))
    # Its room is taken now: on a full disk, writing through the map would be a deadly signal.
    with naming(file), open(file, "r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return torch.from_numpy(array).view(dtype)


def mapped(folder, name: str) -> Tensor:
    # "c", copy on write: torch warns of arrays that it may not write to, and nobody writes.
    return torch.from_numpy(np.load(Path(folder) / f"{name}.npy", mmap_mode="c"))


class Docids:
    def __init__(self, folder):
        # Mapped: an id is decoded when somebody asks for its row.
        self.array = np.load(Path(folder) / "docids.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> str:
        return self.array[row].decode()


def finish(folder: Path, arrays: tuple, manifest: dict, docids, vocab: list[str] | None = None) -> None:
    """Ids, vocabulary, and last the manifest: what the arrays are, and every file's size and checksum."""
    # All as long as the longest: an id is found by its row alone.
    ids = np.array([check_id(str(docid)).encode() for docid in docids], dtype=np.bytes_)
    np.save(folder / "docids.npy", ids)
    if vocab is not None:
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    shape = {"kind": "dense", "width": arrays[0].shape[-1]}
    if len(arrays) == 3:
        shape = {"kind": "sparse", "terms": len(arrays[0]) - 1, "postings": len(arrays[1])}
    dtype = next(name for name, dtype in DTYPES.items() if dtype == arrays[-1].dtype)
    files = {file.name: stamp(file) for file in sorted(folder.iterdir()) if file.is_file()}
    manifest = manifest | shape | {"dtype": dtype, "format": 2, "documents": len(ids), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def read_manifest(folder, full: bool = False) -> dict:
    """The manifest, after a look at every file: its size and time, and with `full` its checksum."""
    file, cure = Path(folder) / "manifest.json", "build or copy the index again"
    manifest = read_json(file, cure) if file.is_file() else {}
    if manifest.get("format") != 2:
        raise ValueError(f"{file}: missing, or of another version of index.py; {cure}")
    check_files(folder, manifest["files"], cure, full)
    return manifest


def vocabulary(folder) -> list[str]:
    """The names of a sparse index's terms."""
    return read_json(Path(folder) / "vocab.json", "build the index again")


def open_index(path, device="cpu") -> SparseIndex | DenseIndex:
    """The index in a folder, of whichever kind."""
    kind = SparseIndex if read_manifest(path)["kind"] == "sparse" else DenseIndex
    return kind.open(path, device)


# Ranks, and the model.

def join_ranks() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    rank, world = rank_and_world()
    if world > 1 and not dist.is_initialized():
        leave_with_parent()
        # Only lists travel. A week: rank 0 puts the index together while the others wait.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return rank, world


def exchange(mine=None) -> list:
    """What every rank gives, in their order, for every rank. All wait for the last one."""
    everyones = [mine] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyones, mine)
    return everyones


def own_device(device: str | None) -> str:
    """A GPU of this rank's own, where there are any."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def load(encoder: dict, device: str):
    """The Retriever that a manifest names."""
    # Here, since it brings transformers: seconds that others need not wait.
    from model import Retriever
    how = {key: encoder[key] for key in ("adapter", "base", "head", "attn") if encoder.get(key)}
    dtype = DTYPES[encoder.get("compute") or FAST.get(device[:4], "fp32")]
    r = Retriever.load(encoder["model"], **how, dtype=dtype, device=device)
    # Merged, an adapter costs one product a layer instead of three.
    return r.merge() if r.lora else r


def weights_of(r, encoder: dict) -> dict[str, str]:
    """Fingerprints of what a model's vectors depend on."""
    places = (encoder["model"], encoder["adapter"], r.settings["base"])
    return {place: fingerprint(place) for place in places if place}


# Build: passages -> shards -> one folder.

def build(model, corpus, out, adapter=None, base=None, head=None, dtype: str | None = None,
          top_terms: int | None = None, max_length: int | None = None, tokens_per_batch: int = 16384,
          shard_docs: int = 20_000, device=None, attn: str = "sdpa", compute: str | None = None) -> Path:
    """Encode every passage of `corpus` with `model` into the index folder `out`."""
    # As a path: with a slash at its end, the shards beside it would lie within.
    (rank, world), out, device = join_ranks(), Path(out), own_device(device)
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    # One holds the lock for all of them.
    with locked(out) if rank == 0 else contextlib.nullcontext():
        docs, shards = Corpus(corpus), Path(f"{out}.shards")
        # What it computes in is settled here: another machine may go on, and other queries come.
        encoder = {"kind": "model", "model": here(model), "adapter": here(adapter), "base": here(base),
                   "head": head, "attn": attn, "compute": compute or FAST.get(device[:4], "fp32")}
        r = load(encoder, device)
        # 8-bit codes of dense vectors come afterwards, from tools.codes.
        kind = SparseIndex if r.sparse else DenseIndex
        dtype = dtype or kind.dtypes[0]
        if dtype not in kind.dtypes:
            raise ValueError(f"--dtype {dtype}: a {kind.kind} index is stored as {', '.join(kind.dtypes)}")
        # The plan: what decides the content of a shard.
        plan = {"encoder": {**encoder, "head": r.head, "weights": weights_of(r, encoder)},
                "corpus": here(corpus), "state of the corpus": fingerprint(corpus), "dtype": dtype,
                "top_terms": top_terms, "max_length": max_length or r.settings["passage_length"],
                "shard_docs": shard_docs}
        # A shard is a fixed range of passages: any number of ranks can go on where others were killed. Rank 0
        # lists the gaps before any of them is filled; taken in turn, they are shared evenly.
        todo = exchange(missing(shards, plan, len(docs)) if rank == 0 else None)[0]
        encode_shards(r, docs, todo[rank::world], plan, tokens_per_batch)
        exchange()
        if rank == 0:
            put_together(r, docs, shards, plan, out)
        exchange()
    return out


def here(path) -> str | None:
    """A path as it holds from anywhere; a hub name as it is."""
    return os.path.abspath(path) if path and os.path.exists(path) else path and str(path)


def missing(shards: Path, plan: dict, n_docs: int) -> list[tuple[range, Path]]:
    """Passages that have no shard yet, and its file. What was begun must have had the same plan."""
    plan_file, size, anew = shards / "plan.json", plan["shard_docs"], f"remove {shards} to start anew"
    if not plan_file.exists():
        with write_whole(plan_file) as opened:
            json.dump(plan, opened, indent=1)
    # Shards of two models, or of two cuts, would make an index that is no one's.
    begun = read_json(plan_file, anew)
    for key, value in plan.items():
        if begun.get(key) != value:
            raise ValueError(f"{shards} was begun with {key} = {begun.get(key)!r}, now it is {value!r}; "
                             f"repeat the first command to go on, or {anew}")
    # A shard that stands is whole: it was renamed when it was written.
    shares = [range(n_docs)[first : first + size] for first in range(0, n_docs, size)]
    files = [(rows, shards / f"{rows.start:010d}.npz") for rows in shares]
    return [(rows, file) for rows, file in files if not file.exists()]


def encode_shards(r, docs: Corpus, todo: list, plan: dict, tokens_per_batch: int) -> None:
    """This rank's part of the work. A shard holds a matrix, or the three arrays of a CSR one."""
    from model import NotFinite
    n_docs = sum(len(rows) for rows, _ in todo)
    with tqdm(total=n_docs, unit=" passages", desc="encoding", disable=rank_and_world()[0] > 0) as bar:
        how = plan["max_length"], tokens_per_batch, plan["top_terms"], bar.update
        for rows, file in todo:
            try:
                reps = r.encode(docs.texts(rows), "passage", *how)
            except NotFinite as e:
                raise ValueError(f"passage {docs.docid(rows[e.place])!r}: {e}") from e
            arrays = csr_of(reps) if r.sparse else (reps,)
            with write_whole(file, "wb") as opened:
                np.savez(opened, *(array.numpy() for array in arrays))


def put_together(r, docs: Corpus, shards: Path, plan: dict, out) -> None:
    """The shards become an index folder, and go."""
    # What a search needs to know, and what tells a reader how the index came about.
    manifest = {**plan, "state of the corpus": fingerprint(docs.source)}

    def pieces() -> Iterator[tuple]:
        for file in sorted(shards.glob("*.npz")):
            with np.load(file) as arrays:
                yield int(file.stem), *map(torch.from_numpy, arrays.values())

    with new_folder(out) as aside:
        if r.sparse:
            tokens = r.tokenizer.convert_ids_to_tokens(list(range(r.width)))
            # Some terms only pad the embedding, and have no token.
            vocab = [token or f"[{term}]" for term, token in enumerate(tokens)]
            arrays, manifest["scale"] = invert(pieces, r.width, plan["dtype"], aside)
        else:
            vocab, arrays = None, [created(aside, "vectors", (len(docs), r.width), DTYPES[plan["dtype"]])]
            for first, some in pieces():
                arrays[0][first : first + len(some)] = some
        finish(aside, arrays, manifest, map(docs.docid, range(len(docs))), vocab)
    discard(shards)
    print(f"{out}: {len(docs):,} passages")


# Search: queries -> run.

def search(index, queries, k: int = 1000, out=None, model=None, encoder=None, batch: int = 64,
           query_length: int | None = None, device: str | None = None, threads: int | None = None,
           attn: str | None = None, opener: Callable = open_index) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}}, best first, for {qid: text} or a file of queries; with `out` a TREC run there
    instead. Rows of one id count once, by the best. `encoder`, `opener`: in the place of the index's own."""
    rank, world = join_ranks()
    if out is not None and Path(out).is_dir():
        raise ValueError(f"{out}: is a folder; --out names a file")
    queries = queries if isinstance(queries, dict) else read_queries(queries)
    device, manifest = own_device(device), read_manifest(index)
    # The model first: what it leaves of a GPU's memory decides whether the index fits.
    encoder = encoder or query_encoder(index, manifest, model, device, attn)
    ix, found, spent, writes = opener(index, device), {}, Counter(), out is not None and rank == 0
    # What does not fit is copied to the GPU for every batch. It may fit on some ranks only, but all take one
    # size: it says which queries are whose.
    batch = max(exchange(batch if ix.fits else 4096))
    everyone, tag = list(queries), Path(index).resolve().name.replace(" ", "_")
    if writes:
        # What another run cost is no note of this one.
        Path(f"{out}.json").unlink(missing_ok=True)
    with (write_whole(out) if writes else contextlib.nullcontext() as file,
          tqdm(total=len(everyone), unit=" queries", desc="searching", disable=rank > 0) as bar):
        # The ranks share the queries, a batch each; rank 0 has all hits, in the order of the queries.
        for first in range(0, len(everyone), world * batch):
            mine = {qid: queries[qid] for qid in everyone[first + rank * batch :][:batch]}
            hits = search_batch(ix, encoder, mine, k, query_length, threads, spent)
            began = time.time()
            # Each rank writes its own lines: at 1,000 a query that takes longer than to send them.
            for part in exchange(run_lines(hits, tag) if out else hits):
                if writes:
                    file.write(part)
                elif rank == 0:
                    found.update(part)
            spent["write"] += time.time() - began
            bar.update(min(world * batch, len(everyone) - first))
    if writes and Path(out).is_file():
        # For `python -m tools.compare --costs`. A pipe cannot be read again.
        with write_whole(f"{out}.json") as file:
            json.dump({**costs_of(manifest, spent, len(queries), k), "run": checksum(out)}, file)
    return found


def search_batch(ix, encoder, queries: dict[str, str], k: int, query_length, threads, spent: Counter) -> dict:
    """{qid: {docid: score}}, best first; `spent` is told what it cost."""
    sparse, began = ix.kind == "sparse", time.time()
    vectors = encoder.encode(list(queries.values()), "query", query_length)
    encoded = time.time()
    scores, rows = ix.search(vectors, k, threads=threads)
    hits = {qid: {} for qid in queries}
    for docs, best, places in zip(hits.values(), scores.tolist(), rows.tolist()):
        for row, score in zip(places, best):
            if row >= 0:
                # Rows may share an id, as a document's chunks do: the best comes first, and stays (maxP).
                docs.setdefault(ix.docids[row], score)
    spent.update(encode=encoded - began, search=time.time() - encoded, queries=len(queries),
                 terms=vectors._nnz() if sparse else 0)
    return hits


def run_lines(hits: dict[str, dict[str, float]], tag: str) -> str:
    lines = []
    for qid, docs in zip(map(check_qid, hits), hits.values()):
        lines += [f"{qid} Q0 {docid} {n} {score} {tag}\n" for n, (docid, score) in enumerate(docs.items(), 1)]
    return "".join(lines)


def query_encoder(index, manifest: dict, model=None, device: str = "cpu", attn: str | None = None):
    """The Retriever for an index's queries: that which it was built with, as it was then, or `model`."""
    built_with, kind = manifest.get("encoder") or {}, manifest["kind"]
    if built_with.get("kind") == "bm25":
        raise ValueError(f"{index} holds BM25 weights: python -m tools.bm25 search --index {index}")
    if not built_with and not model:
        raise ValueError(f"{index} was made from arrays and does not know its model: give --model")
    # An index knows its model; another one may encode the queries, if it has the same head and width.
    other = {"head": kind} | built_with | {"model": model, "adapter": None, "base": None}
    chosen = other if model else built_with
    r = load(chosen | ({"attn": attn} if attn else {}), device)
    # Queries encoded by other weights than the passages would get scores that mean nothing.
    if not model and weights_of(r, chosen) != chosen["weights"]:
        raise ValueError(f"{chosen['model']} has changed since {index} was built with it: build the index "
                         "again, or give --model to search with what is there now")
    width = manifest["terms" if kind == "sparse" else "width"]
    if (r.sparse, r.width) != (kind == "sparse", width):
        raise ValueError(f"{chosen['model']} is {r.head}, {r.width} wide; {index} is {kind}, {width} wide")
    return r


def costs_of(manifest: dict, spent: Counter, n: int, k: int) -> dict:
    """What a run cost, in milliseconds a query, terms and bytes; a line says so."""
    # Rank 0's clock over everyone's queries: that is what a query costs with so many ranks.
    ms = {part: 1000 * spent[part] / max(1, n) for part in ("encode", "search", "write")}
    costs = {"ms_per_query": sum(ms.values()), "ms": ms, "k": k, "documents": manifest["documents"],
             "index_bytes": sum(size for size, _, _ in manifest["files"].values())}
    if manifest["kind"] == "sparse":
        costs["nnz_queries"] = spent["terms"] / max(1, spent["queries"])
        costs["nnz_docs"] = manifest["postings"] / max(1, manifest["documents"])
    parts = ", ".join(f"{part} {value:.2f}" for part, value in ms.items())
    print(f"{n:,} queries x {costs['documents']:,} documents, k {k}: {costs['ms_per_query']:.2f} ms a query "
          f"({parts})")
    return costs


# The command line.

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    common = dict(allow_abbrev=False, formatter_class=Help)

    add = commands.add_parser("build", help="encode a corpus, or go on after a kill", **common).add_argument
    add("--model", required=True, help="run folder, adapter folder or hub name")
    add("--corpus", required=True, help="collection.tsv, corpus.jsonl or a BEIR folder")
    add("--out", required=True, help="folder to make")
    add("--adapter", help="PEFT adapter on top of --model")
    add("--base", help="of an adapter, if it is not where its adapter_config.json says")
    add("--head", help="sparse or dense, if the checkpoint does not say")
    add("--max_length", type=positive_int, help="tokens of a passage, if not the checkpoint's own")
    add("--dtype", help="stored: fp32 (sparse's default), fp16 (dense's), bf16 (dense), int8 (sparse)")
    add("--top_terms", type=positive_int, help="sparse: keep a passage's heaviest terms")
    add("--tokens_per_batch", type=positive_int, default=16384, help="halve it if memory runs out")
    add("--shard_docs", type=positive_int, default=20_000, help="passages that a kill can cost")
    add("--device", help="cuda where there is one, else cpu")
    add("--attn", default="sdpa", help="or eager, or flash_attention_2")
    add("--compute", choices=["fp32", "bf16"], help="bf16 on cuda and fp32 on a CPU without it")

    add = commands.add_parser("search", help="queries to a TREC run, exactly", **common).add_argument
    add("--index", required=True)
    add("--queries", required=True, help="tsv, jsonl or a BEIR folder")
    add("--out", required=True, help="run file to write")
    add("--k", type=positive_int, default=1000)
    add("--model", help="encode queries with this one instead of the index's own")
    add("--query_length", type=positive_int, help="tokens of a query, if not the checkpoint's own")
    add("--batch", type=positive_int, default=64, help="queries encoded at once")
    add("--threads", type=positive_int, help="on a CPU: queries at once (sparse), or of a product (dense)")
    add("--device", help="cuda where there is one, else cpu")
    add("--attn", help="(as the index was built)")
    args = vars(parser.parse_args(argv))
    name = args.pop("command")
    call = {"build": build, "search": search}[name]
    try:
        run_command(f"{parser.prog} {name}", functools.partial(call, **args))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
