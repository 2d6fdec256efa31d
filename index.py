"""Encode a corpus, search it exactly, look inside, and carry it elsewhere."""
import json
import math
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 8192      # documents a dense matmul scores at once: (queries, CHUNK) scores and one chunk of vectors are all the memory it needs
PIECE = 1 << 22   # postings inverted at once


def top_k(scores: torch.Tensor, k: int, above: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row, best first, equal scores by lower column: ((B, k) scores, (B, k) columns), padded with (-inf, -1).
    Only scores greater than `above` (B,) count. torch.topk over a million scores costs as much as adding them up; here
    the maxima of blocks are taken first: k blocks reach the k-th largest maximum, so k scores do, so nothing below it can matter."""
    B, N = scores.shape
    size = 1 << min(8, max(3, int(math.log2(max(1, N // (8 * k))))))
    blocks = F.pad(scores, (0, -N % size), value=-math.inf).view(B, -1, size) if N % size else scores.view(B, -1, size)
    maxima = blocks.amax(2)                                             # (B, blocks)
    floor = maxima.topk(k, sorted=False).values.amin(1) if maxima.shape[1] >= k else scores.new_full((B,), -math.inf)
    above = scores.new_full((B,), -math.inf) if above is None else above
    b, block = ((maxima >= floor[:, None]) & (maxima > above[:, None])).nonzero(as_tuple=True)
    inside = blocks[b, block]                                           # (blocks that matter, size)
    i, column = ((inside >= floor[b, None]) & (inside > above[b, None])).nonzero(as_tuple=True)
    scores, b, column = inside[i, column], b[i], block[i] * size + column
    # nonzero counts upwards, so columns ascend inside a row; two stable sorts keep that among equals
    order = scores.sort(descending=True, stable=True).indices
    if B > 1:
        order = order[b[order].sort(stable=True).indices]
    scores, b, column = scores[order], b[order], column[order]
    hits = b.bincount(minlength=B)
    place = torch.arange(len(b), device=b.device) - (hits.cumsum(0) - hits)[b]
    width = min(k, N)
    best, at, keep = blocks.new_full((B, width), -math.inf), b.new_full((B, width), -1), place < k
    best[b[keep], place[keep]] = scores[keep]
    at[b[keep], place[keep]] = column[keep]
    return best, at


def merge(parts: list, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k lists of successive ranges of documents become one. Stable: of two equal scores the earlier range, so the lower row, wins."""
    scores, rows = (torch.cat(x, 1) for x in zip(*parts))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], rows.gather(1, order[:, :k])


class SparseIndex:
    """An inverted index is a sparse matrix, terms x documents: row t lists the documents that hold term t, and their weights."""

    def __init__(self, matrix: torch.Tensor, docids=None, manifest: dict | None = None, scale: float = 1.0):
        self.matrix, self.manifest, self.scale = matrix, manifest or {}, scale
        self.n_terms, self.n_docs = matrix.shape
        self.docids = docids
        self.starts = matrix.crow_indices().tolist()  # slicing by Python ints: no tensor arithmetic in the loop over terms

    @classmethod
    def from_csr(cls, indptr, indices, values, n_terms: int, docids=None, device="cpu") -> "SparseIndex":
        indptr, indices, values = (torch.as_tensor(x) for x in (indptr, indices, values))
        n_docs = len(indptr) - 1

        def pieces():
            for lo, hi in slabs(indptr):
                s, e = int(indptr[lo]), int(indptr[hi])
                yield lo, indptr[lo:hi + 1] - s, indices[s:e], values[s:e]

        arrays = invert(pieces, n_docs, n_terms, lambda name, shape, dtype: torch.empty(shape, dtype=dtype))
        return cls(torch.sparse_csr_tensor(*arrays, (n_terms, n_docs), check_invariants=False).to(device), docids)

    def search(self, queries, k: int = 1000, threads: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best documents for each query: ((Q, k) scores, (Q, k) rows), best first, ties by lower row, padded with (-inf, -1)."""
        queries = check_csr(*queries, self.n_terms, "query")
        indptr, terms, weights = queries[0].tolist(), queries[1].tolist(), (queries[2].float() * self.scale).tolist()
        rows, values = self.matrix.col_indices(), self.matrix.values()
        n = -(-self.n_docs // 256) * 256  # a whole number of blocks: top_k then need not copy

        def one(q, scores):
            scores.zero_()
            for t, w in sorted(zip(terms[indptr[q]:indptr[q + 1]], weights[indptr[q]:indptr[q + 1]])):
                s, e = self.starts[t], self.starts[t + 1]
                scores.index_add_(0, rows[s:e], values[s:e].float(), alpha=w)
            return top_k(scores[None], k, scores.new_zeros(1))

        scores = torch.empty(n)
        found = [one(q, scores) for q in range(len(indptr) - 1)]
        return tuple(torch.cat(x) for x in zip(*found))


def check_csr(indptr, indices, values, n_terms: int, what: str):
    indptr, indices, values = (torch.as_tensor(x) for x in (indptr, indices, values))
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_terms:
        raise ValueError(f"a {what} holds term {int(indices.max())}, and the vocabulary ends at {n_terms - 1}")
    if len(values) and not (bool(torch.isfinite(values).all()) and float(values.min()) >= 0):
        raise ValueError(f"a {what} holds a weight that is NaN, infinite or negative")
    return indptr.long(), indices, values


def slabs(indptr):
    """Ranges of documents with about PIECE postings each."""
    lo, n = 0, len(indptr) - 1
    while lo < n:
        hi = max(lo + 1, int(torch.searchsorted(indptr, int(indptr[lo]) + PIECE, right=True)) - 1)
        yield lo, min(hi, n)
        lo = min(hi, n)


def invert(pieces, n_docs: int, n_terms: int, make):
    counts = torch.zeros(n_terms, dtype=torch.int64)
    for first, ptr, terms, values in pieces():
        check_csr(ptr, terms, values, n_terms, "document")
        counts += torch.bincount(terms, minlength=n_terms)
    indptr = F.pad(counts.cumsum(0), (1, 0))
    n = int(indptr[-1])
    kind = torch.int32 if n < 2**31 else torch.int64
    rows, weights, cursor = make("rows", n, kind), make("weights", n, torch.float32), indptr[:-1].clone()
    for first, ptr, terms, values in pieces():
        terms, order = terms.sort(stable=True)
        here = torch.bincount(terms, minlength=n_terms)
        at = torch.arange(len(terms)) + (cursor - (here.cumsum(0) - here))[terms]
        docs = torch.repeat_interleave(torch.arange(first, first + len(ptr) - 1, dtype=kind), ptr.diff())
        rows[at], weights[at] = docs[order], values[order].float()
        cursor += here
    return indptr.to(kind), rows, weights
