"""A score, term by term: in the terminal, and as a page.

    python -m tools.explain --index indexes/sp-1b --query "how do tides work" --html tides.html

What surprises:
- A sparse score is a sum over the terms that query and passage share, so this is the whole score and no
  approximation.
- A term's weight comes from one place in the text: the piece at which its logit was largest. That is what a
  word's shade says.
"""
import argparse
import functools
import html
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import index
from data import Corpus, Help, fingerprint, natural, positive_int, printable, run_command, write_whole
from index import PIECE, SparseIndex


class Side:
    """The query or the passage: its terms with their weights, its pieces, and which piece each term came
    from."""

    def __init__(self, encoder, text: str, kind: str, weights: dict[int, float], max_length: int | None):
        self.text, self.weights = text, weights
        self.pieces, places = origins(encoder, text, kind, list(weights), max_length)
        self.place = dict(zip(weights, places))

    def source(self, term: int) -> str:
        """The piece of the text that a term came from, "" if there is none."""
        return "" if self.place[term] is None else self.pieces[self.place[term]]

    def heat(self, shares: dict[int, float]) -> list[tuple[str, float]]:
        """Each piece, and the share of the score that came from it."""
        heat = [0.0] * len(self.pieces)
        for term, share in shares.items():
            if self.place[term] is not None:
                heat[self.place[term]] += share
        return list(zip(self.pieces, heat))

    def expansion(self, names: list[str], other: "Side", top: int) -> list[dict]:
        """The strongest terms that are no words of the text itself."""
        # Names of terms carry their tokenizer's mark of a space, pieces carry a space.
        own = {piece.strip().lower() for piece in self.pieces}
        terms = [term for term in self.weights if shown(names[term]).strip("\u2423").lower() not in own]
        terms.sort(key=self.weights.get, reverse=True)
        return [{"term": shown(names[term]), "weight": self.weights[term], "from": self.source(term),
                 "shared": term in other.weights} for term in terms[:top]]


@torch.no_grad()
def origins(encoder, text: str, kind: str, terms: list[int], max_length=None) -> tuple[list[str], list[int]]:
    """The pieces of a text, and for each of `terms` the place of the piece with its largest logit."""
    # The words of BM25 know it themselves.
    if not isinstance(encoder, torch.nn.Module):
        return encoder.origins(text, kind, terms, max_length)
    ids, mask = (x.to(encoder.device) for x in encoder.pad(encoder.tokenize([text], kind, max_length)))
    logits = encoder.hidden(ids, mask)[0] @ encoder.llama.lm_head.weight[terms].T  # (L, terms)
    # A GPU's batches are padded: no term comes from there.
    places = logits.masked_fill(mask[0, :, None] == 0, -torch.inf).argmax(0).tolist()
    pieces = encoder.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    return [encoder.tokenizer.convert_tokens_to_string([piece]) for piece in pieces], places


def shown(name: str) -> str:
    """A vocabulary entry with a visible space, in place of the marks that tokenizers have for one."""
    return name.replace("\u0120", "\u2423").replace("\u2581", "\u2423")


def encoder_of(folder, manifest: dict, model=None, device: str = "cpu"):
    """What makes vectors of queries for this index: a model, or the words of BM25. Both have `encode`; see
    `origins`."""
    # An index made from arrays has no encoder: None, and query_encoder asks for --model.
    if not model and (manifest.get("encoder") or {}).get("kind") == "bm25":
        from tools.bm25 import Words
        return Words(folder)
    return index.query_encoder(folder, manifest, model, device)


