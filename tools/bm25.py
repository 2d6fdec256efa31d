"""BM25: the baseline, and the first miner of hard negatives. An ordinary sparse index with other weights.

    python -m tools.bm25 build --corpus collection.tsv --out indexes/bm25
    python -m tools.bm25 search --index indexes/bm25 --queries train.tsv --k 200 --out runs/bm25/train.trec

What surprises:
- The folder is an ordinary SparseIndex: `SparseIndex.open`, `tools.explain` and `tools.export` take it as any
  other. Only queries need this file, since their words are found by its analysis and not by a model.
- A document's weight is idf * tf / (tf + k1 * (1 - b + b * length / average length)), as Lucene has it; a
  query's is its tf.
"""

import argparse
import functools
import os
import re
import shutil
import sys
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import index
from data import (Corpus, Help, fingerprint, locked, new_folder, non_negative, positive_int, run_command,
                  share)

# To us a CSR tensor is three arrays and a shape; nothing leans on its arithmetic.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# Words.

STOPWORDS = frozenset("a an and are as at be but by for if in into is it no not of on or such that the their "
                      "then there these they this to was will with".split())


def lower(text: str) -> str:
    # A letter with its accent is one character or two, and looks the same: NFC makes them one.
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text.lower())


@functools.cache
def word_pattern() -> re.Pattern:
    """A word: letters and digits of any script, and after the first the marks that belong to them, such as
    the vowels of Hindi and Thai, which are no letters to Python."""
    marks = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("M")]
    # They begin at U+0300. To look first whether a character is below that saves most looks at all of them.
    return re.compile(rf"[^\W_]+(?:(?![\0-\u02ff])[{''.join(marks)}]+[^\W_]*)*")


def analyze(text: str, stemming: bool) -> list[str]:
    """Lower case, runs of letters, digits and their marks, without Lucene's 33 English stop words.

    >>> analyze("The tides' hopping", stemming=True), analyze("हिन्दी", stemming=False)
    (['tide', 'hop'], ['हिन्दी'])
    """
    words = [word for word in word_pattern().findall(lower(text)) if word not in STOPWORDS]
    return [stem(word) for word in words] if stemming else words


# Steps 2, 3 and 4 of Porter (1980): the suffixes, what takes their place, and how much of a word must stand
# before them, in vowel-consonant turns.
PORTER = [
    (0, {"ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "abli": "able",
         "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate",
         "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al",
         "iviti": "ive", "biliti": "ble"}),
    (0, {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}),
    (1, dict.fromkeys("al ance ence er ic able ible ant ement ment ent ou ism ate iti ous ive ize sion "
                      "tion".split(), "")),
]


def shape(word: str) -> str:
    """A letter c or v for each consonant or vowel; a y after a consonant is a vowel.

    >>> shape("hopping"), shape("sky")
    ('cvccvcc', 'ccv')
    """
    kinds = ""
    for letter in word:
        kinds += "v" if letter in "aeiou" or letter == "y" and kinds[-1:] == "c" else "c"
    return kinds


def turns(word: str) -> int:
    """How often a run of vowels is followed by a run of consonants: Porter's measure m."""
    return len(re.findall("v+c+", shape(word)))


def is_short(word: str) -> bool:
    """Ends as `hop` does: consonant, vowel, consonant, the last not w, x or y."""
    return shape(word).endswith("cvc") and word[-1] not in "wxy"


