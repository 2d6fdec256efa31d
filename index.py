"""Encode a corpus, and search it exactly.

    torchrun --nproc_per_node=4 index.py build --model runs/sp-1b --corpus collection.tsv --out indexes/sp-1b    # killed? the same line goes on
    python index.py search --index indexes/sp-1b --queries queries.dev.tsv --k 1000 --out runs/sp-1b/dev.trec

What surprises:
- An inverted index is a sparse matrix, terms x documents, and nothing else: `SparseIndex.matrix` is a torch CSR tensor over memory-mapped
  files, and searching is adding up a few of its rows.
- A sparse score is the float32 sum of float32 products, in the order of the term ids, whatever the device, the threads or the ranks: the same
  bits. A document is found if its score is above zero, that is, if it shares a term with the query. A dense score is what the processor's matrix
  product makes of it, to the last bits. Equal scores are ordered by document row.
- Weights must be finite and not negative; NaN is refused at the door, not found later in a ranking.
- Opening an index compares sizes and times; only a file with another time than the manifest's is read through for its checksum. `verify` reads all.
"""
import argparse
import datetime
import functools
import json
import math
import mmap
import os
import shutil
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Corpus, Help, new_folder, read_queries, write_run, write_whole

PIECE = 1 << 21  # postings in memory at once where all of them pass by: 100 MB, and fastest to invert while a cache still half holds them
STEP = 1 << 22  # upper bounds in memory at once: 16 MB
BLOCK = 256  # scores of which the search for the k best first looks at the largest only
CHUNK = 1 << 14  # documents whose dense scores are in memory at once: 128 x CHUNK scores for a batch of 128 queries, and for a smaller one no more
TILE = 2048  # documents in one dense product on a CPU, whose cache then holds them for all queries
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.uint8}

# The k best.