def document(ix: SparseIndex, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(terms, weights) of a document, by a look at the whole index: its lists are by term."""
    # At least one piece: of an index without postings it is an empty one.
    starts = range(0, max(1, len(ix.rows)), PIECE)
    places = torch.cat([start + (ix.rows[start : start + PIECE] == row).nonzero()[:, 0] for start in starts])
    terms = torch.searchsorted(ix.arrays[0], places, right=True) - 1
    return terms, ix.weights[places].float() * ix.scale


def explain(folder, query: str, docid: str | None = None, corpus=None, model=None, top: int = 12,
            hits: int = 3, device: str = "cpu") -> dict:
    """The `hits` best passages for `query`, and why `docid` (the best of them, without it) has its score:
    "shared" holds the terms of both, "query_expansion" and "passage_expansion" the `top` strongest that are
    not in the text."""
    if index.read_manifest(folder)["kind"] != "sparse":
        raise ValueError(f"{folder} is dense: its dimensions have no names to explain a score with; take a "
                         "sparse index")
    ix, names = SparseIndex.open(folder), index.vocabulary(folder)
    encoder = encoder_of(folder, ix.manifest, model, device)

    # 1. Search, and choose the passage.
    vector = encoder.encode([query], "query")
    scores, rows = ix.search(vector, max(1, hits))
    best = [(score, row) for score, row in zip(scores[0].tolist(), rows[0].tolist()) if row >= 0]
    if docid is None and not best:
        raise ValueError(f"no passage shares a term with {query!r}")
    row = best[0][1] if docid is None else row_of(ix, docid)
    passages = corpus_of(folder, ix.manifest, corpus)

    def text_of(row: int) -> str:
        return passages[passages.row(ix.docids[row])]

    # 2. Both sides, and the products of the terms that they share, the largest first.
    terms, weights = document(ix, row)
    q = Side(encoder, query, "query", weights_of(vector.col_indices(), vector.values()), None)
    p = Side(encoder, text_of(row), "passage", weights_of(terms, weights), ix.manifest.get("max_length"))
    products = {term: weight * p.weights[term] for term, weight in q.weights.items() if term in p.weights}
    score = sum(products.values())
    ordered = sorted(products, key=products.get, reverse=True)
    shares = {term: products[term] / score for term in ordered}
    shared = [{"term": shown(names[term]), "query": q.weights[term], "passage": p.weights[term],
               "product": products[term], "share": shares[term],
               "query_token": q.source(term), "passage_token": p.source(term)} for term in ordered]

    # 3. The best passages. In BM25's index a term that is not in the text is its stem, and no expansion.
    best = [{"docid": ix.docids[row], "score": score, "text": text_of(row),
             "terms": shares_of(ix, names, q.weights, row, score)} for score, row in best[:hits]]
    expands = (ix.manifest.get("encoder") or {}).get("kind") != "bm25"
    return {"index": str(folder), "query": query, "docid": ix.docids[row], "text": p.text, "score": score,
            "shared": shared, "hits": best, "query_terms": len(q.weights), "passage_terms": len(p.weights),
            "query_pieces": q.heat(shares), "passage_pieces": p.heat(shares),
            "query_expansion": q.expansion(names, p, top) if expands else [],
            "passage_expansion": p.expansion(names, q, top) if expands else []}


def corpus_of(folder, manifest: dict, corpus=None) -> Corpus:
    """The passages, as they were when the index was built."""
    path = corpus or manifest.get("corpus")
    if not path:
        raise ValueError(f"{folder} was made from arrays and does not know its passages: give --corpus")
    passages = Corpus(path)
    # Words of another text would explain nothing. An index of before knows no state.
    state = manifest.get("state of the corpus")
    if state not in (None, fingerprint(passages.source)):
        raise ValueError(f"{passages.source} is not what {folder} was built from: build the index again, or "
                         "give --corpus the file as it was")
    return passages


def row_of(ix: SparseIndex, docid: str) -> int:
    found = np.flatnonzero(ix.docids.array == docid.encode())
    if not len(found):
        raise ValueError(f"the index holds no document {docid!r}")
    return int(found[0])


def weights_of(terms: Tensor, weights: Tensor) -> dict[int, float]:
    return dict(zip(terms.tolist(), weights.tolist()))


def shares_of(ix: SparseIndex, names: list[str], query: dict[int, float], row: int,
              score: float) -> list[tuple]:
    """(term, share of the score) of one document, the largest first: a look into the list of each of the
    query's terms."""
    found = []
    for term, weight in query.items():
        # A list's rows ascend: a look by halves.
        start, end = ix.starts[term], ix.starts[term + 1]
        place = start + int(torch.searchsorted(ix.rows[start:end], row))
        if place < end and ix.rows[place] == row:
            found.append((shown(names[term]), weight * float(ix.weights[place]) * ix.scale / score))
    return sorted(found, key=lambda term: -term[1])


def as_text(e: dict, top: int = 12) -> str:
    """For the terminal."""
    lines = [f"query    {e['query']}", ""]
    for rank, hit in enumerate(e["hits"], 1):
        lines.append(f"{rank:>4}  {hit['score']:>8.3f}  {hit['docid']}  {hit['text'][:110]}")
        lines.append(" " * 16 + ", ".join(f"{term} {share:.0%}" for term, share in hit["terms"][:8]))
    lines += ["", f"passage  {e['docid']}  {e['text'][:300]}",
              f"score    {e['score']:.4f} = the sum over {len(e['shared'])} shared terms, of "
              f"{e['query_terms']} in the query and {e['passage_terms']} in the passage", "",
              f"{'term':<22}{'query':>8} x{'passage':>8} ={'product':>9}{'share':>8}  from (query, passage)"]
    for s in e["shared"][:top]:
        lines.append(f"{s['term'][:21]:<22}{s['query']:>8.3f}  {s['passage']:>8.3f}  {s['product']:>8.3f}"
                     f"{s['share']:>8.1%}  {s['query_token']!r}, {s['passage_token']!r}")
    if len(e["shared"]) > top:
        rest = sum(s["share"] for s in e["shared"][top:])
        lines.append(f"... and {len(e['shared']) - top} more, {rest:.1%} together")
    for side in ("query", "passage"):
        terms = [f"{x['term']}{'*' * x['shared']} {x['weight']:.2f}" for x in e[f"{side}_expansion"]]
        if terms:
            lines += ["", f"strongest terms that the {side} does not hold (* shared): {', '.join(terms)}"]
    # Passages come from anywhere, and may hold what a terminal takes for a command.
    return "\n".join(map(printable, lines))


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" \
content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1d2733; --page: #fff; --soft: #66717d; --line: #e3e7eb; --heat: \
226, 121, 32; --bar: #3b78b8 }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ec; --page: #15191e; --soft: #98a3ae; --line: \
#2c333b; --bar: #6aa5e0 }} }}
body {{ font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem; \
margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1rem; margin: 2rem 0 .4rem }} small, th {{ color: var(--soft); font-weight: normal }} p {{ \
white-space: pre-wrap; margin: .3rem 0 }}
mark {{ color: inherit; background: rgba(var(--heat), var(--h)); border-radius: 3px }} code {{ font-size: \
.92em; white-space: pre }}
table {{ border-collapse: collapse; width: 100% }} th, td {{ text-align: right; padding: .15rem .6rem; \
border-bottom: 1px solid var(--line) }}
th:first-child, td:first-child, th:nth-child(n+6), td:nth-child(n+6) {{ text-align: left }} td:nth-child(6) \
{{ width: 18%; padding-left: 0 }}
i {{ display: inline-block; height: .7em; background: var(--bar); border-radius: 2px }}
li {{ display: inline-block; margin: 0 1.2em .2em 0 }} ul {{ padding: 0 }}
</style><h1 style="font-size:1.4rem">Why this passage scores {score:.3f}</h1>
<p><small>A query and a passage are each a bag of weighted terms. The score is the sum, over the terms that \
both hold, of weight times weight.
A word is shaded by its part of the score.</small></p>
<h2>Query <small>{query_terms} terms</small></h2><p>{query}</p><h2>Passage {docid} <small>{passage_terms} \
terms</small></h2><p>{passage}</p>
{hits}<h2>The {n} shared terms</h2>
<table><tr><th>term<th>query<th>passage<th>product<th>share<th><th>from, in the query<th>in the \
passage</tr>{rows}</table>{expansions}</html>
"""


def heated(pieces: list[tuple[str, float]]) -> str:
    """A text whose words are shaded by their share of the score."""
    out = []
    for piece, heat in pieces:
        piece = html.escape(piece)
        if heat:
            # Even a hundredth of the score shows, and the darkest shade leaves the word legible.
            shade = min(0.85, 0.12 + 1.6 * heat)
            piece = f'<mark style="--h:{shade:.2f}" title="{heat:.1%} of the score">{piece}</mark>'
        out.append(piece)
    return "".join(out)


def code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def table_row(s: dict, widest: float) -> str:
    """One shared term. Its bar is as wide as its share, and the largest one fills the column."""
    bar = f'<i style="width:{100 * s["share"] / widest:.0f}%"></i>'
    return (f"<tr><td>{code(s['term'])}<td>{s['query']:.3f}<td>{s['passage']:.3f}<td>{s['product']:.3f}"
            f"<td>{s['share']:.1%}<td>{bar}<td>{code(s['query_token'].strip())}<td>"
            f"{code(s['passage_token'].strip())}</tr>")


def expansion_list(side: str, terms: list[dict]) -> str:
    if not terms:
        return ""
    items = []
    for x in terms:
        term = f"<b>{code(x['term'])}</b>" if x["shared"] else code(x["term"])
        items.append(f"<li>{term} {x['weight']:.2f} <small>{html.escape(x['from'].strip())}</small></li>")
    return (f"<h2>Strongest terms that the {side} does not hold <small>and the word that each came from; "
            f"the other side holds the bold ones too</small></h2><ul>{''.join(items)}</ul>")


def hit_list(hits: list[dict]) -> str:
    if not hits:
        return ""
    lines = []
    for rank, hit in enumerate(hits, 1):
        terms = ", ".join(f"{code(term)} {share:.0%}" for term, share in hit["terms"][:8])
        lines.append(f"<p><small>{rank}. {hit['score']:.3f}, {html.escape(hit['docid'])}:</small> "
                     f"{html.escape(hit['text'][:240])}<br><small>{terms}</small></p>")
    return f"<h2>The best passages <small>and what each term gave</small></h2>{''.join(lines)}"


def as_html(e: dict) -> str:
    """One page without scripts or outside files."""
    expansions = [expansion_list(side, e[f"{side}_expansion"]) for side in ("query", "passage")]
    # The largest share comes first.
    rows = "".join(table_row(s, e["shared"][0]["share"]) for s in e["shared"])
    return PAGE.format(title=html.escape(e["query"]), score=e["score"], docid=html.escape(e["docid"]),
                       hits=hit_list(e["hits"]), query_terms=e["query_terms"],
                       query=heated(e["query_pieces"]), passage_terms=e["passage_terms"],
                       passage=heated(e["passage_pieces"]), n=len(e["shared"]), rows=rows,
                       expansions="".join(expansions))


def show(page: Path | None, **what) -> None:
    """Explain in the terminal, and on a page if asked to."""
    found = explain(**what)
    print(as_text(found))
    if page:
        with write_whole(page) as file:
            file.write(as_html(found))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.explain", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--index", required=True, dest="folder",
                        help="a sparse index, of a model or of tools.bm25")
    parser.add_argument("--query", required=True)
    parser.add_argument("--docid", help="the best passage without it")
    parser.add_argument("--html", dest="page", help="also write a self-contained page here")
    parser.add_argument("--corpus", help="if it is no longer where the index was built from")
    parser.add_argument("--model", help="the same for the model")
    parser.add_argument("--hits", type=natural, default=3, help="best passages to list")
    parser.add_argument("--top", type=positive_int, default=12, help="expansion terms to show")
    args = parser.parse_args(argv)
    run_command(parser.prog, functools.partial(show, **vars(args)))


if __name__ == "__main__":
    main()
