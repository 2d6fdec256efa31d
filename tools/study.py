"""The paper's question as one command: sizes x {sparse, dense} x {CL, KD, CL+KD} x seeds at the same compute.

    python -m tools.study run   --preset pocket     # two cores, no GPU; killed? the same line goes on
    python -m tools.study table --preset pocket     # means, deviations and tests of what has been run
    python -m tools.study plot  --preset pocket --out recipes/study
    python -m tools.study print --preset llama3     # the paper's 18 cells as command lines, for a cluster

A job is a list of command lines that anybody could type; `print` shows them. Jobs that prepare (data, bases,
a teacher) run when a cell needs them. Each finished job becomes a row of results.jsonl: what was measured, by
which lines, from what (fingerprints of its inputs), in how many seconds. Tables and pictures are made from
rows alone, by tools/study_report.py, which this tool imports.

Another size, source or seed is an entry in POCKET, another cell a call of PocketJobs.cell. Another panel is
a keyword there, an entry in Pocket.panels and CONCERNS, and a line in the report. What surprises:

- Only rows count. A cell is skipped if its row was made by the same command lines, its own and those of all
  that it needs, and has the same fingerprint for each input that is here to be compared. So the committed
  rows spare a fresh clone their work; delete one, and it is run again (its training only if the cell's folder
  is gone, too).
- FOLDER.recipe.json says what a folder was begun for. Where that is the same, a killed job goes on in it, and
  what is finished stays. Where it is not, the folder becomes FOLDER.old, and the job begins anew.
- A failed cell is a row with its error, and a gap in every table. The next `run` tries it again.
- On a CPU each job has one thread and a process forked from one that has loaded torch already: the smallest
  cells take less time than `import torch`. What is called are the scripts' own `main` functions.
- Pocket's seeds change the order of the training rows and the negatives. There is one base a size, as there
  is one Llama-3 8B.
"""
import argparse
import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data import (Help, digest, discard, fingerprint, locked, parse_json, positive_int, read_json, read_lines,
                  run_command, write_whole)
from tools import study_report
from tools.demo_data import available_cores
from tools.study_report import COSTS, HEADS, OBJECTIVES, STARTS, Cell

RESULTS = Path(__file__).resolve().parent.parent / "recipes/study/results.jsonl"


class Job(NamedTuple):
    """Command lines that make one folder: with a `cell` they measure a model, else they prepare."""
    name: str
    folder: Path
    commands: list[str]
    needs: tuple = ()       # names of the jobs that must have run before
    inputs: dict = {}       # {what it is: file or folder}, whose fingerprints belong to the result
    cell: dict = {}         # the fields of a Cell, seed and split: they become part of the row
    beir: bool = False      # its scores are in tools.beir's folder, else in what tools.compare --json printed
    also: tuple = ()        # folders that it makes beside its own
    recipe: str = ""        # digest of its lines and of those of all that it needs


# The pocket study: two sources of text, and a small Llama in three sizes that is pre-trained here.


LAYERS = 2
ORACLE_NOISE = 0.5  # of the oracle's scores where nothing else is said: tools.demo_data's default
LENGTHS = "--query_length 32 --passage_length 64"
# One thread and no loader: the cores are busy with other cells.
CPU = "--tokens_per_chunk 1024 --workers 0"
# A pre-trained head has every frequent word on. Thresholds let each be on in this share of texts at first.
ON_AT_FIRST = 0.02

# Chosen beforehand, the same for every objective.
OF_HEAD = {"sparse": "--flops_q 0.05 --flops_d 0.04", "dense": "--temperature 0.05"}
# {what a panel moves: the objectives that are tried with it}. CL alone sees no scores of a teacher.
CONCERNS = {"label_noise": ("cl",), "teacher_noise": ("kd", "cl+kd"), "share": ("cl", "cl+kd")}
# Tried for each head and objective, with seed 0 and the middle size, on dev queries: `--preset pocket-dev`.
RATES = ("8e-3", "4e-3", "2e-3")
# {(head, objective): learning rate}, for both sources and every size: the smallest within 0.005 of the best.
CHOSEN = {
    ("sparse", "cl"): "2e-3", ("sparse", "kd"): "4e-3", ("sparse", "cl+kd"): "2e-3",
    ("dense", "cl"): "2e-3", ("dense", "kd"): "2e-3", ("dense", "cl+kd"): "2e-3",
}


