"""Data for the demo, made from what is installed: texts, labels, a tokenizer, a small random Llama.

    python -m tools.demo_data --out data/demo                      # the docstrings of the installed packages
    python -m tools.demo_data --out data/syn --source synthetic    # a generated world with an oracle teacher
    python -m tools.demo_data --out data/wide --model_only data/demo --hidden 256    # another model for it

Both sources end in the files that real users have: a BEIR folder, or MS MARCO's tsv files (--layout msmarco).
Beside them stand `train.jsonl` (the authors' training rows) and `model/` (Hugging Face layout, untrained).
The same seed and the same packages give the same texts, and on the same machine the same bytes.

What surprises:
- Docstrings are read from source files with `ast`; nothing is imported. The query is the docstring's first
  sentence. The document is the signature and the rest, cut to 40 words. Identifiers are taken apart, so that
  BM25 and the model see the same words in a text.
- Packages repeat themselves. Dev and test pairs are drawn first; then every pair that shares half its words
  with one of them leaves the collection. So no test pair has a twin in training, and none has a second right
  answer that nobody labelled. test.groups.json says how like its nearest training pair a test query still is:
  far, middle or near.
- The model starts as a lexical matcher (`--init lexical`; `start_as_lexical_matcher` says why and how). Real
  Llama weights need no such help.
"""
import argparse
import ast
import gc
import importlib.util
import json
import os
import re
import signal
import sys
import sysconfig
from collections import Counter
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import (CORPUS_FILES, Help, find_in, locked, natural, new_folder, non_negative, positive_int,
                  read_queries, run_command, share)

# All of these stand wherever requirements.txt is installed: sympy and networkx come with torch,
# huggingface_hub with transformers.
PACKAGES = ["stdlib", "torch", "numpy", "transformers", "sympy", "networkx", "huggingface_hub"]
# Left out: tests, copies of other packages, and transformers' generated model files, which say the same few
# sentences four hundred times.
SKIP_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor",
                "onnx"}
SKIP_FILES = ("test_", "modeling_", "modular_")

# Overlaps are Jaccard's: the share of the words of two texts that both of them hold.
# Two pairs with this overlap of their queries, or of their documents, count as the same pair.
TWIN = 0.5
# A test pair is far from training below, near above, and in the middle between.
FAR, NEAR = 0.25, 0.35

WORDS_A_DOCUMENT = 40
# Tokens. They go into retriever.json, which tells the index to encode so many and no more.
QUERY_LENGTH, PASSAGE_LENGTH = 32, 64


class World(NamedTuple):
    """What a source makes, before it is written."""
    documents: dict[str, tuple[str, str]]  # docid -> (title, text)
    queries: dict[str, str]
    qrels: dict[str, list[tuple[str, str, int]]]  # split -> [(qid, docid, grade)]
    rows: list[dict]  # training rows, as in train.jsonl
    groups: dict[str, str]  # test qid -> its group


def make(args):
    """Write everything below `args.out`; the folder appears whole or not at all."""
    if args.model_only:
        with locked(args.out), new_folder(args.out) as out:
            write_model(out, training_texts(Path(args.model_only)), args)
        print(f"{args.out}: a model for {args.model_only}")
        return

    with locked(args.out), new_folder(args.out) as out:
        source = pydocs if args.source == "pydocs" else synthetic
        world = source(args, np.random.default_rng(args.seed))
        collections = {"": world.documents}
        if args.source == "pydocs":
            collections[".small"] = small_collection(world, args.small)
        write_collection(out, args.layout, collections, world)
        write_lines(out / "train.jsonl", map(json.dumps, world.rows))
        write_lines(out / "test.groups.json", [json.dumps(world.groups)])
        write_model(out / "model", training_texts(out), args)

    sizes = Counter(world.groups.values())
    print("test queries: " + ", ".join(f"{sizes[group]} {group}" for group in sorted(sizes)))
    print(f"{args.out}: {len(world.documents):,} documents, {len(world.rows):,} training rows, "
          f"{len(world.qrels['dev']):,} dev queries, {len(world.qrels['test']):,} test queries")


def small_collection(world, size):
    """All documents that dev and test ask for, filled up with training documents; half the time to index."""
    wanted = {docid for split in ("dev", "test") for _, docid, _ in world.qrels[split]}
    # Training rows stand in random order, so the first ones are a random choice.
    wanted |= {row["pos"][0] for row in world.rows[:max(0, size - len(wanted))]}
    return {docid: document for docid, document in world.documents.items() if docid in wanted}


