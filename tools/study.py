"""The paper's question as one command: sizes x {sparse, dense} x {CL, KD, CL+KD} x seeds at the same compute.

    python -m tools.study run   --preset pocket     # two cores, no GPU; killed? the same line goes on
    python -m tools.study table --preset pocket     # means, deviations and tests of what has been run
    python -m tools.study plot  --preset pocket --out recipes/study
    python -m tools.study print --preset llama3     # the paper's 18 cells as command lines, for a cluster

A job is a list of command lines that anybody could type; `print` shows them. Jobs that prepare (data, bases,
a teacher) run when a cell needs them. Each finished job becomes a row of results.jsonl: what was measured, by
which lines, from what (fingerprints of its inputs), in how many seconds. What surprises:

- Only rows count. A cell is skipped if its row has the same command lines, and the same fingerprint for each
  input that is here to be compared. So the committed rows spare a fresh clone their work; delete one, and it
  is run again.
- A failed cell is a row with its error, and a gap in every table. The next `run` tries it again.
- On a CPU each job has one thread and a process forked from one that has loaded torch already: the smallest
  cells take less time than `import torch`. What is called are the scripts' own `main` functions.
- Pocket's seeds change the order of the training rows and the negatives. There is one base a size, as there
  is one Llama-3 8B.

Of the other tools this one imports tools.compare, for tables, and tools.plot, for pictures.
"""
import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import (Help, digest, discard, fingerprint, locked, positive_int, read_json, read_lines,
                  run_command, write_whole)
from tools.compare import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "recipes/study/results.jsonl"


class Job(NamedTuple):
    """Command lines that make one folder: with a `cell` they measure a model, else they prepare."""
    name: str
    folder: Path
    commands: list[str]
    needs: tuple = ()       # names of the jobs that must have run before
    inputs: dict = {}       # {what it is: file or folder}, whose fingerprints belong to the result
    cell: dict = {}         # what the tables group by
    beir: bool = False      # its scores are in tools.beir's folder, else in what tools.compare --json printed


# The pocket study: two sources of text, and a small Llama in three sizes that is pre-trained here.


class Source(NamedTuple):
    """A collection with its queries, and how much compute its cells get."""
    data: str               # flags of tools.demo_data
    vocab: int
    corpus: str             # the file in the data folder that is trained on and searched
    budget: float           # FLOPs of one cell
    texts: str = ""         # more flags, for more text of its kind to pre-train on; without: its corpus
    taught: int = 0         # queries that the study's own teacher scores; 0: rows have an oracle's scores


class Pocket(NamedTuple):
    """Everything that sets the size of the study."""
    sources: dict
    widths: tuple = (64, 96, 128)
    seeds: tuple = (0, 1, 2)
    objectives: tuple = ("cl", "kd", "cl+kd")
    base: str = "--block_length 128 --queries_per_step 32"
    clm_steps: int = 1200
    mntp_steps: int = 400
    teacher_steps: int = 60
    budgets: tuple = (0.25, 0.5, 2.0)   # shares of the source's budget, for the second axis
    label_noise: tuple = (0.2, 0.4)     # shares of training rows with a wrong positive
    teacher_noise: tuple = (2.0, 4.0)   # deviations of the noise on scores between 0 and 10
    real: Source | None = None          # what real weights are trained on


POCKET = Pocket(
    sources={
        # A generated world of concepts and synonyms, with an oracle for a teacher.
        "world": Source(data="--source synthetic --documents 4000 --train_queries 20000", vocab=2048,
                        corpus="corpus.jsonl", budget=6e11,
                        texts="--documents 40000 --train_queries 200 --dev_queries 10 --test_queries 10"),
        # Real text: docstrings. The teacher is the sum of BM25 and a sparse model.
        "docs": Source(data="--small 5000", vocab=4096, corpus="corpus.small.jsonl", budget=6e11,
                       taught=4000),
    },
    real=Source(data="--small 1000 --test_queries 400", vocab=4096, corpus="corpus.small.jsonl", budget=3e13,
                taught=2000),
)
# The same in miniature, to see that it runs.
TINY = Pocket(
    sources={"world": Source(data="--source synthetic --documents 300 --train_queries 400 --dev_queries 20 "
                                  "--test_queries 30", vocab=512, corpus="corpus.jsonl", budget=6e9)},
    widths=(32, 64), seeds=(0, 1), objectives=("cl",), base="--block_length 32 --queries_per_step 8",
    clm_steps=3, mntp_steps=3, budgets=(2.0,), label_noise=(0.5,), teacher_noise=(),
)

LAYERS = 2
ORACLE_NOISE = 0.5  # of the oracle's scores where nothing else is said: tools.demo_data's default
# A step shows 64 passages, whatever the objective: queries a step, and passages a query beside its positive.
BATCH = {"cl": (64, 0), "cl+kd": (32, 1), "kd": (32, 1)}
LENGTHS = "--query_length 32 --passage_length 64"
# One thread and no loader: the cores are busy with other cells.
CPU = "--tokens_per_chunk 1024 --workers 0"
# A pre-trained head has every frequent word on. Thresholds let each be on in this share of texts at first.
ON_AT_FIRST = 0.02

# Chosen beforehand, the same for every objective.
OF_HEAD = {"sparse": "--flops_q 0.05 --flops_d 0.04", "dense": "--temperature 0.05"}
STARTS = ("pretrained", "lexical")
# Tried for each head and objective, with seed 0 and the middle size, on dev queries: `--preset pocket-dev`.
RATES = ("8e-3", "4e-3", "2e-3")
# {(head, objective): learning rate}, for both sources and every size: the smallest within 0.005 of the best.
CHOSEN = {
    ("sparse", "cl"): "2e-3", ("sparse", "kd"): "4e-3", ("sparse", "cl+kd"): "2e-3",
    ("dense", "cl"): "2e-3", ("dense", "kd"): "2e-3", ("dense", "cl+kd"): "2e-3",
}


class Way(NamedTuple):
    """How a kind of weights is trained and used: flags, and by what the queries of a step are divided."""
    train: str
    build: str = ""
    fewer: int = 1


SMALL = Way("--lora_rank 0")
# SmolLM2-135M on a CPU, as recipes/pretrained.sh trains it (its settings were chosen on dev queries there).
REAL, REAL_RATE = Way("--dtype bf16 --attn eager --lora_dropout 0", "--compute bf16 ", 2), "5e-4"


