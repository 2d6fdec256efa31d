"""What every test file leans on: the project root on the path, the optional ../shared folder, tiny models,
processes."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Reference vectors and real data; absent in a plain clone, then those tests skip.
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
# One thread, as in the processes that tests start: how many there are decides the last bit of a sum, and
# tests compare one process's bits with another's.
os.environ["OMP_NUM_THREADS"] = "1"
# Torchrun children fork; the tokenizer's threads then warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where files run side by side: these take minutes, and one that came last would leave the others waiting.
LONGEST_FIRST = ["test_train.py", "test_demo.py", "test_readme.py", "test_pretrained.py", "test_study.py"]

TEXTS = [
    "the cat sat on the mat and looked at the dog",
    "a dog runs in the park while the children play",
    "sparse retrieval weighs the words of the vocabulary",
    "dense retrieval compares vectors of a few hundred numbers",
    "hurricane season in jamaica starts in june and ends in november",
    "returns the sorted list of keys, or an empty list if there are none",
]


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.name
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """../shared as a tree of links: what a test leaves beside a file, as Corpus leaves its store, it leaves
    in a temporary folder."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}, which a plain clone does not have")
    links = tmp_path_factory.mktemp("shared")
    for file in SHARED.rglob("*"):
        link = links / file.relative_to(SHARED)
        link.mkdir(exist_ok=True) if file.is_dir() else link.symlink_to(file)
    return links


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder in the HF layout: 2 layers x 32, a few hundred byte-level BPE tokens with BOS `<s>` and EOS
    `</s>`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_model")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"],
                                                       initial_alphabet=alphabet, show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=bpe.get_vocab_size(), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0,
                         eos_token_id=1, tie_word_embeddings=True, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """101 passages, one of them empty, ids that are not rows, and four queries."""
    folder = tmp_path_factory.mktemp("corpus")
    # Of many lengths, as the batches are sorted by length.
    texts = [f"{TEXTS[i % 6]} {TEXTS[(i * 7 + 1) % 6][:i % 40]} {i}" for i in range(100)] + [""]
    with open(folder / "corpus.jsonl", "w") as file:
        for i, text in enumerate(texts):
            file.write(json.dumps({"_id": f"p{i * 3}", "title": "", "text": text}) + "\n")
    queries = {"q1": "the cat sat", "q2": "hurricane season", "q3": "sorted list of keys",
               "q4": "dense vectors"}
    (folder / "queries.tsv").write_text("".join(f"{qid}\t{text}\n" for qid, text in queries.items()))
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory, tiny_model, corpus):
    """A sparse and a dense index of it, by the tiny model."""
    from index import build
    folder = tmp_path_factory.mktemp("built")
    for head in ("sparse", "dense"):
        build(str(tiny_model), corpus, folder / head, head=head, dtype="fp32", shard_docs=1000, device="cpu")
    return folder


def documents(ix):
    """(row, its terms, their weights) of every document of a sparse index, by scipy."""
    import torch
    from scipy import sparse
    weights = (ix.weights.float() * ix.scale).numpy()
    by_term = sparse.csc_array((weights, ix.rows.numpy(), ix.arrays[0].numpy()), (ix.n_docs, ix.n_terms))
    lists = by_term.tocsr()
    for row, (start, end) in enumerate(zip(lists.indptr, lists.indptr[1:])):
        yield row, torch.tensor(lists.indices[start:end]), torch.tensor(lists.data[start:end])


def run(*args, check=True, **kw):
    """Run `python ARGS` from the project root, on one thread, and hand back the finished process with its
    text."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **kw.pop("env", {})}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=kw.pop("timeout", 300), **kw)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, args))} exited {done.returncode}\n{done.stdout[-3000:]}\n"
                             f"{done.stderr[-6000:]}")
    return done


def torchrun(n, *args, **kw):
    """The same under torchrun with n gloo processes on this machine."""
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *args, **kw)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