# pydocs: real text.

class Item(NamedTuple):
    """A docstring, taken apart."""
    signature: str
    query: str
    document: str


def pydocs(args, rng) -> World:
    """Pairs of a docstring's first sentence and its rest."""
    items = read_packages(args.packages)
    by_query = Overlap([item.query for item in items])
    by_document = Overlap([item.document for item in items])

    def likeness(i):
        """(items,) how like item i each of them is, i itself included."""
        return np.maximum(by_query.jaccard(i), by_document.jaccard(i))

    # Hold out a random pair, let its twins go, repeat. A twin of a pair already held out is gone, so no two
    # pairs that are held out are twins either.
    held, gone = [], np.zeros(len(items), bool)
    wanted = args.dev_queries + args.test_queries
    for i in rng.permutation(len(items)):
        if len(held) < wanted and not gone[i]:
            gone |= likeness(i) >= TWIN
            held.append(i)
    if (~gone).sum() < len(held):
        raise ValueError(f"{len(items):,} docstrings are too few for {wanted:,} held-out queries: "
                         "lower --dev_queries and --test_queries, or name more --packages")
    train = np.flatnonzero(~gone)
    dev, test = sorted(held[:args.dev_queries]), sorted(held[args.dev_queries:])
    print(f"pydocs: {len(items):,} docstrings; {gone.sum() - len(held):,} left because they are twins "
          f"of the {len(held):,} held out")

    groups = {f"q{i}": group_of(likeness(i)[train].max()) for i in test}
    kept = sorted([*train, *held])
    train = rng.permutation(train)
    splits = {"train": train, "dev": dev, "test": test}
    return World(
        documents={f"d{i}": (items[i].signature, items[i].document) for i in kept},
        queries={f"q{i}": items[i].query for i in kept},
        qrels={split: [(f"q{i}", f"d{i}", 1) for i in members] for split, members in splits.items()},
        # No negatives yet: the first training uses the other passages of its batch, and what came of it then
        # finds hard ones (tools.mine).
        rows=[{"query": items[i].query, "pos": [f"d{i}"], "neg": []} for i in train],
        groups=groups)


def group_of(overlap):
    """
    >>> [group_of(overlap) for overlap in (0.1, 0.3, 0.4)]
    ['far', 'middle', 'near']
    """
    if overlap < FAR:
        return "far"
    return "middle" if overlap < NEAR else "near"


def read_packages(names) -> list[Item]:
    """Every usable docstring, in the order of packages and sorted file names; word for word copies once."""
    files = [file for name in names for file in source_files(name)]
    found = []
    with Pool(available_cores(), initializer=leave_signals_to_the_parent) as pool:
        read = pool.imap(read_file, files, chunksize=32)
        for items in tqdm(read, desc="reading source", total=len(files), unit=" files"):
            found += items
    seen, items = set(), []
    for item in found:
        # Equal words are equal texts, whatever stands between them.
        keys = {" ".join(words(item.query)), " ".join(words(item.document))}
        if not keys & seen:
            items.append(item)
        seen |= keys
    return items


def leave_signals_to_the_parent():
    """A reader ignores Ctrl-C: the parent hears it, too, and ends its readers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def available_cores():
    # A container may own fewer cores than the machine has; macOS cannot tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def source_files(name):
    """[(root, path below it)] of an installed package, or of Python's own library."""
    if name == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
    else:
        # This finds a top-level package without running it.
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"--packages {name}: no such folder of modules is installed here "
                             f"(pip install {name}, or leave it out)")
        root = spec.submodule_search_locations[0]
    paths = sorted(path.relative_to(root) for path in Path(root).rglob("*.py"))
    return [(root, path) for path in paths
            if not SKIP_FOLDERS & set(path.parts) and not path.name.startswith(SKIP_FILES)]


def read_file(file) -> list[Item]:
    """The docstrings of one source file that make an honest pair."""
    root, path = file
    source = Path(root, path).read_bytes()
    # Parsing is the slow part, and a file without such quotes has next to no docstrings.
    if b'"""' not in source:
        return []
    # A syntax tree is a million small objects without a cycle: collecting garbage costs half the time.
    gc.disable()
    try:
        tree = ast.parse(source)
    # Packages carry templates, and examples that are broken on purpose.
    except (SyntaxError, ValueError):
        return []
    finally:
        gc.enable()
    items = [split_docstring(node, name) for node, name in definitions(tree.body)]
    return [item for item in items if item]


