"""Data for the demo, made from nothing but what is installed: texts, labels, a tokenizer and a small random Llama.

    python -m tools.demo_data --out data/demo --seed 0                        # real text: the docstrings of the installed packages
    python -m tools.demo_data --out data/syn --source synthetic               # a generated world with an oracle teacher

Both sources end in the files that real users have (a BEIR folder, or MS MARCO's tsv files with --layout msmarco), beside them
`train.jsonl` (the authors' training rows) and `model/` (Hugging Face layout, untrained). Same seed,
same packages: same texts; on the same machine: same bytes.

What surprises:
- pydocs reads source files with `ast` and imports nothing. Query: the docstring's first sentence; document: the signature and the rest, cut
  to 40 words and with identifiers taken apart, so that BM25 and the model see the same text and the same words in it.
- Packages repeat themselves. Dev and test pairs are drawn first, then every pair that shares half its words with one of them leaves the
  collection: no test pair has a twin in training, and none has a second right answer that nobody labelled. What likeness remains is
  written down: test.groups.json calls each test query far, middle or near by the word overlap with its nearest training pair.
- The model starts as a lexical matcher (`--init lexical`, the reason is at `write_model`). Real Llama weights need no such help.
"""
import argparse
import ast
import gc
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

# All of these stand wherever requirements.txt is installed: sympy and networkx come with torch, huggingface_hub with transformers.
PACKAGES = ["stdlib", "torch", "numpy", "transformers", "sympy", "networkx", "huggingface_hub"]
# Left out: tests, copies of other packages, and transformers' generated model files, which say the same few sentences four hundred times.
SKIP_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "onnx"}
SKIP_FILES = ("test_", "modeling_", "modular_")
TWIN = 0.5           # pairs whose queries, or whose documents, have this word overlap (Jaccard) count as the same pair
FAR, NEAR = 0.25, 0.35  # a test pair is far from training below, near above, and in the middle between
WORDS_A_DOCUMENT = 40
QUERY_LENGTH, PASSAGE_LENGTH = 32, 64  # tokens, for retriever.json: what the index encodes


def add_arguments(parser):
    """The flags."""
    parser.add_argument("--out", required=True, help="folder to write; must not exist yet, appears only when complete")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", choices=["pydocs", "synthetic"], default="pydocs", help="real docstrings, or a generated world with an oracle")
    parser.add_argument("--layout", choices=["beir", "msmarco"], default="beir", help="corpus.jsonl and friends, or collection.tsv and friends")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME", help="pydocs: installed packages to read (`numpy` alone takes a second)")
    parser.add_argument("--small", type=int, default=8000, help="pydocs: size of corpus.small, which holds all that dev and test ask for and indexes in half the time")
    parser.add_argument("--documents", type=int, default=4000, help="synthetic: size of the collection")
    parser.add_argument("--train_queries", type=int, default=20000, help="synthetic: number of training queries")
    parser.add_argument("--dev_queries", type=int, default=400, help="held-out queries to choose settings on")
    parser.add_argument("--test_queries", type=int, default=600, help="held-out queries to report")
    parser.add_argument("--teacher_noise", type=float, default=0.5, help="synthetic: standard deviation added to the oracle's scores (range 0 to 10)")
    parser.add_argument("--label_noise", type=float, default=0.0, help="synthetic: share of training rows whose positive is a wrong document")
    parser.add_argument("--vocab", type=int, default=4096, help="entries of the tokenizer trained on the training texts")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model (64 is enough for synthetic, and twice as fast)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--init", choices=["lexical", "default"], default="lexical", help="lexical: see write_model; default: Hugging Face's random start, from which the sparse head needs far longer")