@functools.lru_cache(1 << 20)
def stem(word: str) -> str:
    """Porter's algorithm.

    >>> [stem(word) for word in ("relational", "hopping", "skies")]
    ['relat', 'hop', 'ski']
    """
    if len(word) <= 2:
        return word
    # Step 1a: plurals.
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    # Step 1b: -eed, -ed and -ing; what is left gets its e back, or loses a doubled letter.
    ending = re.search("(ed|ing)$", word)
    if word.endswith("eed"):
        word = word[:-1] if turns(word[:-3]) > 0 else word
    elif ending and "v" in shape(word[:ending.start()]):
        word = word[:ending.start()]
        if word.endswith(("at", "bl", "iz")) or turns(word) == 1 and is_short(word):
            word += "e"
        elif word[-1:] == word[-2:-1] and shape(word)[-1] == "c" and word[-1] not in "lsz":
            word = word[:-1]
    # Step 1c: y becomes i.
    if word.endswith("y") and "v" in shape(word[:-1]):
        word = word[:-1] + "i"
    for least, suffixes in PORTER:
        # The longest suffix that fits decides, even if it then may not go.
        for suffix in sorted(suffixes, key=len, reverse=True):
            if word.endswith(suffix):
                # In step 4, -sion and -tion keep the letter before -ion.
                kept = suffix[0] if suffix in ("sion", "tion") and least else ""
                root = word[:-len(suffix)] + kept
                word = root + suffixes[suffix] if turns(root) > least else word
                break
    # Step 5: a last e, and one of two l.
    if word.endswith("e") and (turns(word[:-1]) > 1 or turns(word[:-1]) == 1 and not is_short(word[:-1])):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and turns(word[:-1]) > 1 else word


# The index.

# Counted at a time, and then put on disk until all of them are known.
PASSAGES = 20_000


def build(corpus, out, k1: float = 0.9, b: float = 0.4, stemming: bool = False) -> Path:
    """An index folder of idf * tf / (tf + k1 * (1 - b + b * length / average length)), with
    idf = ln(1 + (N - df + 0.5) / (df + 0.5))."""
    docs = Corpus(corpus)
    manifest = {"encoder": {"kind": "bm25", "k1": k1, "b": b, "stemming": stemming},
                "corpus": os.path.abspath(corpus), "state of the corpus": fingerprint(docs.source)}
    with locked(out), new_folder(out) as aside:
        # A weight depends on all passages, by idf and the average length: so counts come first.
        firsts, vocab, df, lengths = count_words(docs, stemming, aside / "counts")
        idf = torch.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
        # A corpus without a word has no average length.
        average = max(lengths.mean() if len(docs) else 1, 1e-9)
        norm = torch.from_numpy(k1 * (1 - b + b * lengths / average)).float()

        def pieces():
            for first in firsts:
                with np.load(aside / "counts" / f"{first}.npz") as shard:
                    ends, terms, tf = (torch.from_numpy(shard[name]) for name in ("ends", "terms", "tf"))
                length = norm[first:first + len(ends) - 1].repeat_interleave(ends.diff())
                yield first, ends, terms, idf[terms] * tf / (tf + length)

        # As any other index from here on.
        arrays, _ = index.invert(pieces, len(vocab), "fp32", aside)
        index.finish(aside, arrays, manifest, map(docs.docid, range(len(docs))), list(vocab))
        shutil.rmtree(aside / "counts")
    print(f"{out}: {len(docs):,} passages, {len(vocab):,} terms")
    return Path(out)


def count_words(docs: Corpus, stemming: bool,
                folder: Path) -> tuple[range, dict[str, int], Tensor, np.ndarray]:
    """The words of all passages into `folder`, a file for each PASSAGES of them: the files' first rows,
    word -> term, in how many passages each term is, and how long each passage is."""
    folder.mkdir()
    firsts, vocab, lengths = range(0, len(docs), PASSAGES), {}, np.zeros(len(docs))
    df = torch.zeros(0)
    with tqdm(total=len(docs), unit=" passages", desc="counting words") as bar:
        for first in firsts:
            ends, terms, tf = [0], [], []
            for row in range(first, min(first + PASSAGES, len(docs))):
                # A word's term is its place in the order of first appearance.
                count = Counter(analyze(docs[row], stemming))
                lengths[row] = count.total()
                terms += [vocab.setdefault(word, len(vocab)) for word in count]
                tf += count.values()
                ends.append(len(terms))
                bar.update()
            terms = np.array(terms, np.int32)
            np.savez(folder / f"{first}.npz", ends=np.array(ends), terms=terms, tf=np.array(tf, np.float32))
            df = torch.nn.functional.pad(df, (0, len(vocab) - len(df)))
            df += torch.bincount(torch.from_numpy(terms), minlength=len(vocab))
    return firsts, vocab, df, lengths