class Source(NamedTuple):
    """A collection with its queries, and how much compute its cells get."""
    data: str               # flags of tools.demo_data
    vocab: int
    corpus: str             # the file in the data folder that is trained on and searched
    budget: float           # FLOPs of one cell
    texts: str = ""         # more flags, for more text of its kind to pre-train on; without: its corpus
    taught: int = 0         # queries that the study's own teacher scores; 0: rows have an oracle's scores


class Pocket(NamedTuple):
    """Everything that sets the size of the study, and how its models are made and trained."""
    sources: dict
    widths: tuple = (64, 96, 128)
    seeds: tuple = (0, 1, 2)
    objectives: tuple = OBJECTIVES
    starts: tuple = STARTS
    # What moves beside the grid: shares of training rows with a wrong positive, deviations of the noise on
    # scores between 0 and 10, shares of the source's budget.
    panels: dict = {"label_noise": (0.2, 0.4), "teacher_noise": (2.0, 4.0), "share": (0.25, 0.5, 2.0)}
    # The models that it starts from.
    fetch: str = ""                     # flags of tools.pretrained: real weights; without, pre-trained here
    base: str = "--block_length 128 --queries_per_step 32"
    # After 400 and 200 steps a base knew too little: KD learnt nothing from there (recipes/NOTES.md).
    clm_steps: int = 1200
    mntp_steps: int = 400
    teacher_steps: int = 60
    # The training of a cell. A step shows 64 passages, whatever the objective. More negatives mean fewer
    # queries, and 16 with 3 each taught such small models nothing (recipes/NOTES.md).
    batch: dict = {"cl": (64, 0), "cl+kd": (32, 1), "kd": (32, 1)}  # queries, and negatives of each
    rates: dict = CHOSEN
    train: str = "--lora_rank 0"        # more flags of train.py: models this small are trained whole
    build: str = ""                     # more flags of index.py build
    gpus: int = 0                       # of one job; none, they run on a CPU


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
)
# One size of real weights, SmolLM2-135M on a CPU, as recipes/pretrained.sh adapts and trains it (its settings
# were chosen on dev queries there). With half the queries a step its budget is 25 to 31 steps even so.
REAL = Pocket(
    sources={"smollm2": Source(data="--small 1000 --test_queries 400", vocab=4096,
                               corpus="corpus.small.jsonl", budget=3e13, taught=2000)},
    widths=("135m",), seeds=(0,), starts=("pretrained",), panels={},
    fetch="--center", base="--block_length 128 --queries_per_step 16", mntp_steps=30,
    batch={"cl": (32, 0), "cl+kd": (16, 1), "kd": (16, 1)}, rates=dict.fromkeys(CHOSEN, "5e-4"),
    train="--dtype bf16 --attn eager --lora_dropout 0", build="--compute bf16 ",
)
# Pocket in miniature, to see that it runs.
TINY = Pocket(
    sources={"world": Source(data="--source synthetic --documents 300 --train_queries 400 --dev_queries 20 "
                                  "--test_queries 30", vocab=512, corpus="corpus.jsonl", budget=6e9)},
    widths=(32, 64), seeds=(0, 1), objectives=("cl",), panels={"label_noise": (0.5,), "share": (2.0,)},
    base="--block_length 32 --queries_per_step 8", clm_steps=3, mntp_steps=3,
)