def definitions(body, scope=""):
    """Functions and classes with their dotted names; what is local to a function stays out."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node, scope + node.name
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, scope + node.name + ".")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from definitions(node.body, scope)


def split_docstring(node, name) -> Item | None:
    """Signature, first sentence and the rest, or None where that makes no honest query and document."""
    doc = ast.get_docstring(node) or ""
    first, *rest = re.split(r"(?<=[.!?])\s+|\n\s*\n", doc, maxsplit=1)
    # Rulers and prompts are no words.
    rest = re.sub(r"[-=~^*#]{3,}|>>>|\.\.\. ", " ", rest[0] if rest else "")
    query, document = first.split(), rest.split()[:WORDS_A_DOCUMENT]
    if not 4 <= len(query) <= 32 or len(re.findall(r"[A-Za-z]{2,}", " ".join(document))) < 8:
        return None
    # More than a few letters outside ASCII: another script, or formulas, that `words` would not see.
    if len(doc.encode()) > 1.05 * len(doc):
        return None
    # `Args: ...`, `Parameters ----` and `x (`int`): ...` are lists, not sentences.
    if query[0].endswith(":") or query[1].startswith(("--", "(`")):
        return None

    arguments = []
    if hasattr(node, "args"):
        names = [argument.arg for argument in node.args.args + node.args.kwonlyargs]
        arguments = [argument for argument in names if argument not in ("self", "cls")]
    signature = f"{name}({', '.join(arguments)})"
    return Item(apart(signature), apart(" ".join(query)), apart(" ".join(document)))


def apart(text):
    """Identifiers as words. BM25 would take each for one long word; so it gets the same chance as the model.

    >>> apart("nn.dictKeys_of(HTTPServer)")
    'nn dict Keys of(HTTP Server)'
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return " ".join(re.sub(r"(?<=\w)[_.](?=\w)|_", " ", text).split())


def words(text):
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


class Overlap:
    """Jaccard overlap of one text's words with those of every text, by an inverted list for each word.

    >>> Overlap(["a cat sat", "a cat ran", "dogs"]).jaccard(0).tolist()
    [1.0, 0.5, 0.0]
    """

    def __init__(self, texts):
        self.sets, lists = [set(words(text)) for text in texts], {}
        for i, terms in enumerate(self.sets):
            for term in terms:
                lists.setdefault(term, []).append(i)
        self.lists = {term: np.array(members) for term, members in lists.items()}
        self.sizes = np.array([len(terms) for terms in self.sets])

    def jaccard(self, i):
        # A text is mentioned once for each word that it shares with text i.
        mentions = np.concatenate([self.lists[term] for term in self.sets[i]])
        shared = np.bincount(mentions, minlength=len(self.sets))
        return shared / (self.sizes + self.sizes[i] - shared)


# synthetic: a world of concepts, each with several words, some words with two meanings.

# How many topics, concepts a topic, and words a concept.
TOPICS, CONCEPTS, SURFACES = 24, 10, 4
# The share of concepts with a word that also means something else.
HOMONYMS = 0.15
# How many words mean nothing.
FILLER = 200


class Concepts:
    """Documents mention four concepts of one topic and two of another, each by one of its words.

    A query asks for three of a document's concepts, mostly in other words: word match is not enough."""

    def __init__(self, n_documents, rng):
        self.rng = rng
        made_up = make_words(rng, TOPICS * CONCEPTS * SURFACES + FILLER)
        self.filler = np.array(made_up[:FILLER])
        self.lexicon = np.array(made_up[FILLER:]).reshape(TOPICS * CONCEPTS, SURFACES)
        # A homonym: a concept's first word is another concept's, too. Only the words around it tell which.
        for concept in np.flatnonzero(rng.random(len(self.lexicon)) < HOMONYMS):
            other = rng.integers(len(self.lexicon))
            self.lexicon[concept, 0] = self.lexicon[other, rng.integers(1, SURFACES)]

        self.meant = []  # a document's concepts, those of the main topic first
        self.spoken = []  # {concept: which of its words the document uses}
        self.holding = {}  # concept -> documents
        self.documents = {f"d{row}": ("", self.write(row)) for row in range(n_documents)}

    def write(self, row):
        """The text of a new document."""
        main, other = self.rng.choice(TOPICS, 2, replace=False) * CONCEPTS
        meant = (main + self.rng.choice(CONCEPTS, 4, replace=False)).tolist()
        meant += (other + self.rng.choice(CONCEPTS, 2, replace=False)).tolist()
        self.meant.append(meant)
        self.spoken.append(dict(zip(meant, self.rng.integers(SURFACES, size=6).tolist())))
        for concept in meant:
            self.holding.setdefault(concept, []).append(row)
        # A concept is said once or twice.
        text = []
        for concept in meant:
            text += [self.lexicon[concept, self.spoken[row][concept]]] * self.rng.integers(1, 3)
        text += self.rng.choice(self.filler, 8).tolist()
        return " ".join(self.rng.permutation(text))

    def ask(self, row):
        """A query for a document, and the oracle's grades: the share of what is asked that a document has."""
        asked = self.rng.choice(self.meant[row][:4], 2, replace=False).tolist()
        asked.append(int(self.rng.choice(self.meant[row][4:])))
        text = [self.lexicon[concept, self.another_word(row, concept)] for concept in asked]
        text += self.rng.choice(self.filler, 2).tolist()
        text = " ".join(self.rng.permutation(text))
        found = Counter(other for concept in asked for other in self.holding[concept])
        return text, {other: n / len(asked) for other, n in found.items()}

    def another_word(self, row, concept):
        """Which word of a concept a query uses: in six of ten cases not the document's."""
        step = (self.rng.random() < 0.6) * self.rng.integers(1, SURFACES)
        return (self.spoken[row][concept] + step) % SURFACES