class PocketJobs:
    """The jobs of a pocket study below `out`, in the order in which they are worth having."""

    def __init__(self, size: Pocket, out: Path):
        self.size, self.out, self.jobs = size, out, {}
        self.middle = size.widths[len(size.widths) // 2]

    def add(self, job: Job) -> Job:
        """The job, once however often it is asked for."""
        return self.jobs.setdefault(job.name, job)

    def source(self, name: str) -> Source:
        return self.size.real if name == "smollm2" else self.size.sources[name]

    def data(self, source: str, name: str = "data", flags: str = "") -> Job:
        """A folder of tools.demo_data: texts, queries, rows. The model that lies in it is not used."""
        of, folder = self.source(source), self.out / source / name
        line = f"python -m tools.demo_data {of.data} --vocab {of.vocab} --hidden 32 {flags}--out {folder}"
        return self.add(Job(f"{source}/{name}", folder, [line]))

    def untrained(self, source: str, width: int, init: str = "default") -> Job:
        """A model of that width for a source's data, with the data's tokenizer."""
        data, vocab = self.data(source), self.source(source).vocab
        folder = self.out / source / f"{init}-{width}"
        line = (f"python -m tools.demo_data --model_only {data.folder} --vocab {vocab} --hidden {width} "
                f"--layers {LAYERS} --init {init} --out {folder}")
        return self.add(Job(f"{source}/{init}-{width}", folder, [line], (data.name,)))

    def base(self, source: str, width: int) -> Job:
        """A Llama that read the source's text and then learnt to look both ways: our own hub."""
        of, data, start = self.size.sources[source], self.data(source), self.untrained(source, width)
        texts = self.data(source, "texts", f"{of.texts} ") if of.texts else data
        clm, mntp = (self.out / source / f"{name}-{width}" for name in ("clm", "mntp"))
        common = (f"--lora_rank 0 --corpus {texts.folder}/corpus.jsonl {self.size.base} "
                  "--tokens_per_chunk 4096 --warmup 0.05 --workers 0 --resume")
        lines = [
            f"python train.py --model {start.folder} --objective clm --max_steps {self.size.clm_steps} "
            f"--lr 3e-3 {common} --out {clm}",
            f"python train.py --model {clm} --objective mntp --max_steps {self.size.mntp_steps} "
            f"--lr 1e-3 {common} --out {mntp}",
        ]
        return self.add(Job(f"{source}/base-{width}", mntp, lines, (data.name, texts.name, start.name)))

    def rows(self, source: str) -> tuple[Job, Path]:
        """The job that makes the training rows of a source, and the rows."""
        data = self.data(source)
        if not self.size.sources[source].taught:
            return data, data.folder / "train.jsonl"
        teacher = self.teacher(source, data.folder)
        return teacher, teacher.folder / "rows.jsonl"

    def teacher(self, source: str, data: Path) -> Job:
        """Hard negatives with scores: the sum of BM25 and of a sparse model from the lexical start."""
        of, folder = self.source(source), self.out / source / "teacher"
        start = self.untrained(source, 128, "lexical")
        corpus, queries = data / of.corpus, folder / "queries.jsonl"
        search = f"--queries {queries} --k 100"
        lines = [
            f"head -n {of.taught} {data}/queries.train.jsonl > {queries}",
            f"python -m tools.bm25 build --corpus {corpus} --stemming --k1 1.2 --b 0.75 --out {folder}/bm25",
            f"python -m tools.bm25 search --index {folder}/bm25 {search} --out {folder}/bm25.trec",
            f"python train.py --model {start.folder} --lora_rank 0 --head sparse --objective cl "
            f"--train {data}/train.jsonl --corpus {data}/corpus.jsonl --negatives 0 --queries_per_step 128 "
            f"{LENGTHS} --max_steps {self.size.teacher_steps} --lr 1e-3 --flops_q 0.25 --flops_d 0.2 "
            f"{CPU} --resume --out {folder}/sparse",
            f"python index.py build --model {folder}/sparse --corpus {corpus} --tokens_per_batch 4096 "
            f"--out {folder}/index",
            f"python index.py search --index {folder}/index {search} --out {folder}/sparse.trec",
            f"python -m tools.fuse --runs {folder}/bm25.trec {folder}/sparse.trec --scale 10 --k 100 "
            f"--out {folder}/teacher.trec",
            f"python -m tools.mine --run {folder}/teacher.trec --qrels {data}/qrels/train.tsv "
            f"--queries {queries} --negatives 16 --depth 50 --scores --out {folder}/rows.jsonl",
        ]
        return self.add(Job(f"{source}/teacher", folder, lines, (self.data(source).name, start.name)))

    def cell(self, source: str, width: int, head: str, objective: str, seed: int, *, share: float = 1.0,
             labels: float = 0.0, teacher: float = ORACLE_NOISE, start: str = "pretrained", rate: str = "",
             split: str = "test") -> Job:
        """Train, index, search and measure one model. What is said by name differs from the grid."""
        of, data, (made_rows, rows) = self.size.sources[source], self.data(source), self.rows(source)
        made = self.base(source, width) if start == "pretrained" else self.untrained(source, width, start)
        needs, name = [data.name, made_rows.name, made.name], f"{source}/{head}-{objective}-{width}"
        # A name says only what differs from the grid: so a cell has one name, whoever asks for it.
        if share != 1:
            name += f"-x{share:g}"
        if labels or teacher != ORACLE_NOISE:
            # Noise changes the training rows alone: the texts and the queries stay those of the plain data.
            noise = f"noise-{labels:g}-{teacher:g}"
            noisy = self.data(source, noise, f"--label_noise {labels} --teacher_noise {teacher} ")
            name, rows = f"{name}-{noise}", noisy.folder / "train.jsonl"
            needs.append(noisy.name)
        if start != "pretrained":
            name += f"-{start}"
        if rate:
            name += f"-rate-{rate}"
        name += f"-seed{seed}"

        inputs = {"model": made.folder, "rows": rows, "corpus": data.folder / of.corpus,
                  "queries": data.folder / f"queries.{split}.jsonl",
                  "qrels": data.folder / f"qrels/{split}.tsv"}
        cell = {"source": source, "start": start, "width": width, "head": head, "objective": objective,
                "budget": of.budget * share, "label_noise": labels, "teacher_noise": teacher, "seed": seed,
                "split": split}
        if rate:
            cell["setting"] = f"--lr {rate}"
        folder = self.out / "cells" / name
        lines = cell_lines(cell, inputs, folder, rate or CHOSEN[head, objective])
        return self.add(Job(name, folder, lines, tuple(needs), inputs, cell))

    def study(self) -> list[Job]:
        """Seed 0 of everything first: the grid, then the panels."""
        size, first = self.size, next(iter(self.size.sources))
        for seed in size.seeds:
            for source in size.sources:
                self.grid(source, size.widths, seed)
            for source in size.sources:
                self.grid(source, size.widths[:1], seed, start="lexical")
            for head in OF_HEAD:
                self.panels(first, head, seed)
        return list(self.jobs.values())

    def grid(self, source: str, widths: tuple, seed: int, **named):
        for objective in self.size.objectives:
            for width in widths:
                for head in OF_HEAD:
                    self.cell(source, width, head, objective, seed, **named)

    def others_than(self, objective: str) -> list[str]:
        return [name for name in self.size.objectives if name != objective]

    def panels(self, source: str, head: str, seed: int):
        """Noise and budgets at the middle size, for the objectives that they concern."""
        size = self.size
        for labels in size.label_noise:
            self.cell(source, self.middle, head, "cl", seed, labels=labels)
        for teacher in size.teacher_noise:
            for objective in self.others_than("cl"):
                self.cell(source, self.middle, head, objective, seed, teacher=teacher)
        for share in size.budgets:
            for objective in self.others_than("kd"):
                self.cell(source, self.middle, head, objective, seed, share=share)

    def of_real_weights(self) -> list[Job]:
        """The six cells of one size of real weights, adapted as recipes/pretrained.sh does."""
        name, of, data = "smollm2", self.size.real, self.data("smollm2")
        rows = self.teacher(name, data.folder)
        weights, base = self.out / name / "weights", self.out / name / "base-135m"
        fetch = f"python -m tools.pretrained --center --out {weights}"
        self.add(Job(f"{name}/weights", weights, [fetch]))
        mntp = (f"python train.py --model {weights} {REAL.train} --objective mntp "
                f"--corpus {data.folder}/corpus.jsonl --block_length 128 --queries_per_step 16 "
                f"--max_steps 30 --lr 5e-4 --warmup 0.05 {CPU} --resume --out {base}")
        self.add(Job(f"{name}/base-135m", base, [mntp], (data.name, f"{name}/weights")))
        needs = (data.name, rows.name, f"{name}/base-135m")
        inputs = {"model": base, "rows": rows.folder / "rows.jsonl", "corpus": data.folder / of.corpus,
                  "queries": data.folder / "queries.test.jsonl", "qrels": data.folder / "qrels/test.tsv"}
        for objective in self.size.objectives:
            for head in OF_HEAD:
                cell = {"source": name, "start": "pretrained", "width": "135m", "head": head,
                        "objective": objective, "budget": of.budget, "label_noise": 0.0,
                        "teacher_noise": ORACLE_NOISE, "seed": 0, "split": "test"}
                job = f"{name}/{head}-{objective}-135m-seed0"
                folder = self.out / "cells" / job
                lines = cell_lines(cell, inputs, folder, REAL_RATE, REAL)
                self.add(Job(job, folder, lines, needs, inputs, cell))
        return list(self.jobs.values())

    def dev(self) -> list[Job]:
        """Every rate that is tried, on dev queries: as many for each head and objective."""
        first = next(iter(self.size.sources))
        for rate in RATES:
            for objective in self.size.objectives:
                for head in OF_HEAD:
                    self.cell(first, self.middle, head, objective, 0, rate=rate, split="dev")
        return list(self.jobs.values())


def cell_lines(cell: dict, inputs: dict, folder: Path, rate: str, way: Way = SMALL) -> list[str]:
    """From a model and rows to numbers."""
    head, corpus, (queries, negatives) = cell["head"], inputs["corpus"], BATCH[cell["objective"]]
    calibrate = f"--calibrate {ON_AT_FIRST} " if (head, cell["start"]) == ("sparse", "pretrained") else ""
    return [
        f"python train.py --model {inputs['model']} {way.train} --head {head} "
        f"--objective {cell['objective']} --train {inputs['rows']} --corpus {corpus} "
        f"--flop_budget {cell['budget']:g} --queries_per_step {queries // way.fewer} --negatives {negatives} "
        f"{LENGTHS} --lr {rate} {OF_HEAD[head]} {calibrate}{CPU} "
        f"--save_every 200 --log_every 50 --seed {cell['seed']} --resume --out {folder}/run",
        f"python index.py build --model {folder}/run --corpus {corpus} {way.build}--tokens_per_batch 4096 "
        f"--out {folder}/index",
        f"python index.py search --index {folder}/index --queries {inputs['queries']} --k 100 "
        f"--out {folder}/test.trec",
        f"python -m tools.compare --qrels {inputs['qrels']} --run {folder}/test.trec "
        f"--metrics mrr@10 ndcg@10 recall@100 --costs --per_query {folder}/test.tsv "
        f"--json > {folder}/test.json",
    ]


# Real backbones, on GPUs.


class Grid(NamedTuple):
    """Backbones of one family, and what one cell of each costs."""
    models: dict            # size -> hub name
    horizon: dict           # (size, whether KD) -> flags: queries a step, how long, accumulation
    mntp: str = ""          # flags of the first stage, beyond its defaults
    sparse: str = ""        # flags of the sparse head
    beir: str = ""          # flags of tools.beir


# Fixed compute: parameters x passages encoded is 69 to 88 x 10^15 in every cell, so 7 : 3 : 1 epochs for
# 1B : 3B : 8B, and eight times as many for KD, which encodes 2 passages a query instead of 17. Accumulation
# is the paper's on 4 x 80 GB; the loss does not depend on it.
LLAMA3 = Grid(
    models={"1b": "meta-llama/Llama-3.2-1B", "3b": "meta-llama/Llama-3.2-3B",
            "8b": "meta-llama/Meta-Llama-3-8B"},
    horizon={
        ("1b", False): "--queries_per_step 112 --epochs 7",
        ("3b", False): "--queries_per_step 128 --epochs 3 --accumulation 2",
        ("8b", False): "--queries_per_step 128 --epochs 1 --accumulation 4",
        ("1b", True): "--queries_per_step 1024 --epochs 56",
        ("3b", True): "--queries_per_step 512 --epochs 24",
        ("8b", True): "--queries_per_step 512 --epochs 8 --accumulation 2",
    },
)
# By arithmetic about a day of one 80 GB GPU, and never run: 18 cells of 2e17 FLOPs are 3 to 5 hours, encoding
# MS MARCO for the six cells of the 1.7B about 9, and all the rest as much again. The sparse head starts from
# thresholds, without which it dies.
SMOLLM2 = Grid(
    models={size: f"HuggingFaceTB/SmolLM2-{size.upper()}" for size in ("135m", "360m", "1.7b")},
    horizon={(size, kd): f"--queries_per_step {256 if kd else 32} --flop_budget 2e17 --lr 3e-4"
             for size in ("135m", "360m", "1.7b") for kd in (False, True)},
    mntp="--max_steps 1000 ", sparse="--calibrate 0.01 ",
    beir="--datasets scifact nfcorpus arguana scidocs fiqa ",
)


def gpu_jobs(grid: Grid, out: Path, args) -> list[Job]:
    """The 18 cells of a family. The adapter that MNTP trained is the one that goes on training."""
    jobs, launch, corpus = [], f"torchrun --nproc_per_node={args.gpus}", f"{args.msmarco}/collection.tsv"
    for size, model in grid.models.items():
        base = out / f"mntp-{size}"
        line = (f"{launch} train.py --model {model} --objective mntp {grid.mntp}--corpus {corpus} "
                f"--resume --out {base}")
        jobs.append(Job(base.name, base, [line]))
    for objective in ("cl", "kd", "cl+kd"):
        for size in grid.models:
            for head in OF_HEAD:
                base, folder = out / f"mntp-{size}", out / f"{head}-{size}-{objective}"
                rows = f"{args.msmarco}/train.{objective}.jsonl"
                horizon = grid.horizon[size, objective == "kd"]
                sparse = grid.sparse if head == "sparse" else ""
                lines = [
                    f"{launch} train.py --model {base} --head {head} --objective {objective} {horizon} "
                    f"{sparse}--train {rows} --corpus {corpus} --queries {args.msmarco}/queries.train.tsv "
                    f"--resume --out {folder}/run",
                    f"{launch} -m tools.beir --model {folder}/run --msmarco {args.msmarco} "
                    f"--data {args.beir} {grid.beir}--out {folder}/beir",
                ]
                cell = {"source": "msmarco", "start": "pretrained", "width": size, "head": head,
                        "objective": objective, "budget": 0.0, "label_noise": 0.0, "teacher_noise": 0.0,
                        "seed": 0, "split": "test"}
                inputs = {"model": base, "rows": rows}
                jobs.append(Job(folder.name, folder, lines, (base.name,), inputs, cell, beir=True))
    return jobs


PRESETS = ("pocket", "pocket-dev", "pocket-real", "tiny", "smollm2", "llama3")


def study_of(preset: str) -> str:
    """pocket-dev and pocket-real are parts of pocket, in one folder and in one file of results."""
    return preset.removesuffix("-dev").removesuffix("-real")


def place_of(args) -> Path:
    """Where data, bases and cells go."""
    return Path(args.out or f"runs/study/{study_of(args.preset)}")


def jobs_of(args) -> list[Job]:
    """The jobs of --preset."""
    if args.preset in ("smollm2", "llama3"):
        return gpu_jobs(SMOLLM2 if args.preset == "smollm2" else LLAMA3, place_of(args), args)
    jobs = PocketJobs(TINY if args.preset == "tiny" else POCKET, place_of(args))
    if args.preset == "pocket-real":
        return jobs.of_real_weights()
    return jobs.dev() if args.preset == "pocket-dev" else jobs.study()


# Rows: what is known of a job that has run.


def read_rows(path, preset: str) -> dict[str, dict]:
    """{name of the job: its row} of one preset."""
    rows = [json.loads(line) for _, line in read_lines(path)] if Path(path).exists() else []
    return {row["job"]: row for row in rows if row["preset"] == study_of(preset)}


def keep_row(path, row: dict):
    """Put a row in its place, or at the end. The file is read anew: another preset may write it, too."""
    with locked(path, wait=True):
        lines = [line for _, line in read_lines(path)] if Path(path).exists() else []
        names = [(old["preset"], old["job"]) for old in map(json.loads, lines)]
        name = row["preset"], row["job"]
        place = names.index(name) if name in names else len(lines)
        lines[place:place + 1] = [json.dumps(row, ensure_ascii=False)]
        with write_whole(path) as file:
            file.writelines(f"{line}\n" for line in lines)


def recipe(job: Job, out: Path) -> str:
    """A digest of the command lines, wherever they write."""
    # The committed rows were made in another folder; the place must not make them another cell's.
    text = "\n".join(job.commands).replace(str(out), "OUT")
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class Prints(dict):
    """Fingerprints of files and folders as they are now, each taken once; None for what is not there."""

    def __missing__(self, path):
        # Of a model only what it computes with: its other files know when they were written, and a base that
        # is made again, to the same bit, is the same base.
        parts = [*sorted(Path(path).glob("*.safetensors")), *Path(path).glob("tokenizer.json")]
        self[path] = digest(*map(fingerprint, parts))[:12] if parts else None
        if not parts and Path(path).exists():
            self[path] = fingerprint(path)[:12]
        return self[path]


def is_done(job: Job, row: dict | None, out: Path, prints: Prints) -> bool:
    """Whether the row is this job's, from these lines and, as far as they are here, these inputs."""
    if row is None or "error" in row or row["recipe"] != recipe(job, out):
        return False
    # What is not here cannot have changed: a clone without data trusts its committed rows.
    now = {what: prints[path] for what, path in job.inputs.items()}
    return all(now[what] in (None, then) for what, then in row["inputs"].items())


def to_run(jobs: list[Job], rows: dict, out: Path, prints: Prints) -> list[Job]:
    """The cells that are not done, each after the preparations that it needs and that are not here."""
    by_name, order = {job.name: job for job in jobs}, {}

    def want(job: Job):
        # Depth first, and a dict keeps the order: a need is in the list before whoever needs it.
        for before in map(by_name.get, job.needs):
            if not (before.folder.exists() and is_done(before, rows.get(before.name), out, prints)):
                want(before)
        order[job.name] = job

    for job in jobs:
        if job.cell and not is_done(job, rows.get(job.name), out, prints):
            want(job)
    return list(order.values())


COSTS = ("nnz_queries", "nnz_docs", "index_bytes")


def measured(job: Job) -> dict:
    """What a finished cell's own files say: numbers are read from JSON, never from what was printed."""
    summary = read_json(job.folder / "run/summary.json")
    found = {"steps": summary["steps"], "flops": summary["flops"]}
    found["size"] = count_parameters(job.folder / "run")
    if job.beir:
        found["metrics"] = {}
        for file in sorted((job.folder / "beir").glob("*.json")):
            if not file.name.endswith(".trec.json"):
                scores = read_json(file)["scores"]
                found["metrics"] |= {f"{file.stem} {metric}": value for metric, value in scores.items()}
        return found
    report = read_json(job.folder / "test.json")
    (test,) = report["runs"].values()
    costs = {key: test["costs"][key] for key in COSTS if key in test["costs"]}
    metrics = {metric: test[metric] for metric in report["metrics"]}
    return found | {"metrics": metrics, **costs, "ranks": ranks_of(job.folder / "test.tsv")}


def count_parameters(folder: Path) -> int:
    """Parameters of the model in a run's folder, or of the base that its adapter stands on."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = (folder / "adapter_config.json").exists()
    base = read_json(folder / "retriever.json")["base"] if adapter else folder
    # Shapes alone: nothing is allocated, and tied weights count once.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return sum(parameter.numel() for parameter in model.parameters())


def ranks_of(path: Path) -> str:
    """Every query's MRR@10 as a letter: the first relevant passage's rank, 1 to 9, a for 10, or a dot."""
    lines = [line.split("\t") for _, line in read_lines(path)]
    column = next(i for i, name in enumerate(lines[0]) if name.endswith("mrr@10"))
    values = [float(line[column]) for line in lines[1:]]
    return "".join(".123456789a"[round(1 / value) if value else 0] for value in values)


def reciprocal(ranks: str) -> np.ndarray:
    """The values again.

    >>> reciprocal("12.a").tolist()
    [1.0, 0.5, 0.0, 0.1]
    """
    return np.array([0.0 if letter == "." else 1 / int(letter, 16) for letter in ranks])


# Running.


def perform(job: Job, slot: int, gpus: int):
    """Run a job's lines in this process, which is the job's own. What they print goes to FOLDER.log."""
    # A group of its own, so that whatever it starts can be ended with it.
    os.setpgid(0, 0)
    threading.Thread(target=leave_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    log = Path(f"{job.folder}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    # By descriptor and not by sys.stdout: programs that a line starts write there, too.
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(slot * gpus + i) for i in range(gpus))
    else:
        import torch

        torch.set_num_threads(1)
    # What was stopped before: training goes on from it, but a finished index would be in the way.
    for manifest in list(job.folder.rglob("manifest.json")):
        discard(manifest.parent)
    started, processor = time.time(), time.process_time()
    for line in job.commands:
        print(f"$ {line}", file=sys.stderr, flush=True)
        run_line(line)
    with write_whole(f"{job.folder}.seconds.json") as file:
        taken = {"seconds": time.time() - started, "cpu_seconds": time.process_time() - processor}
        json.dump({key: round(value, 1) for key, value in taken.items()}, file)


def leave_with(parent):
    """End this job when the study ends, however it ends: the next start must find nobody at work."""
    parent.join()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def run_line(line: str):
    """One command line: Python's by calling its main, others as processes; `> FILE` as in a shell."""
    words = shlex.split(line)
    with contextlib.ExitStack() as stack:
        target = None
        if ">" in words[-2:-1]:
            target = stack.enter_context(write_whole(words[-1]))
            words = words[:-2]
        # Without a shell: a name with a space or a star in it is only a name.
        if words[0] != "python":
            subprocess.run(words, check=True, stdout=target)
            return
        if target:
            stack.enter_context(contextlib.redirect_stdout(target))
        as_module = words[1] == "-m"
        name = words[2] if as_module else words[1].removesuffix(".py")
        # The scripts note their command line in what they write.
        sys.argv = words[2:] if as_module else words[1:]
        importlib.import_module(name).main()


def run(args):
    """Run what is not done, --at_once jobs side by side; a row is kept as soon as it is there."""
    # Before the first process that holds torch is made.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "index", "tools.compare"])
    with locked(place_of(args) / "study"):
        runner = Runner(args, context)
        try:
            runner.run()
        finally:
            for process, _ in runner.running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


class Runner:
    """Starts what is ready while a slot is free, waits for one job to end, keeps its row, and looks again."""

    def __init__(self, args, context):
        self.args, self.context, self.out = args, context, place_of(args)
        self.jobs = {job.name: job for job in jobs_of(args)}
        self.cells = sum(bool(job.cell) for job in self.jobs.values())
        self.running, self.failed, self.prints, self.began = {}, {}, Prints(), time.time()

    def run(self):
        while True:
            todo = self.todo()
            waiting = {job.name for job in todo}
            ready = [job for job in todo if job.name not in self.running and not waiting & set(job.needs)]
            for job in ready[:self.args.at_once - len(self.running)]:
                self.start(job)
            if not self.running:
                break
            # Asleep until any of the processes ends, instead of looking again and again.
            multiprocessing.connection.wait([process.sentinel for process, _ in self.running.values()])
            for name in list(self.running):
                if self.running[name][0].exitcode is not None:
                    self.finish(name)
        gaps = sum(bool(self.jobs[name].cell) for name in self.failed)
        failed = f"; failed: {', '.join(self.failed)}" if self.failed else ""
        print(f"{self.args.results}: {self.cells - gaps} of {self.cells} cells{failed}")

    def todo(self) -> list[Job]:
        """What is left, without what failed in this run and what needs that."""
        rows = read_rows(self.args.results, self.args.preset)
        left = to_run(list(self.jobs.values()), rows, self.out, self.prints)
        for job in left:
            lost = [name for name in job.needs if name in self.failed]
            if lost and job.name not in self.failed:
                self.failed[job.name] = f"needs {lost[0]}, which failed"
                self.keep(job, {})
        return [job for job in left if job.name not in self.failed]

    def start(self, job: Job):
        taken = {slot for _, slot in self.running.values()}
        slot = min(set(range(self.args.at_once)) - taken)
        process = self.context.Process(target=perform, args=(job, slot, self.args.gpus))
        process.start()
        self.running[job.name] = process, slot

    def finish(self, name: str):
        """Keep what came of a job, and say it."""
        process, _ = self.running.pop(name)
        job = self.jobs[name]
        # What it wrote may be another's input.
        self.prints.clear()
        found = {}
        if process.exitcode:
            self.failed[name] = last_words(job, process.exitcode)
        else:
            try:
                found = read_json(f"{job.folder}.seconds.json") | (measured(job) if job.cell else {})
            except (ValueError, OSError, KeyError) as e:
                self.failed[name] = f"its results cannot be read: {e!r}"
        row = self.keep(job, found)
        left = sum(bool(job.cell) for job in self.todo())
        scores = ", ".join(f"{key} {value:.4f}" for key, value in row.get("metrics", {}).items())
        print(f"{self.cells - left}/{self.cells} cells, {time.time() - self.began:.0f} s | {name} | "
              f"{row.get('error') or scores or 'ready'}", flush=True)

    def keep(self, job: Job, found: dict) -> dict:
        """Write the row of a job that has ended; a cell's index and checkpoints have done their work."""
        row = {"preset": study_of(self.args.preset), "job": job.name, **job.cell, **found}
        if job.name in self.failed:
            row["error"] = self.failed[job.name]
        else:
            for folder in (job.folder / "index", job.folder / "run/state"):
                if job.cell and folder.exists() and not self.args.keep:
                    discard(folder)
        # By the recipe and the inputs a later `run` sees whether this row still answers its question.
        row |= {"recipe": recipe(job, self.out),
                "inputs": {what: self.prints[path] for what, path in job.inputs.items()},
                "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "machine": machine()}
        keep_row(self.args.results, row)
        return row


def last_words(job: Job, code: int) -> str:
    """The last line of a failed job's log."""
    log = Path(f"{job.folder}.log")
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line for line in lines if line.strip()] or ["it said nothing"]
    return f"{said[-1]} (exit {code}, {log})"


def machine() -> str:
    """Processor, cores and torch: what decides over the last digits and the seconds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    torch = importlib.metadata.version("torch")
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, torch {torch}"


# Tables. A difference between cells is a matrix of seeds x queries, and so is any weighted sum of cells.


def crossed_test(differences: np.ndarray) -> float:
    """Two-sided p that the mean of (seeds, queries) differences is 0 with other seeds and queries than these.

    Seeds and queries are crossed random effects, as subjects and items are in psychology (Clark 1973). The
    variance of the mean is (MS_seeds + MS_queries - MS_rest) / (seeds x queries), with Satterthwaite's
    degrees of freedom; a part that comes out negative is 0. With one seed it is the paired t-test over
    queries, and says nothing of seeds.
    """
    S, Q = differences.shape
    mean, of_seed, of_query = differences.mean(), differences.mean(1), differences.mean(0)
    parts = [(S * of_query.var(ddof=1), Q - 1)]  # (mean square, its degrees of freedom)
    if S > 1:
        rest = differences - of_seed[:, None] - of_query + mean
        rest = (rest**2).sum() / ((S - 1) * (Q - 1)), (S - 1) * (Q - 1)
        parts.append((Q * of_seed.var(ddof=1), S - 1))
        # Mean squares no larger than the rest's have no variance of their own to add.
        parts = [part for part in parts if part[0] > rest[0]]
        if not parts:
            parts = [rest]
        elif len(parts) == 2:
            parts.append((-rest[0], rest[1]))
    total = sum(square for square, _ in parts)
    if not total:
        return 1.0 if mean == 0 else 0.0
    freedom = total**2 / sum(square**2 / degrees for square, degrees in parts)
    return student_p(mean / math.sqrt(total / (S * Q)), max(1.0, freedom))


def student_p(t: float, freedom: float) -> float:
    """Two-sided p of Student's t: the angle with t = sqrt(freedom) tan(angle) has a power of cos for density.

    >>> round(float(student_p(2.086, 20)), 4)    # the table at the end of every textbook
    0.05
    """
    # The trapezoid rule from the angle of t to the end; the whole area is a ratio of gamma functions.
    start = math.atan(abs(t) / math.sqrt(freedom))
    heights = np.cos(np.linspace(start, math.pi / 2, 20_001)) ** (freedom - 1)
    tail = (heights[1:] + heights[:-1]).mean() / 2 * (math.pi / 2 - start)
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return 2 * tail / whole


KEYS = ("source", "start", "width", "head", "objective", "budget", "label_noise", "teacher_noise")


class Cells:
    """The rows of a preset by what was varied: a cell is a dict of the KEYS, and has a row for each seed."""

    def __init__(self, rows, split: str = "test"):
        self.split, self.rows = split, [row for row in rows if row.get("split") == split]
        self.good = [row for row in self.rows if "error" not in row]
        self.by_key = {}
        for row in self.good:
            self.by_key.setdefault(tuple(row[key] for key in KEYS), {})[row["seed"]] = row

    def only(self, wanted) -> "Cells":
        """The cells whose rows are wanted."""
        return Cells([row for row in self.rows if wanted(row)], self.split)

    def values(self, key: str, **facts) -> list:
        """The different values of a key among the rows with these facts, in order."""
        return sorted({row[key] for row in self.rows if all(row[k] == value for k, value in facts.items())})

    def get(self, cell: dict) -> dict[int, dict]:
        """{seed: row}."""
        return self.by_key.get(tuple(cell[key] for key in KEYS), {})

    def scores(self, cell: dict, metric: str) -> list[float]:
        """One a seed."""
        return [row["metrics"][metric] for row in self.get(cell).values() if metric in row["metrics"]]

    def contrast(self, parts: list[tuple[float, dict]]) -> str:
        """A weighted sum of cells' MRR@10 over the seeds that all of them have: +0.052 (p 0.003)."""
        # Only common seeds: the difference of a seed is paired, query by query, and a lone cell has no pair.
        found = [self.get(cell) for _, cell in parts]
        seeds = sorted(set.intersection(*map(set, found)))
        if not seeds:
            return "-"
        matrix = np.zeros((len(seeds), len(found[0][seeds[0]]["ranks"])))
        for (weight, _), rows in zip(parts, found):
            matrix += weight * np.array([reciprocal(rows[seed]["ranks"]) for seed in seeds])
        p = crossed_test(matrix)
        return f"{matrix.mean():+.3f} (p {p:.3f})" if p >= 0.001 else f"{matrix.mean():+.3f} (p < 0.001)"


def section(title: str, rows: list[list[str]], words: int) -> list[str]:
    """A table under a title, its first columns being words."""
    return [f"### {title}", "", table(rows, "markdown", words=tuple(range(words))), ""]


class Report:
    """The tables of one study, as markdown."""

    def __init__(self, cells: Cells, metric: str):
        self.cells, self.metric, self.text = cells, metric, []
        self.objectives = [name for name in ("cl", "kd", "cl+kd") if name in cells.values("objective")]
        self.kinds = [{"objective": name, "head": head} for name in self.objectives for head in OF_HEAD]
        self.widths = cells.values("width")
        self.smallest, self.middle, self.largest = (self.widths[i] for i in (0, len(self.widths) // 2, -1))

    def cell(self, source: str, **changes) -> dict:
        """A cell of the grid: the source's common budget, no noise but the oracle's, a pre-trained base."""
        # Most cells belong to the grid, so its budget is the most frequent one.
        budgets = [row["budget"] for row in self.cells.rows if row["source"] == source]
        plain = {"start": "pretrained", "label_noise": 0.0, "teacher_noise": ORACLE_NOISE}
        return {"source": source, "budget": max(set(budgets), key=budgets.count), **plain, **changes}

    def score(self, cell: dict) -> str:
        """0.432 ± 0.012 over the seeds; one seed has no deviation."""
        values = self.cells.scores(cell, self.metric)
        if not values:
            return "-"
        return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")

    def heads_apart(self, cells: list[dict]) -> str:
        """Sparse minus dense, the mean over these cells."""
        weights = {"sparse": 1 / len(cells), "dense": -1 / len(cells)}
        parts = [(weights[head], {**cell, "head": head}) for cell in cells for head in OF_HEAD]
        return self.cells.contrast(parts)

    def section(self, title: str, rows: list[list[str]], words: int = 2):
        self.text += section(title, rows, words)

    def grid(self, source: str, start: str):
        """Quality by size, what growing brought, and what the largest model costs; then the heads apart."""
        widths = self.cells.values("width", source=source, start=start)
        if len(widths) < len(self.widths):
            return
        sizes = [self.name_of(source, width) for width in self.widths]
        grows = len(sizes) > 1
        growth = ["largest - smallest"] if grows else []
        rows = [["objective", "head", *sizes, *growth, "steps", "nnz q / d", "index MB"]]
        for kind in self.kinds:
            cells = [self.cell(source, width=width, start=start, **kind) for width in self.widths]
            seeds = [list(self.cells.get(cell).values()) for cell in cells]
            steps = " ".join(str(found[0]["steps"]) if found else "-" for found in seeds)
            grown = [self.cells.contrast([(1, cells[-1]), (-1, cells[0])])] if grows else []
            rows.append([*kind.values(), *map(self.score, cells), *grown, steps, *costs_of(seeds[-1])])
        flops = self.cell(source)["budget"]
        self.section(f"{source}, {start} start: {self.metric} by size, {flops:.0e} FLOPs a cell", rows)

        rows = [["sparse - dense", *sizes, *(["all sizes"] if grows else [])]]
        for objective in self.objectives:
            plain = {"start": start, "objective": objective}
            cells = [self.cell(source, width=width, **plain) for width in self.widths]
            apart = [self.heads_apart([cell]) for cell in cells] + [self.heads_apart(cells)] * grows
            rows.append([objective, *apart])
        self.section(f"{source}, {start} start: sparse against dense", rows, words=1)

    def name_of(self, source: str, width) -> str:
        """A size as a reader knows it: parameters."""
        sizes = [row["size"] for row in self.cells.good if (row["source"], row["width"]) == (source, width)]
        return f"{width} ({sizes[0] / 1e6:.2f} M)" if sizes else str(width)

    def along(self, title: str, source: str, start: str, key: str, kinds: list[dict]):
        """The middle size along another axis, what the whole way brings, and the heads' difference in it."""
        values = self.cells.values(key, source=source, start=start)
        kinds = [{**kind, "start": start} for kind in kinds]
        if len(values) < 2:
            return
        shown = (f"{value:g}" for value in values)
        rows = [["objective", "head", *shown, "last - first", "sparse's less dense's"]]
        for kind in kinds:
            cells = [self.cell(source, width=self.middle, **kind, **{key: value}) for value in values]
            change = [(1, cells[-1]), (-1, cells[0])]
            # A difference of differences is one more weighted sum: the same with the signs turned.
            of_dense = [(-weight, {**cell, "head": "dense"}) for weight, cell in change]
            apart = self.cells.contrast(change + of_dense) if kind["head"] == "sparse" else ""
            names = kind["objective"], kind["head"]
            rows.append([*names, *map(self.score, cells), self.cells.contrast(change), apart])
        self.section(f"{source}, {start} start, {title}", rows)

    def starts(self):
        """The lexical start beside the pre-trained one, at the smallest size."""
        rows = [["source", "objective", "start", *OF_HEAD, "sparse - dense"]]
        for source in self.cells.values("source"):
            for objective in self.cells.values("objective", start="lexical"):
                for start in STARTS:
                    cell = self.cell(source, width=self.smallest, objective=objective, start=start)
                    scores = (self.score({**cell, "head": head}) for head in OF_HEAD)
                    rows.append([source, objective, start, *scores, self.heads_apart([cell])])
        self.section("Two starts, smallest size", rows, words=3)

    def growth(self, source: str, start: str, objective: str, weight: float) -> list[tuple[float, dict]]:
        """From the smallest to the largest size, the mean of both heads."""
        cell = self.cell(source, start=start, objective=objective)
        ends = ((weight / 2, self.largest), (-weight / 2, self.smallest))
        return [(share, {**cell, "width": width, "head": head}) for head in OF_HEAD for share, width in ends]

    def findings(self):
        """The paper's three findings, each as a sum of cells."""
        rows = [["finding", "source", "start", "contrast", "MRR@10"]]
        for source in self.cells.values("source"):
            for start in STARTS:
                if len(self.cells.values("width", source=source, start=start)) == len(self.widths):
                    for number, *rest in self.contrasts(source, start):
                        rows.append([number, source, start, *rest])
        self.section("The paper's findings as contrasts", rows, words=4)

    def contrasts(self, source: str, start: str) -> list[tuple[str, str, str]]:
        """(finding, what is compared, by how much it differs)."""
        ways = (("cl", 1), ("kd", 1), ("kd", -1))
        cl, kd, less_kd = (self.growth(source, start, *way) for way in ways)
        places = [(objective, width) for objective in self.objectives for width in self.widths]
        grid = [self.cell(source, start=start, objective=objective, width=width)
                for objective, width in places]
        found = [
            ("1", "CL: largest - smallest, mean of both heads", self.cells.contrast(cl)),
            ("1", "KD: largest - smallest, mean of both heads", self.cells.contrast(kd)),
            ("1", "CL's growth less KD's", self.cells.contrast(cl + less_kd)),
            ("2", "sparse - dense, all sizes and objectives", self.heads_apart(grid)),
        ]
        best = self.cell(source, start=start, head="sparse", objective="cl+kd", width=self.largest)
        others = [{**cell, "head": head} for cell in grid for head in OF_HEAD]
        others = [cell for cell in others if cell != best and self.cells.scores(cell, "mrr@10")]
        if others:
            # The rival is chosen by its score, which flatters it: the test errs against the finding.
            rival = max(others, key=lambda cell: np.mean(self.cells.scores(cell, "mrr@10")))
            name = f"{rival['head']} {rival['objective']} {rival['width']}"
            apart = self.cells.contrast([(1, best), (-1, rival)])
            found.append(("3", f"largest sparse CL+KD - the best other cell ({name})", apart))
        return found


def costs_of(rows: list[dict]) -> list[str]:
    """Non-zeros of a query and a document, and the size of the index, means over seeds."""
    if not rows:
        return ["-", "-"]
    queries, docs, size = (np.mean([row.get(key, math.nan) for row in rows]) for key in COSTS)
    return ["-" if math.isnan(docs) else f"{queries:.0f} / {docs:.0f}", f"{size / 1e6:.2f}"]


def write_table(args):
    """Print the tables of what has been run, as markdown."""
    rows, split = read_rows(args.results, args.preset), "dev" if args.preset == "pocket-dev" else "test"
    done = Cells(rows.values(), split)
    if not done.good:
        raise ValueError(f"{args.results}: no finished cell of --preset {args.preset}; `run` makes some")
    text = []
    if all("ranks" in row and "setting" not in row for row in done.good):
        # Real weights have a size and a collection of their own, and so a table of their own.
        for cells in (done.only(lambda row: row["source"] != "smollm2"),
                      done.only(lambda row: row["source"] == "smollm2")):
            text += tables(Report(cells, args.metric)) if cells.good else []
    else:
        text = section(f"{args.preset}: every cell", plain_rows(done), words=4)
    text += gaps(done, jobs_of(args))

    seeds, when = done.values("seed"), sorted(row["when"] for row in done.good)
    hours = sum(row["cpu_seconds"] for row in rows.values() if "cpu_seconds" in row) / 3600
    print(f"{len(done.good)} cells, seeds {', '.join(map(str, seeds))}: mean ± standard deviation over "
          "seeds. p is two-sided, with seeds and\nqueries as crossed random effects (where there is one "
          "seed: paired t-test over queries), and not corrected\nfor the number of tests.")
    print(f"{hours:.1f} hours of processor time, {when[0]} to {when[-1]} UTC, {done.good[-1]['machine']}.\n")
    print("\n".join(text))


def tables(report: Report) -> list[str]:
    """Everything that varies among the cells of a report."""
    for source in report.cells.values("source")[::-1]:
        for start in STARTS:
            report.grid(source, start)
    if len(report.widths) > 1:
        first = next(iter(POCKET.sources))
        taught = [kind for kind in report.kinds if kind["objective"] != "cl"]
        labelled = [kind for kind in report.kinds if kind["objective"] == "cl"]
        for start in STARTS:
            report.along("share of wrong labels", first, start, "label_noise", labelled)
            report.along("noise of the teacher (deviation)", first, start, "teacher_noise", taught)
            report.along("FLOPs", first, start, "budget", report.kinds)
        report.starts()
        report.findings()
    return report.text


def gaps(cells: Cells, jobs: list[Job]) -> list[str]:
    """What failed, and what has not been run."""
    text = [f"- gap: {row['job']}: {row['error']}" for row in cells.rows if "error" in row]
    known = {row["job"] for row in cells.rows}
    missing = [job.name for job in jobs if job.cell and job.name not in known]
    if missing:
        text.append(f"- {len(missing)} cells have not been run, the first is {missing[0]}")
    return text


def plain_rows(cells: Cells) -> list[list[str]]:
    """A row a cell, for the settings that were tried and for real backbones."""
    metrics = list(dict.fromkeys(metric for row in cells.good for metric in row["metrics"]))
    facts = ("source", "head", "objective", "setting", "width", "seed", "steps")
    rows = [[*facts, *metrics, "nnz q / d", "index MB"]]
    for row in cells.good:
        scores = (f"{row['metrics'].get(metric, math.nan):.4f}" for metric in metrics)
        rows.append([*(str(row.get(fact, "-")) for fact in facts), *scores, *costs_of([row])])
    return rows


# Pictures.


def draw(args):
    """scaling: quality against parameters and FLOPs. noise: against wrong labels and a noisy teacher."""
    from tools import plot

    cells = Cells(read_rows(args.results, args.preset).values())
    report = Report(cells.only(lambda row: row["source"] != "smollm2"), args.metric)
    first = next(iter(POCKET.sources))
    grids = [(source, start) for source in report.cells.values("source")[::-1] for start in STARTS]
    axes = {"label_noise": "share of wrong labels", "teacher_noise": "noise of the teacher"}
    pictures = {"scaling": [(source, start, "size", "width", "parameters") for source, start in grids]
                + [(first, "pretrained", "flops", "budget", "FLOPs")],
                "noise": [(first, start, "noise", *axis) for axis in axes.items() for start in STARTS]}
    seeds = len(report.cells.values("seed"))
    note = f"mean of up to {seeds} seeds; bars: one standard deviation" if seeds > 1 else "one seed"
    for name, wanted in pictures.items():
        panels = []
        for source, start, x, varied, label in wanted:
            axis, rows = plot.axis_of(x), rows_along(report, source, start, varied)
            if rows:
                curves = plot.curves_of(rows, x, args.metric, among=report.kinds)
                y_label = plot.pretty(args.metric)
                title = f"{source}, {start} start: {label}"
                panels.append(plot.Panel(curves, title, y_label, axis.log, axis.unit, axis.chosen))
        if panels:
            print(plot.draw(panels, Path(args.out or RESULTS.parent) / f"{name}.{args.format}", note=note))


def rows_along(report: Report, source: str, start: str, varied: str) -> list[dict]:
    """The rows of a grid in which only `varied` moves, of the kinds of model for which it does move."""
    rows = []
    values = report.cells.values(varied, source=source, start=start)
    for kind in report.kinds:
        cell, found = report.cell(source, start=start, width=report.middle, **kind), []
        for value in values:
            shown = {"metric": report.metric, "setting": value, "noise": value}
            for row in report.cells.get({**cell, varied: value}).values():
                found.append(row | shown | {"value": row["metrics"][report.metric]})
        if len({row[varied] for row in found}) > 1:
            rows += found
    return rows


# The command.


def show_lines(args):
    """Every job's command lines, ready for a shell."""
    print(f"# {args.preset}: the same lines again go on where they were stopped")
    for job in jobs_of(args):
        after = f" (after {', '.join(dict.fromkeys(job.needs))})" if job.needs else ""
        print(f"\n# {job.name}{after}")
        for line in job.commands:
            print(wrapped(line))


def wrapped(line: str, width: int = 106) -> str:
    """A command line over several lines, broken before flags."""
    out = []
    for part in line.replace(" --", "\n--").split("\n"):
        if out and len(out[-1]) + len(part) < width:
            out[-1] += f" {part}"
        else:
            out.append(part)
    return " \\\n  ".join(out)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=Help)
    verbs = {"run": run, "table": write_table, "plot": draw, "print": show_lines}
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("--preset", choices=PRESETS, default="pocket",
                        help="pocket-dev: the settings that were tried for pocket; pocket-real: "
                        "six cells of SmolLM2-135M; tiny: pocket in miniature")
    parser.add_argument("--out", help="run, print: the folder of data, bases and cells (runs/study/PRESET "
                        "without it); plot: the folder of the pictures")
    parser.add_argument("--results", default=str(RESULTS), help="the rows of what has been run")
    parser.add_argument("--metric", default="mrr@10", help="table, plot: which one; the tests are of MRR@10")
    parser.add_argument("--format", choices=["svg", "pdf", "png"], default="svg", help="plot")
    g = parser.add_argument_group("run")
    g.add_argument("--at_once", type=positive_int, help="jobs side by side (one a core; with --gpus 1)")
    g.add_argument("--keep", action="store_true", help="keep the index and the checkpoints of each cell")
    g = parser.add_argument_group("llama3, smollm2")
    g.add_argument("--gpus", type=positive_int, help="GPUs of one job (llama3 4, smollm2 1)")
    g.add_argument("--msmarco", default="msmarco", help="the folder of collection.tsv, queries and qrels of "
                   "train, dev and TREC DL, and train.{cl,kd,cl+kd}.jsonl, of tools.mine and tools.score")
    g.add_argument("--beir", default="beir", help="the folder of the BEIR sets' folders")
    args = parser.parse_args(argv)
    args.gpus = args.gpus or {"llama3": 4, "smollm2": 1}.get(args.preset, 0)
    args.at_once = args.at_once or (1 if args.gpus else len(os.sched_getaffinity(0)))
    run_command(parser.prog, partial(verbs[args.verb], args))


if __name__ == "__main__":
    main()