class PocketJobs:
    """The jobs of a pocket study below `out`, in the order in which they are worth having."""

    def __init__(self, size: Pocket, out: Path):
        self.size, self.out, self.jobs = size, out, {}
        self.middle = size.widths[len(size.widths) // 2]
        # The source of the panels, and of the rates that are tried.
        self.first = next(iter(size.sources))

    def add(self, job: Job) -> Job:
        """The job, once however often it is asked for."""
        return self.jobs.setdefault(job.name, job)

    # What is worth having.

    def study(self) -> list[Job]:
        """Seed 0 of everything first: the grid, then the panels."""
        size = self.size
        for seed in size.seeds:
            for start in size.starts:
                # The other start is there to be compared with, not to be scaled: one size will do.
                widths = size.widths if start == "pretrained" else size.widths[:1]
                for source in size.sources:
                    self.grid(source, widths, seed, start=start)
            for head in HEADS:
                self.panels(head, seed)
        return list(self.jobs.values())

    def dev(self) -> list[Job]:
        """Every rate that is tried, on dev queries: as many for each head and objective."""
        for rate in RATES:
            self.grid(self.first, (self.middle,), 0, rate=rate, split="dev")
        return list(self.jobs.values())

    def grid(self, source: str, widths: tuple, seed: int, **named):
        for objective in self.size.objectives:
            for width in widths:
                for head in HEADS:
                    self.cell(source, width, head, objective, seed, **named)

    def panels(self, head: str, seed: int):
        """What moves beside the grid, at the middle size."""
        for what, values in self.size.panels.items():
            for value in values:
                for objective in self.size.objectives:
                    if objective in CONCERNS[what]:
                        self.cell(self.first, self.middle, head, objective, seed, **{what: value})

    def cell(self, source: str, width: int | str, head: str, objective: str, seed: int, *, share: float = 1.0,
             label_noise: float = 0.0, teacher_noise: float = ORACLE_NOISE, start: str = "pretrained",
             rate: str = "", split: str = "test") -> Job:
        """Train, index, search and measure one model. What is said by name differs from the grid."""
        # Asked for in the order in which they must be made, and so in which they are printed.
        of, data, (made_rows, rows) = self.size.sources[source], self.data(source), self.rows(source)
        made = self.base(source, width) if start == "pretrained" else self.untrained(source, width, start)
        needs, name = [data.name, made_rows.name, made.name], f"{source}/{head}-{objective}-{width}"
        # A name says only what differs from the grid: so a cell has one name, whoever asks for it.
        if share != 1:
            name += f"-x{share:g}"
        if label_noise or teacher_noise != ORACLE_NOISE:
            # Noise changes the training rows alone: the texts and the queries stay those of the plain data.
            noise = f"noise-{label_noise:g}-{teacher_noise:g}"
            noisy = self.data(source, noise, f"--label_noise {label_noise} --teacher_noise {teacher_noise} ")
            name, rows = f"{name}-{noise}", noisy.folder / "train.jsonl"
            needs.append(noisy.name)
        if start != "pretrained":
            name += f"-{start}"
        if rate:
            name += f"-rate-{rate}"
        name += f"-seed{seed}"

        # What decides over the figures: if one of these files changes, the row is no longer this cell's.
        inputs = {"model": made.folder, "rows": rows, "corpus": data.folder / of.corpus,
                  "queries": data.folder / f"queries.{split}.jsonl",
                  "qrels": data.folder / f"qrels/{split}.tsv"}
        cell = Cell(source, start, width, head, objective, of.budget * share, label_noise, teacher_noise)
        facts = {**cell._asdict(), "seed": seed, "split": split}
        if rate:
            facts["setting"] = f"--lr {rate}"
        folder = self.out / "cells" / name
        lines = self.cell_lines(cell, seed, inputs, folder, rate or self.size.rates[head, objective])
        return self.add(Job(name, folder, lines, tuple(needs), inputs, facts))

    def cell_lines(self, cell: Cell, seed: int, inputs: dict, folder: Path, rate: str) -> list[str]:
        """From a model and rows to numbers."""
        size, corpus, (queries, negatives) = self.size, inputs["corpus"], self.size.batch[cell.objective]
        # The lexical start has few words on as it is.
        has_all_on = (cell.head, cell.start) == ("sparse", "pretrained")
        calibrate = f"--calibrate {ON_AT_FIRST} " if has_all_on else ""
        return [
            f"python train.py --model {inputs['model']} {size.train} --head {cell.head} "
            f"--objective {cell.objective} --train {inputs['rows']} --corpus {corpus} "
            f"--flop_budget {cell.budget:g} --queries_per_step {queries} --negatives {negatives} "
            f"{LENGTHS} --lr {rate} {OF_HEAD[cell.head]} {calibrate}{CPU} "
            f"--save_every 200 --log_every 50 --seed {seed} --resume --out {folder}/run",
            f"python index.py build --model {folder}/run --corpus {corpus} {size.build}"
            f"--tokens_per_batch 4096 --out {folder}/index",
            f"python index.py search --index {folder}/index --queries {inputs['queries']} --k 100 "
            f"--out {folder}/test.trec",
            f"python -m tools.compare --qrels {inputs['qrels']} --run {folder}/test.trec "
            f"--metrics mrr@10 ndcg@10 recall@100 --costs --per_query {folder}/test.tsv "
            f"--json > {folder}/test.json",
        ]

    # What a cell needs.

    def data(self, source: str, name: str = "data", flags: str = "") -> Job:
        """A folder of tools.demo_data: texts, queries, rows. The model that lies in it is not used."""
        of, folder = self.size.sources[source], self.out / source / name
        line = f"python -m tools.demo_data {of.data} --vocab {of.vocab} --hidden 32 {flags}--out {folder}"
        return self.add(Job(f"{source}/{name}", folder, [line]))

    def untrained(self, source: str, width: int, init: str = "default") -> Job:
        """A model of that width for a source's data, with the data's tokenizer."""
        data, vocab = self.data(source), self.size.sources[source].vocab
        folder = self.out / source / f"{init}-{width}"
        line = (f"python -m tools.demo_data --model_only {data.folder} --vocab {vocab} --hidden {width} "
                f"--layers {LAYERS} --init {init} --out {folder}")
        return self.add(Job(f"{source}/{init}-{width}", folder, [line], (data.name,)))

    def base(self, source: str, width: int | str) -> Job:
        """A Llama that has learnt to look both ways: pre-trained on the source's text, or fetched."""
        return self.adapted(source, width) if self.size.fetch else self.pretrained(source, width)

    def pretrained(self, source: str, width: int) -> Job:
        """Our own hub: a Llama that read the source's text, and then went through MNTP."""
        of, data, start = self.size.sources[source], self.data(source), self.untrained(source, width)
        # A base may read more text than is searched: the more it knows, the more a cell can learn from it.
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
        needs = (data.name, texts.name, start.name)
        return self.add(Job(f"{source}/base-{width}", mntp, lines, needs, also=(clm,)))

    def adapted(self, source: str, width: str) -> Job:
        """Real weights, which need MNTP alone: they have read more than we could show them."""
        data, name, weights = self.data(source), f"{source}/base-{width}", self.out / source / "weights"
        fetch = f"python -m tools.pretrained {self.size.fetch} --out {weights}"
        mntp = (f"python train.py --model {weights} {self.size.train} --objective mntp "
                f"--corpus {data.folder}/corpus.jsonl {self.size.base} --max_steps {self.size.mntp_steps} "
                f"--lr 5e-4 --warmup 0.05 {CPU} --resume --out {self.out / name}")
        # A job of its own: weights that are here are not fetched again when training fails.
        self.add(Job(f"{source}/weights", weights, [fetch]))
        return self.add(Job(name, self.out / name, [mntp], (data.name, f"{source}/weights")))

    def rows(self, source: str) -> tuple[Job, Path]:
        """The job that makes the training rows of a source, and the rows."""
        if self.size.sources[source].taught:
            teacher = self.teacher(source)
            return teacher, teacher.folder / "rows.jsonl"
        data = self.data(source)
        return data, data.folder / "train.jsonl"

    def teacher(self, source: str) -> Job:
        """Hard negatives with scores: the sum of BM25 and of a sparse model from the lexical start."""
        of, made, folder = self.size.sources[source], self.data(source), self.out / source / "teacher"
        start, data = self.untrained(source, 128, "lexical"), made.folder
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
        return self.add(Job(f"{source}/teacher", folder, lines, (made.name, start.name)))


# Real backbones, on GPUs.


class Grid(NamedTuple):
    """Backbones of one family, and what one cell of each costs."""
    models: dict            # size -> hub name
    horizon: dict           # (size, whether KD) -> flags: queries a step, how long, accumulation
    mntp: str = ""          # flags of the first stage, beyond its defaults
    sparse: str = ""        # flags of the sparse head
    beir: str = ""          # flags of tools.beir
    gpus: int = 1           # of one job


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
    gpus=4,
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


def gpu_jobs(grid: Grid, out: Path, gpus: int) -> list[Job]:
    """The 18 cells of a family. The adapter that MNTP trained is the one that goes on training."""
    launch, corpus = f"torchrun --nproc_per_node={gpus}", "$MSMARCO/collection.tsv"
    bases = {}
    for size, model in grid.models.items():
        folder = out / f"mntp-{size}"
        line = (f"{launch} train.py --model {model} --objective mntp {grid.mntp}--corpus {corpus} "
                f"--resume --out {folder}")
        bases[size] = Job(folder.name, folder, [line])

    cells = [Cell("msmarco", "pretrained", size, head, objective)
             for objective in OBJECTIVES for size in grid.models for head in HEADS]
    jobs = list(bases.values())
    for cell in cells:
        base, folder = bases[cell.width], out / f"{cell.head}-{cell.width}-{cell.objective}"
        rows = Path(f"$MSMARCO/train.{cell.objective}.jsonl")
        horizon = grid.horizon[cell.width, cell.objective == "kd"]
        sparse = grid.sparse if cell.head == "sparse" else ""
        lines = [
            f"{launch} train.py --model {base.folder} --head {cell.head} --objective {cell.objective} "
            f"{horizon} {sparse}--train {rows} --corpus {corpus} "
            f"--queries $MSMARCO/queries.train.tsv --resume --out {folder}/run",
            f"{launch} -m tools.beir --model {folder}/run --msmarco $MSMARCO "
            f"--data $BEIR {grid.beir}--out {folder}/beir",
        ]
        inputs, facts = {"model": base.folder, "rows": rows}, {**cell._asdict(), "seed": 0, "split": "test"}
        jobs.append(Job(folder.name, folder, lines, (base.name,), inputs, facts, beir=True))
    return jobs


PRESETS = {"pocket": POCKET, "pocket-dev": POCKET, "pocket-real": REAL, "tiny": TINY, "smollm2": SMOLLM2,
           "llama3": LLAMA3}


def study_of(preset: str) -> str:
    """pocket-dev and pocket-real are parts of pocket, in one folder and in one file of results."""
    return preset.removesuffix("-dev").removesuffix("-real")


def split_of(preset: str) -> str:
    """The queries that a preset's cells are measured on."""
    return "dev" if preset == "pocket-dev" else "test"


def place_of(args) -> Path:
    """Where data, bases and cells go."""
    return Path(args.out or f"runs/study/{study_of(args.preset)}")


def plain_jobs(args) -> list[Job]:
    """The jobs of --preset with $OUT, $MSMARCO and $BEIR for the folders that the command names."""
    size, out = PRESETS[args.preset], Path("$OUT")
    if isinstance(size, Grid):
        return gpu_jobs(size, out, args.gpus)
    jobs = PocketJobs(size, out)
    return jobs.dev() if split_of(args.preset) == "dev" else jobs.study()


def jobs_of(args) -> list[Job]:
    """The jobs of --preset, where they run."""
    places = {"$OUT": place_of(args), "$MSMARCO": Path(args.msmarco), "$BEIR": Path(args.beir)}
    jobs = {job.name: job for job in plain_jobs(args)}
    # The committed rows were made in another folder. So recipes are taken before the places are put in.
    return [placed(job, places)._replace(recipe=recipe(job, jobs)) for job in jobs.values()]


def recipe(job: Job, jobs: dict) -> str:
    """A digest of the job's command lines, and of the recipes of what it needs."""
    # Who pre-trains for longer has other cells, though their own lines say nothing of it.
    before = [recipe(jobs[name], jobs) for name in job.needs]
    return digest(*before, *job.commands)[:12]


def placed(job: Job, places: dict[str, Path]) -> Job:
    """The job in these folders."""
    def path(plain) -> Path:
        first, _, rest = str(plain).partition("/")
        return places[first] / rest if first in places else Path(plain)

    # Quoted as a shell wants it, for a folder with a space. The names that stand below it have none.
    lines = [re.sub(r"\$[A-Z]+[\w@%+=:,./-]*", lambda found: shlex.quote(str(path(found[0]))), line)
             for line in job.commands]
    inputs = {what: path(plain) for what, plain in job.inputs.items()}
    also = tuple(map(path, job.also))
    return job._replace(folder=path(job.folder), commands=lines, inputs=inputs, also=also)


# Rows: what is known of a job that has run.


def read_all(path) -> dict[tuple, dict]:
    """{(study, name of the job): its row}, in the file's order."""
    rows = [row for _, row in read_lines(path, parse_row)] if Path(path).exists() else []
    return {(row["preset"], row["job"]): row for row in rows}


def parse_row(line: str) -> dict:
    """A line of the results; one that a table or a `run` would stumble over is refused with its number."""
    row = parse_json(line)
    needed = ["preset", "job", "recipe", "inputs", "when", "machine"]
    # Cells have a split. Those that failed were not measured.
    if "split" in row:
        needed += [*Cell._fields, "seed", *([] if "error" in row else ["metrics"])]
    missing = [key for key in needed if key not in row]
    if missing:
        raise ValueError(f"no row of a study, it lacks {', '.join(missing)}; remove the line, and `run` "
                         "makes the row anew")
    return row


def read_rows(path, preset: str) -> dict[str, dict]:
    """{name of the job: its row} of one preset."""
    return {job: row for (study, job), row in read_all(path).items() if study == study_of(preset)}


def keep_row(path, row: dict):
    """Put a row in its place, or at the end."""
    # The file is read anew: another preset may have written to it since.
    with locked(path, wait=True):
        rows = read_all(path) | {(row["preset"], row["job"]): row}
        with write_whole(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())


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


def is_done(job: Job, row: dict | None, prints: Prints) -> bool:
    """Whether the row is this job's, from these lines and, as far as they are here, these inputs."""
    if row is None or "error" in row or row["recipe"] != job.recipe:
        return False
    # What is not here cannot have changed: a clone without data trusts its committed rows.
    now = {what: prints[path] for what, path in job.inputs.items()}
    return all(now[what] in (None, then) for what, then in row["inputs"].items())


def to_run(jobs: list[Job], rows: dict, prints: Prints) -> list[Job]:
    """The cells that are not done, each after the preparations that it needs and that are not here."""
    by_name, order = {job.name: job for job in jobs}, {}

    def want(job: Job):
        # Depth first, and a dict keeps the order: a need is in the list before whoever needs it.
        for before in map(by_name.get, job.needs):
            if not (before.folder.exists() and is_done(before, rows.get(before.name), prints)):
                want(before)
        order[job.name] = job

    for job in jobs:
        if job.cell and not is_done(job, rows.get(job.name), prints):
            want(job)
    return list(order.values())


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
    # tools.compare compares any number of runs; here it was given one.
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
    # What study_report.reciprocal reads back. So a row holds all that a test needs, and is still one line.
    lines = [line.split("\t") for _, line in read_lines(path)]
    column = next(i for i, name in enumerate(lines[0]) if name.endswith("mrr@10"))
    values = [float(line[column]) for line in lines[1:]]
    return "".join(".123456789a"[round(1 / value) if value else 0] for value in values)


# Running.


def perform(job: Job, made_from: dict, slot: int, gpus: int):
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
    if not begin(job, made_from):
        print("finished before, from the same", file=sys.stderr)
        return
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


def begin(job: Job, made_from: dict) -> bool:
    """Make way for the job's lines, and note what they are. False: they have been run, there is no need."""
    note, taken = Path(f"{job.folder}.recipe.json"), Path(f"{job.folder}.seconds.json")
    now = {"commands": job.commands, "made_from": made_from}
    same = note.exists() and read_json(note) == now
    # Not so a cell: who deletes its row wants it to be measured again.
    if same and not job.cell and taken.exists() and job.folder.exists():
        return False
    taken.unlink(missing_ok=True)
    # What is not these lines' own work, or what they cannot go on from, they would refuse. It is not removed:
    # it may have taken days, or have been made by hand.
    if not (same and any("--resume" in line for line in job.commands)):
        for folder in filter(Path.exists, (job.folder, *job.also)):
            old = Path(f"{folder}.old")
            if old.exists():
                discard(old)
            folder.rename(old)
            print(f"{folder} was made from something else, or not finished: now {old}", file=sys.stderr)
    with write_whole(note) as file:
        json.dump(now, file, indent=1)
    return True


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
    # Before the first process that holds torch is made: it reads them once.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "index", "tools.compare"])
    # Two studies in one folder would train into each other's checkpoints.
    with locked(place_of(args) / "study"):
        runner = Runner(args, context)
        try:
            runner.run()
        finally:
            # After an error or Ctrl-C; whatever ends this process by force is leave_with's case.
            for process, _ in runner.running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


class Runner:
    """Starts what is ready while a slot is free, waits for one job to end, keeps its row, and looks again."""

    def __init__(self, args, context):
        self.args, self.context = args, context
        self.jobs = {job.name: job for job in jobs_of(args)}
        self.cells = sum(bool(job.cell) for job in self.jobs.values())
        self.running, self.failed, self.prints, self.began = {}, {}, Prints(), time.time()

    def run(self):
        while True:
            todo = self.todo()
            waiting = {job.name for job in todo}
            # What runs is still waited for: a job is ready when none of its needs is left.
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
        failed = f"; failed: {', '.join(self.failed)}" if self.failed else ""
        print(f"{self.args.results}: {self.cells_done()} of {self.cells} cells{failed}")

    def todo(self) -> list[Job]:
        """What is left, without what failed in this run and what needs that."""
        rows = read_rows(self.args.results, self.args.preset)
        left = to_run(list(self.jobs.values()), rows, self.prints)
        # Needs come first in it, so a failure goes on to all that stand on it; each gets a row that says so.
        for job in left:
            lost = [name for name in job.needs if name in self.failed]
            if lost and job.name not in self.failed:
                self.failed[job.name] = f"needs {lost[0]}, which failed"
                self.keep(job, {})
        return [job for job in left if job.name not in self.failed]

    def cells_done(self) -> int:
        # The list comes first: while it is made, a failure goes on to the cells that stand on it.
        left = {job.name for job in self.todo()}
        left.update(self.failed)
        return sum(bool(job.cell) and job.name not in left for job in self.jobs.values())

    def start(self, job: Job):
        # A free slot's GPUs are nobody's.
        taken = {slot for _, slot in self.running.values()}
        slot = min(set(range(self.args.at_once)) - taken)
        # As train.py looks at its inputs when it goes on: at a model's every file, not at its weights alone.
        read = [*(self.jobs[name].folder for name in job.needs), *job.inputs.values()]
        made_from = {str(path): fingerprint(path) for path in read}
        process = self.context.Process(target=perform, args=(job, made_from, slot, self.args.gpus))
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
            # Exit 0 is not enough: a cell without figures is a gap like any other.
            try:
                found = read_json(f"{job.folder}.seconds.json") | (measured(job) if job.cell else {})
            except (ValueError, OSError, KeyError) as e:
                self.failed[name] = f"its results cannot be read: {e!r}"
        row = self.keep(job, found)
        scores = ", ".join(f"{key} {value:.4f}" for key, value in row.get("metrics", {}).items())
        print(f"{self.cells_done()}/{self.cells} cells, {time.time() - self.began:.0f} s | {name} | "
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
        row |= {"recipe": job.recipe,
                "inputs": {what: self.prints[path] for what, path in job.inputs.items()},
                "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "machine": machine()}
        keep_row(self.args.results, row)
        return row


def last_words(job: Job, code: int) -> str:
    """The last line of a failed job's log: of a traceback it is the message."""
    log = Path(f"{job.folder}.log")
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line for line in lines if line.strip()] or ["it said nothing"]
    return f"{said[-1]} (exit {code}, {log})"


def machine() -> str:
    """Processor, cores and torch: what decides over the last digits and the seconds."""
    # Only Linux has this file; what Python says elsewhere is vaguer.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    torch = importlib.metadata.version("torch")
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, torch {torch}"


# The command.


AGAIN = """\
# {preset}. A line that is typed again: trainings, the building of an index and tools.beir go on where they
# were stopped. What index.py build, tools.bm25 build and tools.demo_data have finished they refuse to make
# again: skip the line, or remove the folder. All others can simply be repeated."""


def show_lines(args):
    """Every job's command lines, ready for a shell."""
    print(AGAIN.format(preset=args.preset))
    for job in jobs_of(args):
        # One job may be needed twice, for texts and for rows.
        after = f" (after {', '.join(dict.fromkeys(job.needs))})" if job.needs else ""
        print(f"\n# {job.name}{after}")
        # The scripts make their folders themselves. A shell's > does not, and in a first line nobody has yet.
        if ">" in shlex.split(job.commands[0]):
            print(f"mkdir -p {shlex.quote(str(job.folder))}")
        for line in job.commands:
            print(wrapped(line))


def wrapped(line: str, width: int = 106) -> str:
    """A command line over several lines, broken before flags."""
    # A quoted name may hold what looks like a flag.
    if "'" in line:
        return line
    out = []
    for part in line.replace(" --", "\n--").split("\n"):
        if out and len(out[-1]) + len(part) < width:
            out[-1] += f" {part}"
        else:
            out.append(part)
    return " \\\n  ".join(out)


def finished_rows(args, split: str) -> list[dict]:
    """The rows of --preset, if there is anything to report."""
    rows = list(read_rows(args.results, args.preset).values())
    if not any(row.get("split") == split and "error" not in row for row in rows):
        raise ValueError(f"{args.results}: no finished cell of --preset {args.preset}; `run` makes some")
    return rows


def show_tables(args):
    """Print the tables of what has been run, as markdown."""
    split = split_of(args.preset)
    names = [job.name for job in jobs_of(args) if job.cell]
    print(study_report.tables(finished_rows(args, split), names, args.preset, split, args.metric))


def draw_pictures(args):
    """Write the pictures of what has been run, and print where they are."""
    folder = Path(args.out) if args.out else RESULTS.parent
    written = study_report.draw(finished_rows(args, "test"), args.metric, folder, args.format)
    if not written:
        raise ValueError(f"{args.results}: no curve of {args.metric} among the finished cells of --preset "
                         f"{args.preset}, only single points; `run` makes more cells")
    print(*written, sep="\n")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=Help)
    verbs = {"run": run, "table": show_tables, "plot": draw_pictures, "print": show_lines}
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
    args.gpus = args.gpus or PRESETS[args.preset].gpus
    # Jobs of the CPU have one thread each; and by default one job has all GPUs.
    args.at_once = args.at_once or (1 if args.gpus else available_cores())
    run_command(parser.prog, partial(verbs[args.verb], args))


if __name__ == "__main__":
    main()
