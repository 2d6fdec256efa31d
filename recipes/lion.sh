#!/usr/bin/env bash
# The authors' toy example: their published 1B models, loaded here, must give the scores that they print.
#
#   recipes/lion.sh                                    needs the hub, and access to meta-llama/Llama-3.2-1B
#   BASE=/data/Llama-3.2-1B recipes/lion.sh            their base from a folder
#   SPARSE=... DENSE=... recipes/lion.sh               copies of the adapters, as folders
#
# Their 8B models need --base: the one that their adapters name is a path on the authors' machine.
#   python -m tools.check hzeng/Lion-SP-8B-llama3-marco-mntp --base meta-llama/Meta-Llama-3-8B
set -euo pipefail
cd "$(dirname "$0")/.."
export SPARSE=${SPARSE:-hzeng/Lion-SP-1B-llama3-marco-mntp} BASE=${BASE:-}
export DENSE=${DENSE:-hzeng/Lion-DS-1B-llama3-marco-mntp}
exec "${PYTHON:-python3}" -W ignore - << 'END'
import os
import sys

from data import run_command
from model import Retriever

QUERIES = ["What is the capital of France?", "Who wrote '1984'?"]
PASSAGES = ["Paris is the capital of France.", "George Orwell wrote '1984'."]
# Two queries by two passages, as the README of the authors' repository prints them, rounded.
PUBLISHED = {"sparse": [[14.835, 0.026], [0.005, 13.910]], "dense": [[0.288, 0.132], [0.104, 0.292]]}


def compare():
    far = []
    for head, published in PUBLISHED.items():
        r = Retriever.load(os.environ[head.upper()], head=head, base=os.environ["BASE"] or None)
        q, d = r.encode(QUERIES, "query", 192), r.encode(PASSAGES, "passage", 192)
        scores = (q.to_dense() @ d.to_dense().T).tolist()
        for query, ours, theirs in zip(QUERIES, scores, published):
            here, there = ("".join(f"{score:9.3f}" for score in row) for row in (ours, theirs))
            print(f"{head:6}  {query:31}  here {here}   published {there}")
        # Half a percent of the largest score: theirs may have been computed in another precision.
        largest = max(map(max, published))
        differences = [abs(a - b) for ours, theirs in zip(scores, published) for a, b in zip(ours, theirs)]
        if max(differences) > 0.005 * largest + 0.001:
            far.append(f"{head} by {max(differences):.3f}")
    if far:
        sys.exit(f"lion.sh: not the published scores: {', '.join(far)}. Another adapter or base than theirs?")
    print("the published scores")


run_command("lion.sh", compare)
END