def make(args):
    """Write everything below `args.out`; a folder that stands is complete, since it appears by one rename."""
    out, rng = Path(args.out), np.random.default_rng(args.seed)
    if out.exists():
        raise SystemExit(f"{out} exists already: remove it, or name another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # by a process that was killed
    partial.mkdir(parents=True)
    documents, queries, qrels, rows, groups = (pydocs if args.source == "pydocs" else synthetic)(args, rng)
    held_out = {docid for split in ("dev", "test") for _, docid, _ in qrels[split]}
    collections = {"": documents}
    if args.source == "pydocs":
        wanted = held_out | {row["pos_pid"] for row in rows[:max(0, args.small - len(held_out))]}  # training rows come in random order
        collections[".small"] = {docid: document for docid, document in documents.items() if docid in wanted}
    write_collection(partial, args.layout, collections, queries, qrels)
    write_lines(partial / "train.jsonl", map(json.dumps, rows))
    write_lines(partial / "test.groups.json", [json.dumps(groups)])
    share = Counter(groups.values())
    print("test queries: " + ", ".join(f"{share[group]} {group}" for group in sorted(share)))
    # Tokenizer and model may look at training pairs only.
    texts = [" ".join([*documents[row["pos_pid"]], row["question"]]) for row in rows]
    write_model(partial / "model", texts, args)
    partial.rename(out)
    print(f"{out}: {len(documents):,} documents, {len(rows):,} training rows, " + ", ".join(f"{len(qrels[s]):,} {s} queries" for s in ("dev", "test")))


# pydocs: real text. An item is (where it stands, signature, query, document).

def pydocs(args, rng):
    items = read_packages(args.packages)
    of_query, of_document = Overlap([item[2] for item in items]), Overlap([item[3] for item in items])
    likeness = lambda i: np.maximum(of_query.jaccard(i), of_document.jaccard(i))  # to every item, itself included

    # Hold out a random pair, let its twins go, repeat. A twin of a pair already held out is gone, so no two held-out pairs are twins either.
    held, gone = [], np.zeros(len(items), bool)
    wanted = args.dev_queries + args.test_queries
    for i in rng.permutation(len(items)):
        if len(held) < wanted and not gone[i]:
            gone |= likeness(i) >= TWIN  # itself included
            held.append(i)
    if (~gone).sum() < len(held):
        raise SystemExit(f"{len(items):,} docstrings are too few for {wanted:,} held-out queries: lower --dev_queries and --test_queries, or name more --packages")
    train = np.flatnonzero(~gone)
    dev, test = held[:args.dev_queries], held[args.dev_queries:]
    print(f"pydocs: {len(items):,} docstrings; {gone.sum() - len(held):,} left because they are twins of the {len(held):,} held out")

    documents = {f"d{i}": items[i][1::2] for i in sorted([*train, *held])}
    queries = {f"q{i}": items[i][2] for i in sorted([*train, *held])}
    nearest = {i: likeness(i)[train].max() for i in test}
    band = lambda share: "far" if share < FAR else "middle" if share < NEAR else "near"
    groups = {f"q{i}": band(nearest[i]) for i in sorted(test)}
    # No negatives yet: the first training uses the other passages of the batch, and `tools.mine` finds hard ones with what came of it.
    train = rng.permutation(train)
    rows = [{"question": items[i][2], "pos_pid": f"d{i}", "neg_pids": []} for i in train]
    splits = {"train": train, "dev": sorted(dev), "test": sorted(test)}
    return documents, queries, {split: [(f"q{i}", f"d{i}", 1) for i in splits[split]] for split in splits}, rows, groups


def read_packages(names):
    """Every usable docstring as (place, signature, query, document), in the order of packages and sorted file names."""
    files = []
    for name in names:
        if name == "stdlib":
            root = sysconfig.get_paths()["stdlib"]
        else:
            spec = importlib.util.find_spec(name)  # finds a top-level package without running it
            if spec is None:
                raise SystemExit(f"--packages {name}: not installed here (pip install {name}, or leave it out)")
            root = spec.submodule_search_locations[0]
        found = [path.relative_to(root) for path in Path(root).rglob("*.py")]
        files += [(name, root, str(path)) for path in sorted(found) if not SKIP_FOLDERS & set(path.parts) and not path.name.startswith(SKIP_FILES)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
        pairs = [pair for found in pool.map(read_file, files, chunksize=32) for pair in found]
    seen, items = set(), []
    for place, signature, query, document in pairs:  # word for word copies: the first one stays
        keys = {" ".join(words(query)), " ".join(words(document))}
        if not keys & seen:
            items.append((place, signature, query, document))
        seen |= keys
    return items


def read_file(file):
    """The docstring pairs of one source file."""
    name, root, path = file
    source = (Path(root) / path).read_bytes()
    if b'"""' not in source:
        return []
    gc.disable()  # a syntax tree is a million small objects without a cycle: collecting between them costs half the time
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken examples
        return []
    finally:
        gc.enable()
    pairs = [(f"{name}/{path}", *pair) for node, scope in definitions(tree.body) if (pair := split_docstring(node, scope))]
    return pairs


def definitions(body, scope=""):
    """Functions and classes with their dotted names; what is local to a function stays out."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node, scope + node.name
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, scope + node.name + ".")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from definitions(node.body, scope)


def split_docstring(node, name):
    """(signature, first sentence, the rest), or None where that makes no honest query and document."""
    doc = ast.get_docstring(node) or ""
    query, *rest = re.split(r"(?<=[.!?])\s+|\n\s*\n", doc, maxsplit=1)
    rest = re.sub(r"[-=~^*#]{3,}|>>>|\.\.\. ", " ", rest[0] if rest else "")  # rulers and prompts
    query, document = query.split(), rest.split()[:WORDS_A_DOCUMENT]
    if not 4 <= len(query) <= 32 or len(re.findall(r"[A-Za-z]{2,}", " ".join(document))) < 8:
        return None
    if len(doc.encode()) > 1.05 * len(doc):  # mostly another script
        return None
    if query[0].endswith(":") or query[1].startswith(("--", "(`")):  # `Args: ...`, `Parameters ----`, `x (`int`): ...`: a list, not a sentence
        return None
    arguments = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")] if hasattr(node, "args") else []
    return apart(f"{name}({', '.join(arguments)})"), apart(" ".join(query)), apart(" ".join(document))


def apart(text):
    """Identifiers as words, `nn.dictKeys_of` -> `nn dict Keys of`: BM25, which would take each for one long word, gets the same chance."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return " ".join(re.sub(r"(?<=\w)[_.](?=\w)|_", " ", text).split())


def words(text):
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


class Overlap:
    """Jaccard overlap of one text's words with every text's, by an inverted list for each word."""

    def __init__(self, texts):
        self.sets, postings = [set(words(text)) for text in texts], {}
        for i, terms in enumerate(self.sets):
            for term in terms:
                postings.setdefault(term, []).append(i)
        self.postings = {term: np.array(rows) for term, rows in postings.items()}
        self.sizes = np.array([len(terms) for terms in self.sets])

    def jaccard(self, i):
        shared = np.bincount(np.concatenate([self.postings[term] for term in self.sets[i]]), minlength=len(self.sets))
        return shared / (self.sizes + self.sizes[i] - shared)


# synthetic: a world of concepts, each with several words, some words with two meanings.

def synthetic(args, rng, topics=24, concepts=10, surfaces=4, homonyms=0.15):
    """Documents mention four concepts of one topic and two of another, queries ask for three of these, mostly in other words."""
    lexicon = make_words(rng, topics * concepts * surfaces + 200)
    filler, lexicon = np.array(lexicon[:200]), np.array(lexicon[200:]).reshape(topics * concepts, surfaces)
    for concept in np.flatnonzero(rng.random(len(lexicon)) < homonyms):  # its first word also means something else: only the words around it tell what
        lexicon[concept, 0] = lexicon[rng.integers(len(lexicon)), rng.integers(1, surfaces)]

    meant, spoken, documents = [], [], {}  # a document's concepts, those of the main topic first, and the one word it uses for each
    for row in range(args.documents):
        main, other = rng.choice(topics, 2, replace=False) * concepts
        meant.append([*(main + rng.choice(concepts, 4, replace=False)).tolist(), *(other + rng.choice(concepts, 2, replace=False)).tolist()])
        spoken.append(dict(zip(meant[row], rng.integers(surfaces, size=6).tolist())))
        text = [lexicon[c, spoken[row][c]] for c in meant[row] for _ in range(rng.integers(1, 3))] + rng.choice(filler, 8).tolist()
        documents[f"d{row}"] = ("", " ".join(rng.permutation(text)))
    holding = {}
    for row, inside in enumerate(meant):
        for concept in inside:
            holding.setdefault(concept, []).append(row)

    def ask(row):
        """(text, grades): a query for `row`, and the oracle's grade, the share of what is asked that a document has, wherever it is not 0."""
        asked = [*rng.choice(meant[row][:4], 2, replace=False).tolist(), int(rng.choice(meant[row][4:]))]
        other_word = lambda c: (spoken[row][c] + (rng.random() < 0.6) * rng.integers(1, surfaces)) % surfaces
        text = " ".join(rng.permutation([lexicon[c, other_word(c)] for c in asked] + rng.choice(filler, 2).tolist()))
        return text, {other: n / 3 for other, n in Counter(other for c in asked for other in holding[c]).items()}

    shuffled = rng.permutation(args.documents)
    unseen, seen = shuffled[:args.documents // 5], shuffled[args.documents // 5:]  # unseen: never a training positive; half of the test asks for these
    queries, qrels, rows, groups, wrong = {}, {"train": [], "dev": [], "test": []}, [], {}, 0
    for split, n in (("train", args.train_queries), ("dev", args.dev_queries), ("test", args.test_queries)):
        while len(qrels[split]) < n:
            far = split != "train" and len(qrels[split]) % 2 == 0
            row = int(rng.choice(unseen if far else seen))
            text, grades = ask(row)
            if sum(grade == 1 for grade in grades.values()) > 1:  # another document answers it in full as well: ask something else
                continue
            qid = f"q{len(queries)}"
            queries[qid] = text
            qrels[split].append((qid, f"d{row}", 1))
            if split == "test":
                groups[qid] = "unseen" if far else "seen"
            if split == "train":
                rows.append(oracle_row(text, row, grades, args, rng))
                wrong += rows[-1]["pos_pid"] != f"d{row}"
    print(f"synthetic: {len(lexicon)} concepts, {surfaces} words each; {wrong:,} of {len(rows):,} training labels are wrong on purpose")
    return documents, queries, qrels, rows, groups


def oracle_row(text, row, grades, args, rng, negatives=16):
    """A training row: hard negatives have some of what is asked for; the teacher's scores are 10 x the oracle's grade, and noise."""
    partial = sorted(grades.keys() - {row})
    hard = rng.choice(partial, min(negatives, len(partial)), replace=False).tolist()
    listed = [row, *hard]
    if rng.random() < args.label_noise:  # a half-right passage is called the positive, the right one a negative
        listed[:2] = hard[0], row
    scores = [round(10 * grades[other] + args.teacher_noise * rng.standard_normal(), 4) for other in listed]
    return {"question": text, "pos_pid": f"d{listed[0]}", "neg_pids": [f"d{other}" for other in listed[1:]], "pos_score": scores[0], "neg_scores": scores[1:]}


def make_words(rng, n):
    """n different pronounceable words of two or three syllables."""
    syllables, found = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"], {}
    while len(found) < n:
        found["".join(rng.choice(syllables, rng.integers(2, 4)))] = None
    return list(found)


# What both sources write.

def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_collection(out, layout, collections, queries, qrels):
    """The BEIR folder or MS MARCO's files; one file of queries a split beside the full list spares everyone a filter."""
    of = {split: {qid: queries[qid] for qid, _, _ in judged} for split, judged in qrels.items()}
    if layout == "msmarco":
        for name, documents in collections.items():
            write_lines(out / f"collection{name}.tsv", (f"{docid}\t{f'{title} {text}'.strip()}" for docid, (title, text) in documents.items()))
        for split, judged in qrels.items():
            write_lines(out / f"queries.{split}.tsv", (f"{qid}\t{text}" for qid, text in of[split].items()))
            write_lines(out / f"qrels.{split}.tsv", (f"{qid} 0 {docid} {grade}" for qid, docid, grade in judged))
        return
    (out / "qrels").mkdir(exist_ok=True)
    for name, documents in collections.items():
        write_lines(out / f"corpus{name}.jsonl", (json.dumps({"_id": docid, "title": title, "text": text}) for docid, (title, text) in documents.items()))
    for name, chosen in {"queries": queries, **{f"queries.{split}": of[split] for split in of}}.items():
        write_lines(out / f"{name}.jsonl", (json.dumps({"_id": qid, "text": text}) for qid, text in chosen.items()))
    for split, judged in qrels.items():
        write_lines(out / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *(f"{qid}\t{docid}\t{grade}" for qid, docid, grade in judged)])


def train_tokenizer(texts, vocab):
    """Byte-level BPE over single words: camelCase, snake_case, dots and digits come apart before it, case and punctuation go.

    Every piece thus starts with a space, so that `keys` in `dict_keys(x)` and in "the keys" is the same vocabulary entry."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    joints = r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
    bpe.normalizer = normalizers.Sequence([normalizers.Replace(Regex(joints), " "), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
                                           normalizers.Lowercase(), normalizers.Strip()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<s>", "</s>"], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return bpe


def word_vectors(texts, vocab, width):
    """(vocab, width) rows of length 1, near for entries that stand in the same texts: positive pointwise mutual information, the rarer partner
    damped as usual (counts ** 0.75), and its truncated SVD (Levy and Goldberg 2014). `texts` are lists of entries, each once."""
    import torch
    import torch.nn.functional as F

    sizes = torch.tensor([len(entries) for entries in texts])
    rows, entries = torch.repeat_interleave(torch.arange(len(texts)), sizes), torch.tensor([entry for entries in texts for entry in entries])
    holds = torch.sparse_coo_tensor(torch.stack([rows, entries]), torch.ones(len(rows)), (len(texts), vocab))
    shares = torch.sparse_coo_tensor(torch.stack([entries, rows]), 1 / sizes[rows], (vocab, len(texts))).coalesce()  # a long text says less of each pair
    together = torch.sparse.mm(shares, holds.to_dense()).fill_diagonal_(0)
    count = together.sum(1).clamp(min=1e-9)  # 0 for what no text has
    damped = count ** 0.75
    pmi = (together * damped.sum() / (count[:, None] * damped)).clamp(min=1).log()  # clamped where two meet less often than by chance
    u, s, _ = torch.svd_lowrank((pmi + pmi.T) / 2, q=width + 20, niter=3)
    return F.normalize(u[:, :width] * s[:width].sqrt())


def write_model(folder, texts, args):
    """A small random Llama with its tokenizer, in the Hugging Face layout.

    `--init lexical`: an untrained Llama matches nothing, since its logits are noise over the whole vocabulary; the FLOPs term then finds it
    cheapest to switch every entry off for good. So start as a lexical matcher, which training may then leave:
      1. output projections of attention and MLP are all but zero: the last hidden state is the token's own embedding, normalised (exactly zero
         would do for training, but then no check could tell a bidirectional model from a causal one);
      2. input and output embeddings are tied: the token's own logit, |e|^2, stands out among the random ones;
      3. the final norm's weight in dimension 0 is -1, so each logit is lowered by the product of what the two tokens hold there. That is at
         least what a random logit reaches, and nearly |e|^2 for a word that is in every text: after the relu little but the token's own logit
         survives, and a rare word weighs more than a common one, as in BM25. (Rows as long as their idf say the same in fewer words, but
         AdamW's steps have one size, and the short rows of the common words were soon overwritten);
      4. half of a row is random, for that word alone, and half is what the training texts say of the word in two seconds of linear algebra: a
         stand-in for the knowledge that real Llama weights bring. Expansion then starts from neighbours instead of chance."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    bpe = train_tokenizer(texts, args.vocab)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "mask_token": "</s>"}  # no text holds it, so MNTP can hide words behind it
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)
    torch.manual_seed(args.seed)
    config = LlamaConfig(vocab_size=bpe.get_vocab_size(), hidden_size=args.hidden, intermediate_size=2 * args.hidden, num_hidden_layers=args.layers,
                         num_attention_heads=max(1, args.hidden // 32), bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
                         max_position_embeddings=512, is_causal=False, initializer_range=args.hidden ** -0.5)
    model = LlamaForCausalLM(config)
    if args.init == "lexical":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(0.01)
                layer.mlp.down_proj.weight.mul_(0.01)
            model.model.norm.weight[0] = -1
            rows = model.model.embed_tokens.weight
            encoded = [sorted({*encoding.ids[1:]}) for encoding in bpe.encode_batch(texts)]  # without the <s> of every text
            rows[:, 1:] = F.normalize(F.normalize(rows[:, 1:]) + word_vectors(encoded, len(rows), args.hidden - 1))
            # A random logit has the deviation hidden ** -0.5; the largest of vocabulary x length lies 5 of them out.
            floor = 5 * args.hidden ** -0.5
            df = np.bincount([entry for entries in encoded for entry in entries], minlength=len(rows))
            idf = torch.from_numpy(np.log((len(texts) + 1) / (df + 1)) * (df > 0)).float()  # none for single bytes that no text has
            rows[:, 0] = (1 - max(0, 1 - floor) * idf / idf.max()).sqrt()
    model.save_pretrained(folder)
    (folder / "retriever.json").write_text(json.dumps({"query_length": QUERY_LENGTH, "passage_length": PASSAGE_LENGTH}) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="tools.demo_data", description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        make(args)
    except (ValueError, OSError) as e:
        sys.exit(f"{parser.prog}: {e}")


if __name__ == "__main__":
    main()
