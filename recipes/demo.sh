#!/usr/bin/env bash
# From text to numbers in four minutes on two CPU cores, nothing downloaded: README's command lines, in order.
#
#   recipes/demo.sh                     real text: the docstrings of the installed packages
#   SOURCE=synthetic recipes/demo.sh    a generated world with an oracle teacher
#   recipes/demo.sh --tiny              everything in miniature, to see that it runs; the numbers mean nothing
#   MNTP=100 recipes/demo.sh            so many steps of masked next-token prediction first
#
# data/, runs/ and indexes/ go to OUT (here). Another SEED (0) or MNTP needs an OUT of its own.
# A stage whose output stands is skipped: after Ctrl-C the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
SOURCE=${SOURCE:-pydocs} SEED=${SEED:-0} OUT=${OUT:-.} PYTHON=${PYTHON:-python3} MNTP=${MNTP:-0}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# What differs between the two sources. The settings were chosen on their dev queries, the steps by the clock.
# `clock`: when each stage began on two idle cores of an AMD EPYC (Zen 3), in seconds.
case $SOURCE in
  pydocs)
    name=demo mined=2000 searched=corpus.small.jsonl negatives=4 data=(--hidden 128)
    sparse=(--max_steps 130 --lr 1e-3 --flops_q 0.25 --flops_d 0.2)
    dense=(--max_steps 180 --lr 1e-3)
    sparse_kd=(--max_steps 30 --lr 3e-4 --flops_q 0.25 --flops_d 0.2)
    dense_kd=(--max_steps 40 --lr 3e-4)
    clock="data:0 mntp:25 sparse-cl:25 bm25:25 bm25.mined:27 dense-cl:30 index.sparse-cl:115
      sparse-cl.mined:128 teacher:138 rows:139 sparse:139 dense:139 index.dense:176 index.sparse:182
      bm25.test:201 dense.test:203 sparse.test:209 sum.test:215 results:216"
    groups="far, middle, near: a test pair shares under 25%, 25 to 35%, or more of its words with the nearest
training pair" ;;
  synthetic)
    name=synthetic mined=0 searched=corpus.jsonl negatives=8 data=(--hidden 64 --layers 1)
    sparse=(--max_steps 600 --lr 3e-3 --flops_q 0.05 --flops_d 0.04)
    dense=(--max_steps 1300 --lr 3e-3 --temperature 0.05)
    sparse_kd=(--max_steps 120 --lr 1e-3 --flops_q 0.05 --flops_d 0.04)
    dense_kd=(--max_steps 450 --lr 2e-3 --temperature 0.05)
    clock="data:0 mntp:13 sparse-cl:13 bm25:13 dense-cl:15 sparse:120 dense:120 index.dense:190
      index.sparse:190 bm25.test:200 dense.test:203 sparse.test:207 sum.test:212 results:213"
    groups="unseen, seen: whether some training query asks for the document that a test query asks for" ;;
  *) echo "SOURCE=$SOURCE: expected pydocs or synthetic" >&2; exit 2 ;;
esac
case $MNTP in *[!0-9]*) echo "MNTP=$MNTP: expected a number of steps" >&2; exit 2 ;; esac
case ${1:-} in
  "") ;;
  --tiny)
    name=tiny-$SOURCE mined=$((mined ? 200 : 0)) clock=
    data+=(--dev_queries 40 --test_queries 60 --small 600 --vocab 1024 --hidden 64)
    data+=(--packages numpy --documents 400 --train_queries 600)
    sparse+=(--max_steps 6) dense+=(--max_steps 6) sparse_kd+=(--max_steps 6) dense_kd+=(--max_steps 6) ;;
  *) echo "unknown argument $1: --tiny or nothing" >&2; exit 2 ;;
esac
D=$OUT/data/$name model=$OUT/data/$name/model
if [ "$MNTP" -gt 0 ]; then name=$name-mntp model=$OUT/runs/$name/mntp; fi
R=$OUT/runs/$name I=$OUT/indexes/$name rows=$D/train.jsonl
mkdir -p "$OUT/data" "$R/log" "$I"

start_over="rm -r $D $R $I"
[ "$OUT" != . ] || start_over="make clean"
. recipes/stages.sh
settings "SEED=$SEED MNTP=$MNTP"

# The commands.
train() { # NAME FROM HEAD OBJECTIVE ROWS NEGATIVES FLAGS...
  local out=$R/$1 from=$2 head=$3 objective=$4 rows=$5 negatives=$6
  shift 6
  # --lora_rank 0: all weights, since a random model has nothing to adapt.
  python train.py --model "$from" --lora_rank 0 --head "$head" --objective "$objective" \
    --train "$rows" --negatives "$negatives" --corpus "$D" --query_length 32 --passage_length 64 \
    --tokens_per_chunk 1024 --workers 1 --seed "$SEED" --log_every 20 --save_every 100 \
    --out "$out" --resume "$@"
}
build() { # NAME: index of a model
  python index.py build --model "$R/$1" --corpus "$D/$searched" --out "$I/$1" --tokens_per_batch 2048
}
search() { # NAME SPLIT: an index's run over a split's queries
  python index.py search --index "$I/$1" --queries "$D/queries.$2.jsonl" --k 100 --out "$R/$1.$2.trec"
}
search_bm25() { # SPLIT
  python -m tools.bm25 search --index "$I/bm25" --queries "$D/queries.$1.jsonl" --k 100 \
    --out "$R/bm25.$1.trec"
}