def synthetic(args, rng) -> World:
    """The generated world, with training rows that carry an oracle's scores."""
    concepts = Concepts(args.documents, rng)
    shuffled = rng.permutation(args.documents)
    # Unseen documents are never a training positive; half of the test asks for them.
    unseen, seen = shuffled[:args.documents // 5], shuffled[args.documents // 5:]
    queries, qrels, rows, groups, wrong = {}, {}, [], {}, 0
    sizes = {"train": args.train_queries, "dev": args.dev_queries, "test": args.test_queries}
    for split, size in sizes.items():
        qrels[split] = []
        while len(qrels[split]) < size:
            far = split != "train" and len(qrels[split]) % 2 == 0
            row = int(rng.choice(unseen if far else seen))
            text, grades = concepts.ask(row)
            # Another document answers it in full as well: ask something else.
            if list(grades.values()).count(1) > 1:
                continue
            qid = f"q{len(queries)}"
            queries[qid] = text
            qrels[split].append((qid, f"d{row}", 1))
            if split == "test":
                groups[qid] = "unseen" if far else "seen"
            if split == "train":
                rows.append(oracle_row(text, row, grades, args, rng))
                wrong += rows[-1]["pos"] != [f"d{row}"]
    print(f"synthetic: {len(concepts.lexicon)} concepts, {SURFACES} words each; "
          f"{wrong:,} of {len(rows):,} training labels are wrong on purpose")
    return World(concepts.documents, queries, qrels, rows, groups)


def oracle_row(text, row, grades, args, rng, negatives=16):
    """A training row. Hard negatives have some of what is asked for; scores are 10 x grade, and noise."""
    partial = sorted(grades.keys() - {row})
    hard = rng.choice(partial, min(negatives, len(partial)), replace=False).tolist()
    listed = [row, *hard]
    # A wrong label: a half-right passage is called the positive, the right one a negative.
    if rng.random() < args.label_noise:
        listed[:2] = hard[0], row
    noise = [args.teacher_noise * rng.standard_normal() for _ in listed]
    scores = [round(10 * grades[other] + extra, 4) for other, extra in zip(listed, noise)]
    return {"query": text, "pos": [f"d{listed[0]}"], "neg": [f"d{other}" for other in listed[1:]],
            "pos_scores": scores[:1], "neg_scores": scores[1:]}


def make_words(rng, n):
    """n different words of two or three syllables that can be pronounced."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    found = {}
    while len(found) < n:
        found["".join(rng.choice(syllables, rng.integers(2, 4)))] = None
    return list(found)


# What both sources write.

def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_collection(out, layout, collections, world):
    """A BEIR folder, or MS MARCO's files; a file of queries for each split, so that nobody has to filter."""
    if layout == "msmarco":
        for name, documents in collections.items():
            lines = [f"{docid}\t{f'{title} {text}'.strip()}" for docid, (title, text) in documents.items()]
            write_lines(out / f"collection{name}.tsv", lines)
        for split, judged in world.qrels.items():
            lines = [f"{qid}\t{world.queries[qid]}" for qid, _, _ in judged]
            write_lines(out / f"queries.{split}.tsv", lines)
            lines = [f"{qid} 0 {docid} {grade}" for qid, docid, grade in judged]
            write_lines(out / f"qrels.{split}.tsv", lines)
        return

    for name, documents in collections.items():
        records = [{"_id": docid, "title": title, "text": text} for docid, (title, text) in documents.items()]
        write_lines(out / f"corpus{name}.jsonl", map(json.dumps, records))
    records = {qid: {"_id": qid, "text": text} for qid, text in world.queries.items()}
    write_lines(out / "queries.jsonl", map(json.dumps, records.values()))
    (out / "qrels").mkdir()
    for split, judged in world.qrels.items():
        write_lines(out / f"queries.{split}.jsonl", [json.dumps(records[qid]) for qid, _, _ in judged])
        lines = [f"{qid}\t{docid}\t{grade}" for qid, docid, grade in judged]
        write_lines(out / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *lines])