class Words:
    """Texts to vectors for such an index: `encode` and `origins`, as a Retriever has them."""

    def __init__(self, folder):
        encoder = index.read_manifest(folder).get("encoder") or {}
        if encoder.get("kind") != "bm25":
            raise ValueError(f"{folder} holds a model's weights, not BM25's: python index.py search --index "
                             f"{folder}")
        self.stemming = encoder["stemming"]
        self.names = index.vocabulary(folder)
        self.term_of = {word: term for term, word in enumerate(self.names)}

    def encode(self, texts: list[str], kind: str = "query", max_length=None) -> Tensor:
        """(texts, vocabulary), a CSR tensor: how often a text holds a word. Unknown words find nothing."""
        rows = [Counter(analyze(text, self.stemming)) for text in texts]
        rows = [{self.term_of[word]: n for word, n in row.items() if word in self.term_of} for row in rows]
        starts = np.cumsum([0, *map(len, rows)])
        terms = torch.tensor([term for row in rows for term in row], dtype=torch.int64)
        counts = torch.tensor([n for row in rows for n in row.values()], dtype=torch.float32)
        shape = (len(texts), len(self.names))
        return torch.sparse_csr_tensor(torch.from_numpy(starts), terms, counts, shape, check_invariants=False)

    def origins(self, text: str, kind: str, terms: list[int], max_length=None) -> tuple[list[str], list]:
        """The text in pieces, words and what is between; and for each term the place of its first word, None
        if the text does not hold it."""
        # Lowered before it is cut, as `analyze` does: a Greek sigma at a word's end depends on what follows.
        lowered, written = lower(text), unicodedata.normalize("NFC", text)
        spans = [piece.span() for piece in re.finditer(rf"{word_pattern().pattern}|[\W_]+", lowered)]
        first = {}
        for place, (start, end) in enumerate(spans):
            for word in analyze(lowered[start:end], self.stemming):
                first.setdefault(word, place)
        # Shown as it was written, unless lower case has another length and would shift the places.
        shown = written if len(written) == len(lowered) else lowered
        pieces = [shown[start:end] for start, end in spans]
        return pieces, [first.get(self.names[term]) for term in terms]


def search(folder, queries, k: int = 1000, out=None,
           threads: int | None = None) -> dict[str, dict[str, float]]:
    """index.search, with the words of `queries` for terms: {qid: {docid: score}}, and a TREC run at `out`."""
    return index.search(folder, queries, k, out, encoder=Words(folder), threads=threads, device="cpu")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.bm25", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("build", help="an index folder of BM25 weights", allow_abbrev=False,
                            formatter_class=Help)
    p.add_argument("--corpus", required=True, help="collection.tsv, corpus.jsonl or a BEIR folder")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--k1", type=non_negative, default=0.9,
                   help="0.9 and 0.4 are Anserini's for MS MARCO; Lucene's own are 1.2 and 0.75")
    p.add_argument("--b", type=share, default=0.4)
    p.add_argument("--stemming", action="store_true", help="Porter's stems, as in Anserini (English)")

    p = commands.add_parser("search", help="queries to a TREC run", allow_abbrev=False, formatter_class=Help)
    p.add_argument("--index", required=True, dest="folder")
    p.add_argument("--queries", required=True, help="tsv, jsonl or a BEIR folder")
    p.add_argument("--out", required=True, help="run file to write")
    p.add_argument("--k", type=positive_int, default=1000)
    p.add_argument("--threads", type=positive_int,
                   help="queries searched at once; torch's number of threads without it")

    args = vars(parser.parse_args(argv))
    call = {"build": build, "search": search}[args.pop("command")]
    run_command(parser.prog, functools.partial(call, **args))


if __name__ == "__main__":
    main()