def candidates(scores: Tensor, k: int, bar: Tensor, near: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, score) of the scores (B, N) that reach their row's bar (B,) and can be among its k best; within a row the columns ascend.
    Where k blocks have a maximum of at least x, k scores are at least x, so x is a bar, too, and only the blocks that reach it need a look: a
    pass for the maxima takes a tenth of torch.topk's time over a million scores, which is as long as adding them up was."""
    N = scores.shape[1]
    size = min(BLOCK, 2 ** (max(1, N // (4 * k)).bit_length() - 1))      # 4k blocks and more: a good bar, and few maxima to sort
    if N % size:
        scores = F.pad(scores, (0, -N % size), value=-math.inf)
    blocks = scores.unflatten(1, (-1, size))                             # (B, n, size)
    maxima = blocks.amax(2)
    if not near and maxima.shape[1] > k:
        bar = torch.maximum(bar, maxima.topk(k, sorted=False).values.amin(1))
    b, block = (maxima >= bar[:, None]).nonzero(as_tuple=True)
    scores = blocks[b, block]
    hit, column = (scores >= bar[b, None]).nonzero(as_tuple=True)
    return b[hit], block[hit] * size + column, scores[hit, column]


def top_k(scores: Tensor, k: int, above: Tensor, near: bool = False) -> tuple[Tensor, Tensor]:
    """The k best of every row that are greater than `above` (B,): scores (B, k), best first, and their columns (B, k), the lower column first
    among equals, padded with -inf and -1. `near`: few scores are greater than `above`, so that no better bar is worth a search."""
    if not scores.numel():
        return nothing(len(scores), k, scores.device)
    return ranked(*candidates(scores, k, torch.nextafter(above, torch.full_like(above, math.inf)), near), len(scores), k)


def nothing(B: int, k: int, device) -> tuple[Tensor, Tensor]:
    """Top-k lists before anything is found."""
    return torch.full((B, k), -math.inf, device=device), torch.full((B, k), -1, device=device)


def ranked(b: Tensor, column: Tensor, scores: Tensor, B: int, k: int) -> tuple[Tensor, Tensor]:
    """Triples, in the order of their rows b and columns, to lists (B, k) as top_k's."""
    scores, order = scores.sort(descending=True, stable=True)            # stable: equals stay in the order of their columns
    b, column = b[order], column[order]
    if B == 1:
        spare = max(0, k - len(scores))
        return F.pad(scores[:k], (0, spare), value=-math.inf)[None], F.pad(column[:k], (0, spare), value=-1)[None]
    b, order = b.sort(stable=True)
    scores, column = scores[order], column[order]
    hits = b.bincount(minlength=B)
    place = torch.arange(len(b), device=b.device) - (hits.cumsum(0) - hits)[b]
    b, place, scores, column = (x[place < k] for x in (b, place, scores, column))
    best, columns = nothing(B, k, b.device)
    best[b, place], columns[b, place] = scores, column
    return best, columns


def merge(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The top-k lists of ranges of documents, in the order of the ranges, become one. The sort is stable: among equals the lower row stays first."""
    scores, rows = (torch.cat(lists, 1) for lists in zip(*parts))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], rows.gather(1, order[:, :k])


# The two indexes: made from arrays, searched, saved to a folder and opened again.


class SparseIndex:
    """Row t of `matrix` (terms x documents) lists the documents that hold term t, ascending, and their weights.

    >>> ix = SparseIndex.from_csr([0, 2, 3], [0, 2, 2], [1.0, 0.5, 2.0], n_terms=3)   # document 0: terms 0 and 2; document 1: term 2
    >>> ix.search(([0, 1], [2], [1.0]), k=2)                                          # one query, term 2
    (tensor([[2.0000, 0.5000]]), tensor([[1, 0]]))
    """

    def __init__(self, matrix: Tensor, docids=None, manifest: dict | None = None, device="cpu"):
        self.n_terms, self.n_docs = matrix.shape
        self.matrix, self.device = matrix, torch.device(device)
        self.docids = range(self.n_docs) if docids is None else docids  # row -> id
        self.manifest = manifest or {}
        self.scale = self.manifest.get("scale", 1.0)                    # of 8-bit impacts; else 1
        self.starts = matrix.crow_indices().tolist()                    # Python ints: no tensor arithmetic between the postings
        self.places = self.n_docs + -self.n_docs % BLOCK                # of scores: the last are nobody's, and stay zero
        self.n_parts = 1
        if self.device.type == "cuda":
            bytes_held = len(self.rows) * (self.rows.element_size() + self.weights.element_size())
            self.n_parts = math.ceil(bytes_held / (0.7 * torch.cuda.mem_get_info(self.device)[0]))
            if self.n_parts <= 1:
                self.matrix = matrix.to(self.device)

    @property
    def streamed(self) -> bool:
        """Larger than the GPU, so that every search copies all of it there, a part at a time?"""
        return self.n_parts > 1

    @property
    def rows(self) -> Tensor:
        return self.matrix.col_indices()

    @property
    def weights(self) -> Tensor:
        return self.matrix.values()

    @classmethod
    def from_csr(cls, indptr, indices, values, n_terms: int, docids=None, device="cpu", dtype: str = "fp32") -> "SparseIndex":
        """From documents x terms in CSR (numpy or torch)."""
        indptr, indices, values = torch.as_tensor(indptr).long(), torch.as_tensor(indices), torch.as_tensor(values)

        def pieces():
            lo, n = 0, len(indptr) - 1
            while lo < n:
                hi = max(lo + 1, int(torch.searchsorted(indptr, int(indptr[lo]) + PIECE, right=True)) - 1)
                s, e = int(indptr[lo]), int(indptr[hi])
                yield lo, indptr[lo:hi + 1] - s, indices[s:e], values[s:e]
                lo = hi

        arrays, scale = invert(pieces, n_terms, dtype, lambda name, shape, kind: torch.empty(shape, dtype=kind))
        return cls(csr(arrays, n_terms, len(indptr) - 1), docids, {"scale": scale}, device)

    def search(self, queries, k: int = 1000, threads: int | None = None) -> tuple[Tensor, Tensor]:
        """queries: CSR (indptr, indices, values). The k best documents of each: scores (Q, k) and rows (Q, k), padded with -inf and -1.
        On a CPU, `threads` queries at a time, each on one core."""
        queries = self._split(queries)
        if self.streamed:  # once for all the queries
            found = []
            for i in range(self.n_parts):
                part, lo = self.part(i, self.n_parts, self.device)
                scores, rows = part._search_gpu(queries, k)
                found.append((scores, torch.where(rows < 0, rows, rows + lo)))
            return merge(found, k)
        return self._search_gpu(queries, k) if self.device.type == "cuda" else self._search_cpu(queries, k, threads or torch.get_num_threads())

    def _split(self, queries) -> list[list[tuple[int, float]]]:
        """CSR -> for each query its (term, weight), ascending: the one order in which every search adds."""
        if isinstance(queries, Tensor):
            queries = queries.crow_indices(), queries.col_indices(), queries.values()
        indptr, terms, weights = queries
        terms, weights = check_vectors(terms, weights, self.n_terms, lambda i: f"query {int(np.searchsorted(indptr, i, side='right')) - 1}")
        ends, terms, weights = torch.as_tensor(indptr).tolist(), terms.tolist(), (weights.float() * self.scale).tolist()
        return [sorted((t, w) for t, w in zip(terms[s:e], weights[s:e]) if w > 0) for s, e in zip(ends, ends[1:])]

    def _search_cpu(self, queries, k, threads):
        rows, weights = self.rows, self.weights

        def run(worker):
            if threads > 1:
                torch.set_num_threads(1)  # of this thread: the cores are busy with other queries
            scores, zero, found = torch.empty(self.places), torch.zeros(1), {}
            for q in range(worker, len(queries), threads):
                scores.zero_()
                for t, w in queries[q]:
                    # A contiguous slice of ids and one of weights: nothing in torch adds scattered numbers faster, 2 ns each
                    s, e = self.starts[t], self.starts[t + 1]
                    scores.index_add_(0, rows[s:e], weights[s:e].float(), alpha=w)
                found[q] = top_k(scores[None], k, zero)
            return found

        if threads == 1:
            found = run(0)
        else:
            before, found = torch.get_num_threads(), {}
            with ThreadPoolExecutor(threads) as pool:  # index_add_ lets go of Python's lock
                for part in pool.map(run, range(threads)):
                    found |= part
            torch.set_num_threads(before)
        return gathered([found[q] for q in range(len(queries))], k)

    def _search_gpu(self, queries, k, batch: int = 16):
        """A batch at a time: the i-th terms of all its queries are added by one kernel, for 40 launches a query would take longer than their
        work. Within one kernel every (query, document) gets at most one addition, so that atomics cannot reorder anything. The places of
        postings and scores are of the rows' type, int32: what they read and write is most of the work."""
        rows, weights, device, found = self.rows, self.weights, self.matrix.device, []
        batch = max(1, min(batch, torch.iinfo(rows.dtype).max // max(1, self.places)))
        whole = functools.partial(torch.tensor, dtype=rows.dtype)
        for lo in range(0, len(queries), batch):
            some = queries[lo:lo + batch]
            scores = torch.zeros(len(some), self.places, device=device)
            for i in range(max(map(len, some))):
                q, t, w = zip(*((q, *terms[i]) for q, terms in enumerate(some) if i < len(terms)))
                start, end = whole([self.starts[x] for x in t]), whole([self.starts[x + 1] for x in t])
                length = end - start
                shift = start - (length.cumsum(0, dtype=rows.dtype) - length)  # place among the concatenated lists -> place in the index
                total, to = int(length.sum()), whole(q) * self.places
                shift, length, to, w = (x.to(device) for x in (shift, length, to, torch.tensor(w)))
                owner = torch.repeat_interleave(length, output_size=total)
                at = torch.arange(total, dtype=rows.dtype, device=device) + shift.index_select(0, owner)
                scores.view(-1).index_add_(0, rows.index_select(0, at) + to.index_select(0, owner),
                                           weights.index_select(0, at).float() * w.index_select(0, owner))
            best, columns = top_k(scores, k, scores.new_zeros(len(some)))
            found.append((best.cpu(), columns.cpu()))
        return gathered(found, k)

    def within(self, lo: int, hi: int) -> Tensor:
        """Places of the postings of documents lo to hi. It passes over the whole index: for ranks and exports, not for queries."""
        places = [s + ((rows >= lo) & (rows < hi)).nonzero()[:, 0] for s, rows in zip(range(0, len(self.rows), PIECE), self.rows.split(PIECE))]
        return torch.cat(places or [torch.zeros(0, dtype=torch.int64)])

    def part(self, i: int, n: int, device="cpu") -> tuple["SparseIndex", int]:
        """The i-th of n ranges of documents as an index of its own, and the range's first row."""
        lo, hi = self.n_docs * i // n, self.n_docs * (i + 1) // n
        at = self.within(lo, hi)
        indptr = torch.searchsorted(at, self.matrix.crow_indices())      # how many of the places kept lie before each list
        matrix = csr((indptr, self.rows[at] - lo, self.weights[at]), self.n_terms, hi - lo)
        return SparseIndex(matrix, None, self.manifest, device), lo

    def documents(self, lo: int, hi: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(row, its terms, their weights) of documents lo to hi: the transpose, a range at a time."""
        at = self.within(lo, hi)
        terms = torch.searchsorted(self.matrix.crow_indices(), at.to(self.rows.dtype), right=True) - 1
        rows, order = self.rows[at].sort(stable=True)                    # stable: within a document the terms stay ascending
        ends = torch.searchsorted(rows, torch.arange(lo, hi + 1, dtype=rows.dtype)).tolist()
        terms, weights = terms[order], self.weights[at][order].float() * self.scale
        for row, s, e in zip(range(lo, hi), ends, ends[1:]):
            yield row, terms[s:e], weights[s:e]

    def save(self, path) -> Path:
        """Into a folder, whole or not at all."""
        with new_folder(path) as aside:
            for name, array in zip(("indptr", "rows", "weights"), (self.matrix.crow_indices(), self.rows, self.weights)):
                np.save(aside / f"{name}.npy", array.cpu().numpy())
            manifest = self.manifest | {"kind": "sparse", "terms": self.n_terms, "postings": len(self.rows), "scale": self.scale}
            finish(aside, manifest, self.docids, self.n_docs)
        return Path(path)

    @classmethod
    def open(cls, path, device="cpu") -> "SparseIndex":
        manifest = read_manifest(path, "sparse")
        arrays = [mapped(path, name) for name in ("indptr", "rows", "weights")]
        return cls(csr(arrays, manifest["terms"], manifest["documents"]), Docids(path), manifest, device)


class DenseIndex:
    """One row of `vectors` (documents x dimensions; fp32, fp16 or bf16, all of them multiplied in fp32) a document. With codes=Codes.of(vectors)
    8-bit products find the candidates and the vectors decide, on a CPU that multiplies bytes fast: exact all the same, and up to twice as fast."""

    def __init__(self, vectors, docids=None, manifest: dict | None = None, device="cpu", codes: "Codes | None" = None):
        self.vectors, self.device, self.codes = torch.as_tensor(vectors), torch.device(device), codes
        if self.vectors.ndim != 2:
            raise ValueError(f"vectors have shape {tuple(self.vectors.shape)}, expected (documents, dimensions)")
        self.n_docs, self.width = self.vectors.shape
        self.docids = range(self.n_docs) if docids is None else docids
        self.manifest = manifest or {}
        if self.device.type == "cuda" and self.vectors.nbytes < 0.7 * torch.cuda.mem_get_info(self.device)[0]:
            self.vectors = self.vectors.to(self.device)  # else `search` brings chunk after chunk there
        self.streamed = self.vectors.device.type != self.device.type

    def search(self, queries, k: int = 1000, batch: int = 128) -> tuple[Tensor, Tensor]:
        """queries (Q, dimensions). The k best documents of each by dot product: scores (Q, k) and rows (Q, k), padded with -inf and -1."""
        queries = torch.as_tensor(queries).detach().float()
        if queries.shape[1] != self.width or not torch.isfinite(queries).all():
            raise ValueError(f"queries of shape {tuple(queries.shape)} must be finite and {self.width} wide, as the index is")
        search = self._search_coded if self.uses_codes(k) and len(queries) else self._search_whole
        batch = 4096 if self.streamed else batch                         # more arithmetic for every chunk that is copied
        return gathered([search(some, k) for some in queries.split(batch)], k)

    def uses_codes(self, k: int) -> bool:
        """To look a candidate up costs as much as some hundred products, so a small collection is searched faster without codes. Its size is that of
        all parts, for every rank must search in the same way."""
        large = self.manifest.get("documents", self.n_docs) >= 500 * k
        return self.codes is not None and large and self.device.type == "cpu" and multiplies_bytes()

    def _search_whole(self, queries, k):
        queries = queries.to(self.device)
        best = nothing(len(queries), k, self.device)
        step = CHUNK * max(1, 64 // max(1, len(queries)))
        for lo in range(0, self.n_docs, step):
            scores = products(queries, self.vectors[lo:lo + step])       # (B, step)
            if not scores.sum().isfinite() and not scores.isfinite().all():  # a sum is the cheaper look, though finite numbers may overflow it
                bad = lo + int((~scores.isfinite()).nonzero()[0, 1])
                raise ValueError(f"document row {bad} ({self.docids[bad]}) holds NaN or infinity; did its model's training diverge?")
            # The k-th best so far is the bar. Not to exceed it is not to enter: an equal score of a later row loses.
            new, rows = top_k(scores, k, best[0][:, -1], near=lo >= 4 * k)
            width = int((rows >= 0).sum(1).amax())
            if width:
                best = merge([best, (new[:, :width], torch.where(rows < 0, rows, rows + lo)[:, :width])], k)
        return best[0].cpu(), best[1].cpu()

    def _search_coded(self, queries, k):
        """Upper bounds for all documents, from 8-bit products; the vectors only of those whose bound reaches the k-th best score so far."""
        B, exactly = len(queries), queries.double()                      # in 64 bits the order of the additions does not show
        bounds_of, in_units = self.codes.bounds(queries)

        def scored(b, rows):
            found = [torch.zeros(0)]
            for query, mine in zip(exactly, rows.split(b.bincount(minlength=B).tolist())):
                found += [(self.vectors.index_select(0, some).double() @ query).float() for some in mine.split(64)]
            return torch.cat(found)

        best = nothing(B, k, self.device)
        for lo in range(0, self.n_docs, STEP // B):
            bounds, bar = bounds_of(lo, min(lo + STEP // B, self.n_docs)), best[0][:, -1]
            if lo == 0 and bounds.shape[1] >= k:                         # the documents with the k highest bounds give a first bar
                rows = top_k(bounds, k, bar)[1]
                bar = scored(torch.arange(B).repeat_interleave(k), rows.flatten()).view(B, k).amin(1)
            b, column, _ = candidates(bounds, k, in_units(bar), near=True)
            rows = column + lo
            best = merge([best, ranked(b, rows, scored(b, rows), B, k)], k)
        return best

    def part(self, i: int, n: int, device="cpu") -> tuple["DenseIndex", int]:
        """The i-th of n ranges of documents, cut between chunks, so that every product has the shape that it has in one process."""
        chunks = -(-self.n_docs // CHUNK)
        lo, hi = (min(self.n_docs, chunks * j // n * CHUNK) for j in (i, i + 1))
        codes = self.codes and Codes(self.codes.codes[lo:hi], self.codes.parts[lo:hi], self.codes.centre)
        return DenseIndex(self.vectors[lo:hi], None, self.manifest, device, codes), lo

    def save(self, path) -> Path:
        """Into a folder, whole or not at all."""
        with new_folder(path) as aside:
            dtype = next((name for name, dtype in DTYPES.items() if dtype == self.vectors.dtype), None)
            if dtype not in ("fp32", "fp16", "bf16"):
                raise ValueError(f"vectors are {self.vectors.dtype}; a dense index holds fp32, fp16 or bf16")
            created(aside, "vectors", self.vectors.shape, self.vectors.dtype).copy_(self.vectors)
            for name, array in vars(self.codes).items() if self.codes else ():
                created(aside, name, array.shape, array.dtype).copy_(array)
            manifest = {"kind": "dense", "dtype": dtype, "width": self.width, "coded": bool(self.codes)}
            finish(aside, self.manifest | manifest, self.docids, self.n_docs)
        return Path(path)

    @classmethod
    def open(cls, path, device="cpu") -> "DenseIndex":
        manifest = read_manifest(path, "dense")
        vectors = mapped(path, "vectors")
        codes = Codes(*(mapped(path, name) for name in ("codes", "parts", "centre"))) if manifest.get("coded") else None
        return cls(vectors.view(torch.bfloat16) if manifest["dtype"] == "bf16" else vectors, Docids(path), manifest, device, codes)


def products(queries: Tensor, vectors: Tensor) -> Tensor:
    """queries (B, D) times vectors (N, D), in fp32, on the queries' device. On a CPU tile by tile,
    and by oneDNN: on AMD's it is 1.2 to 3 times as fast as `@`, which is MKL. A single query is multiplied as a batch of small matrices, since
    both libraries read memory at two thirds of its speed when they multiply a matrix by a vector."""
    if queries.is_cuda or not torch.backends.mkldnn.is_available():
        return torch.cat([queries @ piece.to(queries.device).float().T for piece in vectors.split(CHUNK)], 1)
    blocked, found = queries.to_mkldnn(), []
    for piece in vectors.split(TILE):
        piece = piece.float()
        if len(queries) == 1 and len(piece) % 64 == 0:
            found.append(torch.bmm(piece.unflatten(0, (-1, 64)), queries.T.expand(len(piece) // 64, -1, 1)).view(1, -1))
        else:
            found.append(F.linear(blocked, piece).to_dense())
    return torch.cat(found, 1)


class Codes:
    """Vectors in 8 bits: x = centre + scale * code + rest. So q.x = q.centre + scale * q.code + q.rest, and the last is at most |q| |rest|.

    `parts` (N, 3) holds each document's scale, |rest| and |scale * code|; the centre is any vector in the middle, to make the codes fine."""

    def __init__(self, codes: Tensor, parts: Tensor, centre: Tensor):
        self.codes, self.parts, self.centre = codes, parts, centre

    @classmethod
    def of(cls, vectors: Tensor, make=lambda name, shape, dtype: torch.empty(shape, dtype=dtype)) -> "Codes":
        """`make` as in `invert`. A tenth of a percent on the two lengths covers the rounding of their sums."""
        n, width = vectors.shape
        codes, parts, centre = make("codes", (n, width), torch.int8), make("parts", (n, 3), torch.float32), make("centre", (width,), torch.float32)
        centre.copy_(vectors[::max(1, n // 10_000)].float().mean(0) if n else torch.zeros(width))
        for lo in range(0, n, TILE):
            x = vectors[lo:lo + TILE].float()
            if not x.isfinite().all():
                raise ValueError(f"document row {lo + int((~x.isfinite()).nonzero()[0, 0])} holds NaN or infinity; did its model's training diverge?")
            x = x - centre
            scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
            coded = (x / scale).round_()
            codes[lo:lo + TILE] = coded
            coded *= scale
            parts[lo:lo + TILE] = torch.cat([scale, 1.001 * (x - coded).norm(dim=1, keepdim=True), 1.001 * coded.norm(dim=1, keepdim=True)], 1)
        return cls(codes, parts, centre)

    def bounds(self, queries: Tensor):
        """The query is coded, too, q = unit * code + rest, and so |q.x - q.centre - unit * scale * code.code| <= |q| |x's rest| + |q's rest| |scale * code|.
        Two functions: one gives upper bounds of the scores less q.centre, in the query's units; the other, what a score is in them."""
        unit = (queries.abs().amax(1) / 127).clamp(min=1e-30)
        coded = (queries / unit[:, None]).round()
        length, rest = queries.norm(dim=1), (queries - unit[:, None] * coded).norm(dim=1)
        slack = torch.stack([1.001 * length, 1.001 * rest + 1e-5 * length]) / unit  # (2, B); 1e-5 is more than fp32 rounds off below
        middle = queries.double() @ self.centre.double()
        coded, memory = coded.to(torch.int8).T, torch.empty(len(queries), min(STEP // len(queries), len(self.codes)))

        def bounds_of(lo, hi):
            for first in range(lo, hi, TILE):
                some = slice(first, min(first + TILE, hi))
                products = torch._int_mm(self.codes[some], coded) * self.parts[some, :1]
                memory[:, some.start - lo:some.stop - lo] = products.addmm_(self.parts[some, 1:], slack).T
            return memory[:, :hi - lo]

        return bounds_of, lambda scores: ((scores.double() - middle) / unit).float()


@functools.cache
def multiplies_bytes() -> bool:
    """Does this processor multiply bytes fast (AVX-512), and rightly (VNNI)? Without VNNI torch._int_mm adds pairs in 16 bits, which overflow."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    most = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most) == 64 * 127 * 127).all())


def csr(arrays, n_terms: int, n_docs: int) -> Tensor:
    """(offsets, rows, weights) as a torch tensor, without a copy. torch wants offsets and rows of one type: int32 up to 2^31 postings (MS MARCO
    has 1.1e9), and int64 beyond, where a posting then takes 12 bytes instead of 8."""
    indptr, rows, weights = arrays
    with warnings.catch_warnings(action="ignore"), torch.sparse.check_sparse_tensor_invariants(False):  # "beta"; a check would read every mapped page
        return torch.sparse_csr_tensor(indptr.to(rows.dtype), rows, weights, (n_terms, n_docs))


def gathered(found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat(x) for x in zip(*found)) if found else (torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64))


def check_vectors(terms, weights, n_terms: int, name) -> tuple[Tensor, Tensor]:
    """Refuse a term beyond the vocabulary and a weight that is NaN, infinite or negative. `name(i)` says whose the i-th entry is."""
    terms, weights = torch.as_tensor(terms), torch.as_tensor(weights)
    if len(terms) and not (terms.min() >= 0 and terms.max() < n_terms and weights.min() >= 0 and weights.max() < math.inf):  # NaN fails them all
        for bad, what in (((terms < 0) | (terms >= n_terms), f"outside the vocabulary of {n_terms} terms"),
                          (~((weights >= 0) & (weights < math.inf)), "and weights must be finite and not negative")):
            if bad.any():
                i = int(bad.nonzero()[0])
                raise ValueError(f"{name(i)}: term {int(terms[i])} with weight {float(weights[i])}, {what}")
    return terms, weights


def invert(pieces, n_terms: int, dtype: str, make) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Documents x terms, in pieces of (first row, offsets, terms, weights), to terms x documents: ((offsets, rows, weights), scale).

    Two passes, and never more than a piece in memory: count every term's documents, which gives each list its place; then sort each
    piece by term and put its runs behind those of the pieces before. `make(name, shape, dtype)` gives memory, or a mapped file.
    """
    counts, top = torch.zeros(n_terms, dtype=torch.int64), 0.0
    for first, ends, terms, weights in pieces():
        check_vectors(terms, weights, n_terms, lambda i: f"document row {first + int(torch.searchsorted(ends, i, right=True)) - 1}")
        counts += torch.bincount(terms, minlength=n_terms)
        top = max(top, float(weights.max())) if len(weights) else top
    indptr = F.pad(counts.cumsum(0), (1, 0))
    total = int(indptr[-1])
    kind = torch.int32 if total < 2**31 else torch.int64
    all_rows, all_weights = make("rows", (total,), kind), make("weights", (total,), DTYPES[dtype])
    scale, cursor = (top or 1.0) / 255 if dtype == "int8" else 1.0, indptr[:-1].clone()
    for first, ends, terms, weights in pieces():
        rows = torch.repeat_interleave(torch.arange(first, first + len(ends) - 1, dtype=kind), ends.diff())
        terms, order = terms.sort(stable=True)                           # stable: within a list the rows stay ascending
        rows = rows.index_select(0, order)
        if (twice := (terms[1:] == terms[:-1]) & (rows[1:] == rows[:-1])).any():
            raise ValueError(f"document row {int(rows[1:][twice][0])} holds term {int(terms[1:][twice][0])} twice; add the weights up before")
        counts = torch.bincount(terms, minlength=n_terms)
        at = (cursor - (counts.cumsum(0) - counts)).repeat_interleave(counts) + torch.arange(len(terms))
        weights = (weights / scale).round().clamp(1) if dtype == "int8" else weights
        all_rows.scatter_(0, at, rows)                                   # what [] would do, three times as fast
        all_weights.scatter_(0, at, weights.to(all_weights.dtype).index_select(0, order))
        cursor += counts
    return (indptr, all_rows, all_weights), scale


# Folders: arrays, ids and a manifest.


class Docids:
    """Row -> id, over a mapped text file with an id a line."""

    def __init__(self, folder):
        self.ends = np.load(Path(folder) / "docids.npy", mmap_mode="r")
        with open(Path(folder) / "docids.txt", "rb") as file:
            self.blob = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self.ends) else b""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        return self.blob[int(self.ends[row - 1]) if row else 0:int(self.ends[row]) - 1].decode()

    def index(self, docid: str) -> int:
        line = f"{docid}\n".encode()
        at = 0 if self.blob[:len(line)] == line else self.blob.find(b"\n" + line) + 1
        if not at and self.blob[:len(line)] != line:
            raise ValueError(f"the index holds no document {docid!r}")
        return int(np.searchsorted(self.ends, at, side="right"))


def finish(folder: Path, manifest: dict, docids, n_docs: int, vocab: list[str] | None = None):
    """Ids, vocabulary, and last the manifest: what the index is, and size, time and checksum of every file."""
    ends, end = np.zeros(n_docs, np.int64), 0
    with open(folder / "docids.txt", "wb") as file:
        for row, docid in enumerate(docids):
            end += file.write(f"{docid}\n".encode())
            ends[row] = end
    np.save(folder / "docids.npy", ends)
    if vocab is not None:
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    files = {f.name: stamp(f) for f in sorted(folder.iterdir()) if f.is_file()}
    for name in files:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())  # else a power cut after the rename can leave the name and not the bytes
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1, "documents": n_docs, "files": files}, indent=1))


def stamp(file: Path) -> dict:
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return {"bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns, "crc32": crc}


def read_manifest(folder, kind: str | None = None, full: bool = False) -> dict:
    """The manifest, after a look at every file: another size is refused; another time (edited? or only copied?) has the checksum computed, at
    2 GB/s, and another checksum is refused. Damage that keeps size and time is found with `full`, which `verify` asks for."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder}: no manifest.json here, so no index; make one with `index.py build` or `tools.bm25 build`")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, was in manifest["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; build or copy the index again")
        now = (folder / name).stat()
        if now.st_size != was["bytes"]:
            raise ValueError(f"{folder / name}: {now.st_size:,} bytes, the manifest says {was['bytes']:,}; build or copy the index again")
        if (full or now.st_mtime_ns != was["mtime_ns"]) and stamp(folder / name)["crc32"] != was["crc32"]:
            raise ValueError(f"{folder / name}: altered since it was built (checksum differs); build or copy the index again")
    if kind and manifest["kind"] != kind:
        raise ValueError(f"{folder} is a {manifest['kind']} index, not a {kind} one")
    return manifest


def mapped(folder, name: str) -> Tensor:
    return torch.from_numpy(np.load(Path(folder) / f"{name}.npy", mmap_mode="c"))  # "c": torch warns of arrays it may not write to; nobody writes


def created(folder: Path, name: str, shape: tuple, dtype: torch.dtype) -> Tensor:
    """A new mapped file, to fill through the tensor."""
    kind = "uint16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")  # numpy has no bfloat16: its bits go as uint16
    array = torch.from_numpy(np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(kind), tuple(shape)))
    return array.view(dtype) if dtype == torch.bfloat16 else array


def open_index(path, device="cpu"):
    return {"sparse": SparseIndex, "dense": DenseIndex}[read_manifest(path)["kind"]].open(path, device)


# Build: passages -> shards -> one folder.


def processes() -> tuple[int, int]:
    """(rank, world), from torchrun's environment; alone, (0, 1). gloo: only top-k lists travel. A week: rank 0 merges alone, the others wait."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return rank, world


def barrier():
    if dist.is_initialized():
        dist.barrier()


def own_device(device: str | None) -> str:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def load(encoder: dict, device: str) -> "Retriever":
    """The model that an index was built with. bf16 on a GPU, where it is what the weights were trained in; fp32 on a CPU, where it is faster."""
    from model import Retriever  # here, since it brings transformers: seconds that BM25 and exports need not wait for

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return Retriever.load(encoder["model"], adapter=encoder["adapter"], base=encoder["base"], head=encoder["head"], dtype=dtype, device=device)


def build(model, corpus, out, adapter=None, base=None, head=None, dtype: str | None = None, top_terms: int | None = None,
          max_length: int | None = None, tokens_per_batch: int = 16384, shard_docs: int = 20_000, device: str | None = None) -> Path:
    """Encode every passage of `corpus` with `model` into the index folder `out`. A shard is a fixed range of passages, written whole or not at all
    into `out`.shards, so that any number of ranks can go on where others were killed."""
    rank, world = processes()
    out, shards, device = Path(out), Path(f"{out}.shards"), own_device(device)
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    if rank == 0:
        Corpus(corpus)  # made by one, opened by all
    barrier()
    docs = Corpus(corpus)
    here = lambda path: os.path.abspath(path) if path and os.path.exists(path) else path
    encoder = {"kind": "model", "model": here(str(model)), "adapter": here(adapter), "base": here(base), "head": head}
    r = load(encoder, device)
    dtype = dtype or ("fp32" if r.sparse else "fp16")
    if dtype not in (kinds := ("fp32", "fp16", "int8") if r.sparse else ("fp32", "fp16", "bf16", "int8")):
        raise ValueError(f"--dtype {dtype}: a {r.head} index is stored as {', '.join(kinds)}")
    places = [place for place in (model, adapter) if place and os.path.isdir(place)]
    weights = [f.stat().st_mtime_ns for place in places for f in Path(place).glob("*model*.*") if f.suffix != ".json"]
    plan = {"encoder": encoder | {"head": r.head}, "weights written": max(weights, default=None), "corpus": here(str(corpus)),
            "documents": len(docs), "dtype": dtype, "top_terms": top_terms,
            "max_length": max_length or r.settings["passage_length"], "shard_docs": shard_docs}
    if rank == 0 and not (shards / "plan.json").exists():
        with write_whole(shards / "plan.json") as file:
            json.dump(plan, file, indent=1)
    barrier()
    begun = json.loads((shards / "plan.json").read_text())
    if changed := [key for key in plan if begun[key] != plan[key]]:
        raise ValueError(f"{shards} was begun with {changed[0]} = {begun[changed[0]]!r}, now it is {plan[changed[0]]!r}; "
                         f"repeat the first command to go on, or remove {shards} to start anew")

    firsts = range(0, len(docs), shard_docs)
    file_of = {first: shards / f"{first:010d}.npz" for first in firsts}
    todo = [first for first in firsts if not file_of[first].exists()]
    barrier()  # all ranks have listed the same gaps before one of them fills any
    with tqdm(total=sum(min(shard_docs, len(docs) - first) for first in todo[rank::world]), unit=" passages", disable=rank > 0,
              desc=f"encoding, rank 0 of {world}" if world > 1 else "encoding") as bar:
        for first in todo[rank::world]:
            rows = range(first, min(first + shard_docs, len(docs)))
            arrays = encode_passages(r, docs, rows, max_length, top_terms, tokens_per_batch, device, bar)
            with write_whole(file_of[first], "wb") as file:
                np.savez(file, **{name: array.numpy() for name, array in arrays.items()})
    barrier()
    if rank == 0:
        started, ids = time.time(), map(docs.docid, range(len(docs)))
        def shard(first):
            with np.load(file_of[first]) as arrays:
                return [torch.from_numpy(array) for array in arrays.values()]
        manifest = {"kind": "sparse" if r.sparse else "dense", **{key: plan[key] for key in ("encoder", "corpus", "dtype", "top_terms", "max_length")}}
        with new_folder(out) as aside:
            if r.sparse:
                tokens = r.tokenizer.convert_ids_to_tokens(list(range(r.width)))
                vocab = [token or f"[{t}]" for t, token in enumerate(tokens)]  # rows that only pad the embedding have no token
                assemble(aside, lambda: ((first, *shard(first)) for first in firsts), manifest, ids, len(docs), vocab)
            else:
                coded, dtype = dtype == "int8", "fp16" if dtype == "int8" else dtype
                vectors = created(aside, "vectors", (len(docs), r.width), DTYPES[dtype])
                for first in firsts:
                    vectors[first:first + shard_docs] = shard(first)[0].to(vectors.dtype)
                if coded:
                    Codes.of(vectors, functools.partial(created, aside))
                finish(aside, manifest | {"width": r.width, "dtype": dtype, "coded": coded}, ids, len(docs))
        shutil.rmtree(shards)
        print(f"{out}: {len(docs):,} passages, put together in {time.time() - started:.0f} s")
    barrier()
    return out


@torch.no_grad()
def encode_passages(r: "Retriever", corpus: Corpus, rows: range, max_length, top_terms, tokens_per_batch, device, bar) -> dict[str, Tensor]:
    """The vectors of a range of passages in their order: {"vectors"}, or CSR as {"ends", "terms", "weights"}."""
    from model import NotFinite
    try:
        reps = r.encode(corpus.texts(rows), "passage", max_length, tokens_per_batch, top_terms, bar.update)
    except NotFinite as e:
        raise ValueError(f"passage {corpus.docid(rows[e.place])!r}: {str(e).partition(': ')[2]}") from e
    if not r.sparse:
        return {"vectors": reps}
    return {"ends": reps.crow_indices(), "terms": reps.col_indices().int(), "weights": reps.values()}


def assemble(folder: Path, pieces, manifest: dict, docids, n_docs: int, vocab: list[str]):
    """Invert documents into the mapped files of an index folder."""
    (indptr, rows, _), scale = invert(pieces, len(vocab), manifest["dtype"], functools.partial(created, folder))
    np.save(folder / "indptr.npy", indptr.to(rows.dtype).numpy())
    finish(folder, manifest | {"kind": "sparse", "terms": len(vocab), "postings": len(rows), "scale": scale}, docids, n_docs, vocab)


# Search: queries -> run.


def vocabulary(index_path) -> list[str]:
    return json.loads((Path(index_path) / "vocab.json").read_text())


def query_encoder(path, manifest: dict, model=None, device: str = "cpu") -> "Retriever":
    """The model whose queries fit an index: its own, or `model`."""
    encoder = manifest.get("encoder")
    if not encoder and not model:
        raise ValueError(f"{path} was made from arrays and does not know its model: give --model, or search it from Python")
    if encoder and encoder["kind"] == "bm25":
        raise ValueError(f"{path} holds BM25 weights, which no model's queries fit: python -m tools.bm25 search --index {path}")
    kind = manifest["kind"]
    r = load({"model": model, "adapter": None, "base": None, "head": encoder["head"] if encoder else kind} if model else encoder, device)
    width = manifest["terms" if kind == "sparse" else "width"]
    if (r.sparse, r.width) != (kind == "sparse", width):
        raise ValueError(f"{model or encoder['model']} is {r.head} and {r.width} wide, the index {path} is {kind} and {width} wide")
    return r


def stacked(parts: list[Tensor]) -> Tensor:
    """The vectors of some queries after those of others."""
    if len(parts) == 1 or parts[0].layout == torch.strided:
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    counts = torch.cat([part.crow_indices().diff() for part in parts])
    terms, weights = (torch.cat([get(part) for part in parts]) for get in (Tensor.col_indices, Tensor.values))
    return torch.sparse_csr_tensor(F.pad(counts.cumsum(0), (1, 0)), terms, weights, (len(counts), parts[0].shape[1]), check_invariants=False)


def search(index, queries, k: int = 1000, out=None, model=None, batch: int = 64, query_length: int | None = None, device: str | None = None,
           threads: int | None = None, encode=None) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} for {qid: text} or a file of queries, best first, and a TREC run at `out`. Under torchrun every rank searches its
    range of documents; rank 0 merges, writes and returns, the others return {}. `encode`: texts -> what the index takes, instead of a model's."""
    rank, world = processes()
    queries = queries if isinstance(queries, dict) else read_queries(queries)
    device = own_device(device)
    ix, lo = open_index(index, "cpu" if world > 1 else device), 0
    manifest, docids, k = ix.manifest, ix.docids, max(1, min(k, ix.n_docs))
    if world > 1:
        ix, lo = ix.part(rank, world, device)
    if encode is None:
        encode = functools.partial(query_encoder(index, manifest, model, device).encode, kind="query", max_length=query_length)
    run, everyone, terms, seconds = {}, list(queries), 0, 0.0
    at_once = len(queries) if ix.streamed else batch
    with tqdm(total=len(queries), unit=" queries", desc="searching", disable=rank > 0) as bar:
        for first in range(0, len(queries), max(1, at_once)):
            qids = everyone[first:first + at_once]
            texts = [queries[qid] for qid in qids]
            vectors = stacked([encode(texts[i:i + batch]) for i in range(0, len(texts), batch)])
            terms += vectors._nnz() if manifest["kind"] == "sparse" else 0
            started = time.time()
            scores, rows = ix.search(vectors, k, threads=threads) if manifest["kind"] == "sparse" else ix.search(vectors, k)
            if world > 1:
                mine, lists = (scores, torch.where(rows < 0, rows, rows + lo)), [None] * world if rank == 0 else None
                dist.gather_object(mine, lists)
                scores, rows = merge(lists, k) if rank == 0 else mine
            seconds += time.time() - started
            if rank == 0:
                for qid, s, r in zip(qids, scores.tolist(), rows.tolist()):
                    run[qid] = {docids[row]: score for score, row in zip(s, r) if row >= 0}
            bar.update(len(qids))
    if rank == 0:
        n, n_docs = max(1, len(queries)), manifest["documents"]
        n_bytes = sum(file["bytes"] for file in manifest["files"].values())
        costs = {"ms_per_query": 1000 * seconds / n, "index_bytes": n_bytes, "k": k, "documents": n_docs}
        if manifest["kind"] == "sparse":
            costs |= {"nnz_queries": terms / n, "nnz_docs": manifest["postings"] / max(1, n_docs)}
        if out:
            write_run(out, run, tag=Path(index).name.replace(" ", "_"))
            with write_whole(f"{out}.json") as file:  # what the run cost, for `tools.compare --costs`
                json.dump(costs, file)
        print(f"{n:,} queries x {n_docs:,} documents, k {k}: {costs['ms_per_query']:.2f} ms a query"
              + (f"; terms: {costs['nnz_queries']:.0f} a query, {costs['nnz_docs']:.0f} a document" if "nnz_docs" in costs else ""))
    return run


# The command line.


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, about):
        return commands.add_parser(name, help=about, description=about, allow_abbrev=False, formatter_class=Help)

    p = command("build", "encode a corpus into an index; the same line again goes on after a kill")
    p.add_argument("--model", required=True, help="run folder, adapter folder or hub name")
    p.add_argument("--corpus", required=True, help="collection.tsv, corpus.jsonl or a BEIR folder")
    p.add_argument("--out", required=True, help="folder to make")
    g = p.add_argument_group("the model, where its folder does not say")
    g.add_argument("--adapter", help="PEFT adapter on top of --model")
    g.add_argument("--base", help="base model of an adapter, if not where its adapter_config.json says")
    g.add_argument("--head", choices=["sparse", "dense"])
    g.add_argument("--max_length", type=int, help="tokens of a passage; the checkpoint's passage_length without it")
    g = p.add_argument_group("size of the index")
    g.add_argument("--dtype", choices=list(DTYPES), help="sparse: fp32 (8 bytes a posting, the default), fp16 (6), int8 (5: impacts in 255 "
                   "steps; nDCG@10 goes from 0.6923 to 0.6928 with the demo's sparse model, from 0.6769 to 0.6767 with BM25 weights on SciFact); "
                   "dense: fp32, fp16 (the default), bf16, int8 (fp16, and a byte a dimension more for 8-bit codes, with which a CPU with "
                   "AVX-512 VNNI searches up to twice as fast, and as exactly, from 500 x --k passages on)")
    g.add_argument("--top_terms", type=int, help="sparse: keep the heaviest so many terms of each passage "
                   "(of the demo's 156, 64 cost 0.001 nDCG@10 and 32 0.039; of BM25's 99 on SciFact, 50 cost 0.016)")
    g = p.add_argument_group("machine")
    g.add_argument("--tokens_per_batch", type=int, default=16384, help="halve it if you run out of memory")
    g.add_argument("--shard_docs", type=int, default=20_000, help="passages between two writes: what a kill can cost")
    g.add_argument("--device", help="cuda where there is one, else cpu")

    p = command("search", "queries to a TREC run, exactly; under torchrun every rank takes its range of documents")
    p.add_argument("--index", required=True)
    p.add_argument("--queries", required=True, help="tsv, jsonl or a BEIR folder")
    p.add_argument("--out", required=True, help="run file to write")
    p.add_argument("--k", type=int, default=1000)
    p.add_argument("--model", help="encode queries with this one instead of the index's own")
    p.add_argument("--query_length", type=int, help="tokens of a query; the checkpoint's query_length without it")
    p.add_argument("--batch", type=int, default=64, help="queries encoded at once")
    p.add_argument("--threads", type=int, help="queries searched at once on a CPU; torch's number of threads without it")
    p.add_argument("--device", help="cuda where there is one, else cpu")

    p = command("verify", "read every file of an index and compare its checksum")
    p.add_argument("--index", required=True)

    args = vars(parser.parse_args(argv))
    name = args.pop("command")
    try:
        if name == "verify":
            manifest = read_manifest(args["index"], full=True)
            print(f"{args['index']}: {manifest['documents']:,} documents, every file as it was built")
        else:
            {"build": build, "search": search}[name](**args)
    except ValueError as e:  # a fault in what was given, not in the program: the message is the cure, the traceback is noise
        sys.exit(f"{parser.prog} {name}: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