def training_texts(folder):
    """The training pairs as one text each: nothing else may teach the tokenizer or the model's start."""
    # Documents are read as queries are: {id: text}. A Corpus would leave its store in the folder.
    documents = read_queries(find_in(folder, CORPUS_FILES))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return [f"{documents[row['pos'][0]]} {row['query']}" for row in rows]


# The model.

def write_model(folder, texts, args):
    """A small random Llama with its tokenizer, in the Hugging Face layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = train_tokenizer(texts, args.vocab)
    # No text holds </s>, so MNTP can hide words behind it.
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "mask_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)

    torch.manual_seed(args.seed)
    # With this range an embedding has about the length 1, whatever the width.
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=args.hidden, intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=max(1, args.hidden // 32),
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=args.hidden ** -0.5,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, is_causal=False)
    model = LlamaForCausalLM(config)
    if args.init == "lexical":
        # Without the <s> of every text.
        entries = [sorted(set(encoding.ids[1:])) for encoding in tokenizer.encode_batch(texts)]
        start_as_lexical_matcher(model, entries)
    model.save_pretrained(folder)
    settings = {"query_length": QUERY_LENGTH, "passage_length": PASSAGE_LENGTH}
    write_lines(Path(folder) / "retriever.json", [json.dumps(settings)])


def train_tokenizer(texts, vocab):
    """Byte-level BPE over single words: camelCase, snake_case, dots and digits come apart, case goes.

    Every piece thus starts with a space: `keys` in `dict_keys(x)` and in "the keys" is the same entry."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    lower_upper, acronym_end = r"(?<=[a-z])(?=[A-Z])", r"(?<=[A-Z])(?=[A-Z][a-z])"
    letter_digit, digit_letter = r"(?<=[A-Za-z])(?=[0-9])", r"(?<=[0-9])(?=[A-Za-z])"
    joints = "|".join([lower_upper, acronym_end, letter_digit, digit_letter])
    punctuation = r"[^\p{L}\p{N}]+"

    tokenizer = Tokenizer(models.BPE())
    # Case goes last: it is what shows where camelCase comes apart.
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Replace(Regex(joints), " "), normalizers.Replace(Regex(punctuation), " "),
        normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def start_as_lexical_matcher(model, entries):
    """Change a random Llama so that its sparse head says little but a text's own words, the rare ones louder.

    An untrained Llama matches nothing: its logits are noise over the whole vocabulary. The FLOPs term then
    finds it cheapest to switch every entry off for good. `entries`: for each training text the vocabulary
    entries in it, each once."""
    import torch
    import torch.nn.functional as F

    hidden, n_texts = model.config.hidden_size, len(entries)
    embeddings = model.model.embed_tokens.weight
    with torch.no_grad():
        # 1. Attention and MLP write next to nothing, so the last hidden state is the token's own embedding,
        #    normalised. (Zero would do for training, but then no check could tell a bidirectional model from
        #    a causal one.) Input and output embeddings are tied: the token's own logit, |e|^2, stands out.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)

        # 2. Half of a row is random, for that word alone. Half is what the training texts say of the word, a
        #    stand-in for what real Llama weights know: expansion starts from neighbours instead of chance.
        known = word_vectors(entries, len(embeddings), hidden - 1)
        embeddings[:, 1:] = F.normalize(F.normalize(embeddings[:, 1:]) + known)

        # 3. The final norm's weight in dimension 0 is -1, so each logit is lowered by the product of what the
        #    two tokens hold there. That product is at least what a random logit reaches (its deviation is
        #    hidden ** -0.5, and the largest of vocabulary x length lies 5 of them out), and nearly |e|^2 for
        #    a word that is in every text. After the relu little but the token's own logit survives, and a
        #    rare word weighs more than a common one, as in BM25. (Rows as long as their idf would do the
        #    same, but AdamW's steps have one size: the short rows of common words were soon overwritten.)
        model.model.norm.weight[0] = -1
        floor = 5 * hidden ** -0.5
        df = np.bincount([entry for text in entries for entry in text], minlength=len(embeddings))
        # None for the single bytes that no text has: their idf would be the largest of all.
        idf = np.log((n_texts + 1) / (df + 1)) * (df > 0)
        idf = torch.from_numpy(idf).float()
        embeddings[:, 0] = (1 - max(0, 1 - floor) * idf / idf.max()).sqrt()


