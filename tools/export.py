"""An index as the files that other engines read.

    python -m tools.export --index indexes/sp-1b --format anserini --out export/      # on to Lucene
"""
import argparse
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Help, new_folder, positive, run_command
from index import PIECE, SparseIndex, open_index, read_manifest, vocabulary

def export(folder, out, format: str, scale: float = 100.0) -> Path:
    """`anserini`: JsonVectorCollection, weights as round(scale * weight), at least 1. `seismic`: its jsonl, weights as they are. `ciff`: the
    Common Index File Format, quantised as anserini's. `npz`: documents x terms for scipy.sparse.load_npz. `npy`: dense vectors for faiss.
    Ids are in docids.txt."""
    kind = read_manifest(folder)["kind"]
    if (kind == "dense") != (format == "npy"):
        raise ValueError(f"{folder} is {kind}: it exports as {'npy' if kind == 'dense' else 'anserini, seismic, ciff or npz'}, not {format}")
    ix = open_index(folder)
    with new_folder(out) as aside:
        shutil.copy(Path(folder) / "docids.txt", aside)
        if format == "npy":
            if ix.vectors.dtype == torch.bfloat16:  # faiss reads fp32, numpy has no bf16
                np.lib.format.open_memmap(aside / "vectors.npy", "w+", np.float32, (ix.n_docs, ix.width))[:] = ix.vectors.float().numpy()
            else:
                shutil.copy(Path(folder) / "vectors.npy", aside)
        elif format == "ciff":
            write_ciff(ix, aside / "index.ciff", vocabulary(folder), scale)
        else:
            step = max(1, 4 * PIECE // max(1, len(ix.rows) // max(1, ix.n_docs)))  # documents a pass over the index
            documents = (d for lo in range(0, ix.n_docs, step) for d in ix.documents(lo, min(lo + step, ix.n_docs)))
            if format == "npz":
                _, terms, weights = zip((0, torch.zeros(0).int(), torch.zeros(0)), *documents)
                np.savez(aside / "vectors.npz", format=b"csr", shape=(ix.n_docs, ix.n_terms), data=torch.cat(weights).numpy(),
                         indices=torch.cat(terms).numpy(), indptr=np.cumsum([*map(len, terms)]))
            else:
                names, lucene = vocabulary(folder), format == "anserini"
                with open(aside / "vectors.jsonl", "w", encoding="utf-8") as file:
                    for row, terms, weights in documents:
                        weights = quantised(weights, scale) if lucene else weights
                        vector = {names[t]: w for t, w in zip(terms.tolist(), weights.tolist())}
                        content = {"contents" if lucene else "content": ""}
                        file.write(json.dumps({"id": ix.docids[row], **content, "vector": vector}, ensure_ascii=False) + "\n")
    return Path(out)


def quantised(weights: Tensor, scale: float) -> Tensor:
    return (weights * scale).round().clamp(1).int()


def varint(n: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth bit says that more follow."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def fields(*values) -> bytes:
    """A protobuf message: fields numbered from 1; ints go as varints, floats as doubles, text after its length."""
    out = b""
    for number, value in enumerate(values, 1):
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 1) + np.float64(value).tobytes()
        else:
            out += varint(number << 3 | 2) + delimited(value.encode())
    return out


def delimited(message: bytes) -> bytes:
    return varint(len(message)) + message


def write_ciff(ix: SparseIndex, path: Path, names: list[str], scale: float):
    """A header, a message for each term in the order of the terms' bytes, and one for each document. Within a list the documents are gaps."""
    used = sorted((t for t in range(ix.n_terms) if ix.starts[t] < ix.starts[t + 1]), key=lambda t: names[t].encode())
    lengths = torch.zeros(ix.n_docs, dtype=torch.int64)
    for rows, weights in zip(ix.rows.split(PIECE), ix.weights.split(PIECE)):
        lengths.index_add_(0, rows, quantised(weights.float() * ix.scale, scale).long())
    total = int(lengths.sum())
    with open(path, "wb") as file:
        file.write(delimited(fields(1, len(used), ix.n_docs, len(used), ix.n_docs, total, total / max(1, ix.n_docs), f"round({scale} x weight)")))
        for t in used:
            s, e = ix.starts[t], ix.starts[t + 1]
            impacts = quantised(ix.weights[s:e].float() * ix.scale, scale)
            gaps = ix.rows[s:e].diff(prepend=ix.rows.new_zeros(1))
            postings = (b"\x22" + delimited(fields(*posting)) for posting in zip(gaps.tolist(), impacts.tolist()))  # 0x22: field 4, a message
            file.write(delimited(fields(names[t], e - s, int(impacts.sum())) + b"".join(postings)))
        for row, length in enumerate(lengths.tolist()):
            file.write(delimited(fields(row, ix.docids[row], length)))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--index", required=True, dest="folder")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--format", required=True, choices=["anserini", "seismic", "ciff", "npz", "npy"])
    parser.add_argument("--scale", type=positive, default=100.0,
                        help="anserini, ciff: weights are stored as round(scale x weight)")
    args = parser.parse_args(argv)
    run_command(parser.prog, functools.partial(export, **vars(args)))


if __name__ == "__main__":
    main()
