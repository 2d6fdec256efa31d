"""8-bit codes for a dense index: as exact, and up to twice as fast where a CPU multiplies bytes.

    python -m tools.codes add --index indexes/dense-1b       # writes indexes/dense-1b.codes beside it
    python -m tools.codes search --index indexes/dense-1b --queries dev.tsv --k 100 --out dev.trec

What surprises:
- 8-bit products give an upper bound of every score. The vectors themselves decide, but only those of
  documents whose bound reaches the k-th best score so far: a few hundred of a million.
- To look a candidate up costs as much as some hundred products. So codes are used from 500 * k documents on.
"""
import argparse
import functools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

import index
from data import Help, check_files, locked, new_folder, positive_int, read_json, run_command, stamp
from index import (TILE, DenseIndex, candidates, created, empty_top_k, mapped, merge, sorted_lists,
                   top_k)

# Upper bounds in memory at once: 16 MB.
BOUNDS = 1 << 22


class Codes:
    """Vectors in 8 bits: x = centre + scale * code + rest. So q.x = q.centre + scale * q.code + q.rest, and
    the last is at most |q| |rest|. `parts` (N, 3) holds each document's scale, |rest| and |scale * code|; the
    centre is any vector in the middle, to make the codes fine."""

    names = ("codes", "parts", "centre")

    def __init__(self, codes: Tensor, parts: Tensor, centre: Tensor):
        self.codes, self.parts, self.centre = codes, parts, centre

    @classmethod
    def of(cls, vectors: Tensor, folder: Path | None = None) -> "Codes":
        """In memory, or as mapped files of a folder."""
        n, width = vectors.shape
        codes = created(folder, "codes", (n, width), torch.int8)
        parts = created(folder, "parts", (n, 3), torch.float32)
        centre = created(folder, "centre", (width,), torch.float32)
        # The mean of some ten thousand vectors is near enough: any centre keeps the bounds true.
        centre.copy_(vectors[:: max(1, n // 10_000)].float().mean(0) if n else torch.zeros(width))
        for first in range(0, n, TILE):
            x = vectors[first : first + TILE].float()
            if not x.isfinite().all():
                row = first + int((~x.isfinite()).nonzero()[0, 0])
                raise ValueError(f"document row {row} holds NaN or infinity; did the model diverge?")
            x = x - centre
            # Not 0: a vector may be the centre itself.
            scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
            coded = (x / scale).round_()
            codes[first : first + TILE] = coded
            coded *= scale
            # A tenth of a percent covers the rounding of the sums in the two lengths.
            lengths = [1.001 * part.norm(dim=1, keepdim=True) for part in (x - coded, coded)]
            parts[first : first + TILE] = torch.cat([scale, *lengths], 1)
        return cls(codes, parts, centre)


class CodedQueries:
    """Queries in 8 bits, too: q = unit * code + rest. So |q.x - q.centre - unit * scale * code.code| is at
    most |q| |x's rest| + |q's rest| |scale * code|."""

    def __init__(self, codes: Codes, queries: Tensor):
        self.documents = codes
        self.unit = (queries.abs().amax(1) / 127).clamp(min=1e-30)
        coded = (queries / self.unit[:, None]).round()
        length, rest = queries.norm(dim=1), (queries - self.unit[:, None] * coded).norm(dim=1)
        # 1e-5 of the length is more than fp32 rounds off in `bounds`.
        self.slack = torch.stack([1.001 * length, 1.001 * rest + 1e-5 * length]) / self.unit  # (2, B)
        # Sums of 64 bits err by less than 1e-12 of the lengths.
        self.middle = queries.double() @ codes.centre.double() + 1e-12 * length.double() * codes.centre.norm()
        self.code = coded.to(torch.int8).T
        # Reused for every range of documents.
        self.memory = torch.empty(len(queries), min(BOUNDS // len(queries), len(codes.codes)))

    def bounds(self, first: int, last: int) -> Tensor:
        """(B, n) upper bounds of the scores of documents first to last, in the units of `in_units`."""
        codes, parts = self.documents.codes, self.documents.parts
        for start in range(first, last, TILE):
            some = slice(start, min(start + TILE, last))
            # Document by document, as the codes lie; what is kept lies query by query, as `candidates` reads.
            products = torch._int_mm(codes[some], self.code) * parts[some, :1]
            products.addmm_(parts[some, 1:], self.slack)
            self.memory[:, some.start - first : some.stop - first] = products.T
        return self.memory[:, : last - first]

    def in_units(self, scores: Tensor) -> Tensor:
        """What scores (B,) are beside the bounds, at least: less q.centre, in each query's unit."""
        # Downwards wherever it is rounded: of vectors that are nearly one point no bound lies a hair above.
        units = ((rounded_down(scores).double() - self.middle) / self.unit).float()
        return rounded_down(units)


def rounded_down(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -math.inf))


class CodedIndex(DenseIndex):
    """A DenseIndex that looks at codes first, where that is faster."""

    codes: Codes

    @classmethod
    def of(cls, vectors, docids=None, device="cpu") -> "CodedIndex":
        ix = super().of(vectors, docids, device)
        ix.codes = Codes.of(ix.vectors)
        return ix

    @classmethod
    def open(cls, path, device="cpu") -> "CodedIndex":
        ix, folder = super().open(path, device), codes_folder(path)
        check_codes(path, ix.manifest)
        ix.codes = Codes(*(mapped(folder, name) for name in Codes.names))
        return ix

    def uses_codes(self, k: int) -> bool:
        return self.n_docs >= 500 * k and self.device.type == "cpu" and multiplies_bytes()

    def search_batch(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not self.uses_codes(k):
            return super().search_batch(queries, k)
        B, coded = len(queries), CodedQueries(self.codes, queries)
        # In 64 bits the order of the additions does not show.
        exactly = queries.double()
        best, step = empty_top_k(B, k), BOUNDS // B
        for first in range(0, self.n_docs, step):
            bounds = coded.bounds(first, min(first + step, self.n_docs))
            bar = best[0][:, -1]
            if first == 0 and bounds.shape[1] >= k:
                # The documents with the k highest bounds give a first bar.
                rows = top_k(bounds, k, bar)[1]
                query = torch.arange(B).repeat_interleave(k)
                bar = self.scored(exactly, query, rows.flatten()).view(B, k).amin(1)
            # Who cannot reach the bar is out; the exact score decides among the rest.
            query, column, _ = candidates(bounds, k, coded.in_units(bar), few=True)
            rows = column + first
            best = merge(best, sorted_lists(query, rows, self.scored(exactly, query, rows), B, k))
        return best

    def scored(self, queries: Tensor, query: Tensor, rows: Tensor) -> Tensor:
        """The exact scores of (query, row) pairs, ordered by query."""
        found = [torch.zeros(0)]
        # 64 rows at a time, so that their copies in 64 bits stay in the cache.
        for one, mine in zip(queries, rows.split(query.bincount(minlength=len(queries)).tolist())):
            for some in mine.split(64):
                found.append((self.vectors.index_select(0, some).double() @ one).float())
        return torch.cat(found)


@functools.cache
def multiplies_bytes() -> bool:
    """Does this processor multiply bytes fast (AVX-512), and rightly (VNNI)? Without VNNI torch._int_mm adds
    pairs in 16 bits, which overflow."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    most = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most) == 64 * 127 * 127).all())


def codes_folder(folder) -> Path:
    return Path(f"{str(folder).rstrip('/')}.codes")


def check_codes(folder, manifest: dict) -> None:
    """Whether the codes beside an index are whole, and of its vectors."""
    place, cure = codes_folder(folder), f"remove it, and python -m tools.codes add --index {folder}"
    # By the checksum of the vectors, which their manifest knows: a copy of both folders stays a pair.
    if not place.is_dir():
        raise ValueError(f"{folder} has no codes: python -m tools.codes add --index {folder}")
    codes = read_json(place / "manifest.json", cure)
    size, _, crc = manifest["files"]["vectors.npy"]
    if codes["of"] != [size, crc]:
        raise ValueError(f"{place}: are the codes of other vectors; {cure}")
    check_files(place, codes["files"], cure)


def add(folder) -> Path:
    """Write the codes of a dense index beside it."""
    place = codes_folder(folder)
    if place.exists():
        raise ValueError(f"{place} exists; remove it to write the codes again")
    with locked(place), new_folder(place) as aside:
        ix = DenseIndex.open(folder)
        Codes.of(ix.vectors, aside)
        size, _, crc = ix.manifest["files"]["vectors.npy"]
        files = {f"{name}.npy": stamp(aside / f"{name}.npy") for name in Codes.names}
        (aside / "manifest.json").write_text(json.dumps({"of": [size, crc], "files": files}))
    print(f"{place}: codes of {ix.n_docs:,} vectors, {ix.vectors.shape[1]} bytes each")
    return place


def search(folder, queries, k: int = 1000, out=None, **options) -> dict[str, dict[str, float]]:
    """index.search by codes."""
    return index.search(folder, queries, k, out, opener=CodedIndex.open, device="cpu", **options)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.codes", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("add", help="write the codes of a dense index beside it", allow_abbrev=False)
    p.add_argument("--index", required=True, dest="folder")
    p = commands.add_parser("search", help="queries to a TREC run", allow_abbrev=False, formatter_class=Help)
    p.add_argument("--index", required=True, dest="folder")
    p.add_argument("--queries", required=True, help="tsv, jsonl or a BEIR folder")
    p.add_argument("--out", required=True, help="run file to write")
    p.add_argument("--k", type=positive_int, default=1000)
    p.add_argument("--batch", type=positive_int, default=64, help="queries encoded at once")
    args = vars(parser.parse_args(argv))
    call = {"add": add, "search": search}[args.pop("command")]
    run_command(parser.prog, functools.partial(call, **args))


if __name__ == "__main__":
    main()
