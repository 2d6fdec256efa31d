#!/usr/bin/env bash
# The paper's grid on MS MARCO, one cell at a time:   recipes/paper.sh SIZE HEAD OBJECTIVE     (1b|3b|8b  sparse|dense  cl|kd|cl+kd)
#
#   MARCO=msmarco BEIR=beir GPUS=4 recipes/paper.sh 1b sparse cl+kd     # killed? the same line goes on
#   for size in 1b 3b 8b; do for head in sparse dense; do for o in cl kd cl+kd; do recipes/paper.sh $size $head $o; done; done; done
#
# $MARCO holds collection.tsv, queries.train.tsv, the queries and qrels of dev and TREC DL, and the training rows train.cl.jsonl,
# train.cl+kd.jsonl and train.kd.jsonl (any format of data.py; `tools.mine` and `tools.score` make them from a run and a teacher).
# $BEIR holds the BEIR sets' folders. ECHO=echo prints the command lines instead of running them.
#
# Fixed compute: parameters x passages encoded is 69 to 88 x 10^15 in every cell, so 7 : 3 : 1 epochs for 1B : 3B : 8B, and eight times as
# many for KD, which encodes 2 passages a query instead of 17. To set the budget yourself, replace --epochs N by --flop_budget F.
set -euo pipefail
cd "$(dirname "$0")/.."
size=${1:?1b, 3b or 8b} head=${2:?sparse or dense} objective=${3:?cl, kd or cl+kd}
MARCO=${MARCO:-msmarco} BEIR=${BEIR:-beir} GPUS=${GPUS:-4} RUNS=${RUNS:-runs} ECHO=${ECHO:-}

# Queries a step, epochs, and the paper's accumulation on 4 x 80 GB. The loss does not depend on the last: use what your memory wants.
case $size in
  1b) llama=meta-llama/Llama-3.2-1B ;;
  3b) llama=meta-llama/Llama-3.2-3B ;;
  8b) llama=meta-llama/Meta-Llama-3-8B ;;
  *) echo "no size $size: 1b, 3b or 8b" >&2; exit 2 ;;
esac
case $size-$objective in
  1b-kd) settings="--queries_per_step 1024 --epochs 56" ;;
  3b-kd) settings="--queries_per_step 512 --epochs 24" ;;
  8b-kd) settings="--queries_per_step 512 --epochs 8 --accumulation 2" ;;
  1b-*)  settings="--queries_per_step 112 --epochs 7" ;;
  3b-*)  settings="--queries_per_step 128 --epochs 3 --accumulation 2" ;;
  8b-*)  settings="--queries_per_step 128 --epochs 1 --accumulation 4" ;;
esac
torchrun="$ECHO torchrun --nproc_per_node=$GPUS"
mntp=$RUNS/mntp-$size run=$RUNS/$head-$size-$objective

# 1. MNTP teaches the model to use what stands to the right. The adapter that it trains is the one that goes on training below.
[ -e "$mntp/summary.json" ] || $torchrun train.py --model $llama --objective mntp --corpus "$MARCO/collection.tsv" --out "$mntp" --resume

# 2. The cell itself.
[ -e "$run/summary.json" ] || $torchrun train.py --model "$mntp" --head "$head" --objective "$objective" $settings --resume \
  --train "$MARCO/train.$objective.jsonl" --corpus "$MARCO/collection.tsv" --queries "$MARCO/queries.train.tsv" --out "$run"

# 3. Its row of the table: MRR@10 on dev, nDCG@10 on TREC DL 2019 and 2020, and the mean over 13 BEIR sets.
$torchrun -m tools.beir --model "$run" --msmarco "$MARCO" --data "$BEIR"