def word_vectors(entries, vocab, width):
    """(vocab, width) rows of length 1 that are near for entries which stand in the same texts.

    Positive pointwise mutual information and its truncated SVD (Levy and Goldberg 2014)."""
    import torch
    import torch.nn.functional as F

    sizes = torch.tensor([len(text) for text in entries])
    rows = torch.repeat_interleave(torch.arange(len(entries)), sizes)
    columns = torch.tensor([entry for text in entries for entry in text])
    # A long text says less of each pair of its words.
    weight = 1 / sizes[rows]
    holds = torch.sparse_coo_tensor(
        torch.stack([rows, columns]), torch.ones(len(rows)), (len(entries), vocab), check_invariants=False)
    shares = torch.sparse_coo_tensor(
        torch.stack([columns, rows]), weight, (vocab, len(entries)), check_invariants=False)
    together = torch.sparse.mm(shares.coalesce(), holds.to_dense()).fill_diagonal_(0)

    count = together.sum(1).clamp(min=1e-9)  # 0 for what no text has
    # To the power of 0.75, as word2vec does it: else words that hardly occur have the largest PMI.
    damped = count ** 0.75
    ratio = together * damped.sum() / (count[:, None] * damped)
    pmi = ratio.clamp(min=1).log()  # 0 where two meet less often than by chance
    u, s, _ = torch.svd_lowrank((pmi + pmi.T) / 2, q=width + 20, niter=3)
    return F.normalize(u[:, :width] * s[:width].sqrt())


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="tools.demo_data", description=__doc__.split("\n")[0], formatter_class=Help, allow_abbrev=False)
    flag = parser.add_argument
    flag("--out", required=True, help="folder to write; must not exist yet, appears only when complete")
    flag("--seed", type=natural, default=0)
    flag("--source", choices=["pydocs", "synthetic"], default="pydocs",
         help="real docstrings, or a generated world with an oracle")
    flag("--layout", choices=["beir", "msmarco"], default="beir",
         help="corpus.jsonl and friends, or collection.tsv and friends")
    flag("--dev_queries", type=positive_int, default=400, help="held-out queries to choose settings on")
    flag("--test_queries", type=positive_int, default=600, help="held-out queries to report")

    flag = parser.add_argument_group("pydocs").add_argument
    flag("--packages", nargs="+", default=PACKAGES, metavar="NAME",
         help="installed packages to read (`numpy` alone takes a second)")
    flag("--small", type=positive_int, default=8000,
         help="size of corpus.small, which holds all that dev and test ask for")

    flag = parser.add_argument_group("synthetic").add_argument
    flag("--documents", type=positive_int, default=4000, help="size of the collection")
    flag("--train_queries", type=positive_int, default=20000, help="number of training queries")
    flag("--teacher_noise", type=non_negative, default=0.5,
         help="standard deviation added to the oracle's scores (which range from 0 to 10)")
    flag("--label_noise", type=share, default=0.0,
         help="share of training rows whose positive is a wrong document")

    flag = parser.add_argument_group("model").add_argument
    flag("--model_only", metavar="DATA", help="write a model for this data folder to --out, and nothing else")
    flag("--vocab", type=positive_int, default=4096,
         help="entries of the tokenizer that is trained on the training texts")
    flag("--hidden", type=positive_int, default=128,
         help="width of the model (64 is enough for synthetic, and twice as fast)")
    flag("--layers", type=positive_int, default=2)
    flag("--init", choices=["lexical", "default"], default="lexical",
         help="default: Hugging Face's random start, from which the sparse head needs far longer")
    args = parser.parse_args(argv)
    run_command(parser.prog, lambda: make(args))


if __name__ == "__main__":
    # Killed without a word, it would leave its readers waiting for work for ever.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    main()