stage data "$D" "data: $SOURCE, a tokenizer, a random Llama that starts as a lexical matcher" \
  python -m tools.demo_data --source "$SOURCE" --seed "$SEED" --out "$D" "${data[@]}"
# With real Llama weights MNTP comes first: they are strong and causal, and it teaches them to look right.
# Random weights have nothing to keep, and the first thing that MNTP teaches them is which words are frequent.
# That buries the lexical start: hence an option, not a stage.
if [ "$MNTP" -gt 0 ]; then
  stage mntp "$model/summary.json" "MNTP: $MNTP steps of predicting hidden words" \
    python train.py --model "$D/model" --lora_rank 0 --objective mntp --corpus "$D" --block_length 128 \
      --queries_per_step 32 --max_steps "$MNTP" --lr 1e-3 --tokens_per_chunk 2048 --workers 1 --seed "$SEED" \
      --log_every 20 --save_every 100 --out "$model" --resume
  began_at=  # these steps are not on the clock
fi

# First CL. A query's negatives are the other passages of its batch, enough while the model knows little.
# Distilling into a random model fails: it must rank before a teacher can correct its ranking.
if [ "$mined" -gt 0 ] && [ ! -e "$D/queries.mined.jsonl" ]; then
  head -n "$mined" "$D/queries.train.jsonl" > "$D/queries.mined.jsonl"
fi
sparse_cl() {
  stage sparse-cl "$R/sparse-cl/summary.json" "sparse, CL: learn which words speak for a passage" \
    train sparse-cl "$model" sparse cl "$rows" 0 --queries_per_step 128 "${sparse[@]}"
}
dense_cl() {
  stage bm25 "$I/bm25" "BM25, the baseline: stemming, Lucene's own k1 and b" \
    python -m tools.bm25 build --corpus "$D/$searched" --stemming --k1 1.2 --b 0.75 --out "$I/bm25"
  if [ "$mined" -gt 0 ]; then
    stage bm25.mined "$R/bm25.mined.trec" "search $mined training queries by BM25" search_bm25 mined
  fi
  stage dense-cl "$R/dense-cl/summary.json" "dense, CL: the same texts, the other head" \
    train dense-cl "$model" dense cl "$rows" 0 --queries_per_step 128 "${dense[@]}"
}
side_by_side sparse_cl dense_cl

# Then CL+KD with hard negatives and a teacher. The synthetic world has an oracle. On real text the sum of
# BM25 and the model ranks better than either, so it has something to teach both; what it ranks high without
# being right is a hard negative.
if [ "$mined" -gt 0 ]; then
  rows=$R/mined.jsonl
  stage index.sparse-cl "$I/sparse-cl" "index of the sparse CL model" build sparse-cl
  stage sparse-cl.mined "$R/sparse-cl.mined.trec" "search $mined training queries with it" \
    search sparse-cl mined
  stage teacher "$R/teacher.trec" "teacher: the sum of BM25 and sparse" \
    python -m tools.fuse --runs "$R/bm25.mined.trec" "$R/sparse-cl.mined.trec" --scale 10 --k 100 \
      --out "$R/teacher.trec"
  stage rows "$rows" "hard negatives with the teacher's scores" \
    python -m tools.mine --run "$R/teacher.trec" --qrels "$D/qrels/train.tsv" \
      --queries "$D/queries.train.jsonl" --negatives 16 --depth 50 --scores --out "$rows"
fi
sparse_kd() {
  stage sparse "$R/sparse/summary.json" "sparse, CL+KD" \
    train sparse "$R/sparse-cl" sparse cl+kd "$rows" "$negatives" --queries_per_step 64 "${sparse_kd[@]}"
  stage index.sparse "$I/sparse" "index of the sparse model" build sparse
}
dense_kd() {
  stage dense "$R/dense/summary.json" "dense, CL+KD" \
    train dense "$R/dense-cl" dense cl+kd "$rows" "$negatives" --queries_per_step 64 "${dense_kd[@]}"
  stage index.dense "$I/dense" "index of the dense model" build dense
}
side_by_side sparse_kd dense_kd

# One after the other again, since their time is measured.
stage bm25.test "$R/bm25.test.trec" "search the test queries: bm25" search_bm25 test
for index in dense sparse; do
  stage $index.test "$R/$index.test.trec" "search the test queries: $index" search $index test
done
stage sum.test "$R/sum.test.trec" "sum of BM25 and sparse" \
  python -m tools.fuse --runs "$R/bm25.test.trec" "$R/sparse.test.trec" --k 100 --out "$R/sum.test.trec"

printf -- '-- results after %s\n' "$(minutes $SECONDS)"
"$PYTHON" -W ignore -m tools.compare --qrels "$D/qrels/test.tsv" --groups "$D/test.groups.json" --costs \
  --run "$R"/{bm25,dense,sparse,sum}.test.trec --names BM25 dense sparse BM25+sparse \
  --metrics mrr@10 ndcg@10 recall@100
echo "$groups"
query=$(sed -n '1s/.*"text": "\(.*\)"}$/\1/p' "$D/queries.test.jsonl")
echo "-- a test query's best passages by sparse, and the terms that made the first one match"
"$PYTHON" -W ignore -m tools.explain --index "$I/sparse" --query "$query" 2>> "$R/log/explain.txt"

cat << END

-- now with your own words: a query over these passages, and what the model makes of a text
$PYTHON -m tools.explain --index $I/sparse --query "sort a list by a key"
$PYTHON -c '
from model import Retriever
r = Retriever.load("$R/sparse")
print(r.top_terms(r.encode(["read a file line by line"], "passage")[0], 10))'
END
