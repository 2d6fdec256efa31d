#!/usr/bin/env bash
# From text to numbers in five minutes on two CPU cores, nothing downloaded: the command lines of the README, one after the other.
#
#   recipes/demo.sh                        real text: the docstrings of the installed packages
#   SOURCE=synthetic recipes/demo.sh       a generated world with an oracle teacher
#   recipes/demo.sh --tiny                 everything in miniature, to see that it runs (the numbers mean nothing)
#   MNTP=150 recipes/demo.sh               so many steps of masked next-token prediction first, to see what they cost here
#
# OUT (here) is where data/, runs/ and indexes/ go, SEED (0) changes the data and the training (give it an OUT of its own). A stage whose output stands is skipped, so run
# it again after an interruption, or delete one output and see it made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
SOURCE=${SOURCE:-pydocs} SEED=${SEED:-0} OUT=${OUT:-.} PYTHON=${PYTHON:-python3} MNTP=${MNTP:-0}
python() { "$PYTHON" -W ignore "$@"; }
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# What differs between the two sources was chosen on their dev queries.
case $SOURCE in
  pydocs)    name=demo left=240 mined=6000 data=(--hidden 128)
             sparse=(--max_steps 220 --lr 2e-3 --flops_q 0.25 --flops_d 0.2) sparse_kd=(--max_steps 60 --lr 5e-4 --flops_q 0.25 --flops_d 0.2)
             dense=(--max_steps 220 --lr 2e-3)                               dense_kd=(--max_steps 60 --lr 5e-4) ;;
  synthetic) name=synthetic left=200 mined=0 data=(--hidden 64)
             sparse=(--max_steps 400 --lr 3e-3 --flops_q 0.1 --flops_d 0.08) sparse_kd=(--max_steps 100 --lr 1e-3 --flops_q 0.1 --flops_d 0.08)
             dense=(--max_steps 900 --lr 3e-3)                               dense_kd=(--max_steps 100 --lr 1e-3) ;;
  *) echo "SOURCE=$SOURCE: expected pydocs or synthetic" >&2; exit 2 ;;
esac
case ${1:-} in
  "") ;;
  --tiny)
    name=tiny-$SOURCE left=60 mined=$((mined ? 200 : 0))
    data=(--dev_queries 40 --test_queries 60 --vocab 1024 --hidden 64 --packages numpy --documents 400 --train_queries 600)
    sparse+=(--max_steps 6) sparse_kd+=(--max_steps 6) dense+=(--max_steps 6) dense_kd+=(--max_steps 6) ;;
  *) echo "unknown argument $1: --tiny or nothing" >&2; exit 2 ;;
esac
D=$OUT/data/$name model=$OUT/data/$name/model
if [ "$MNTP" -gt 0 ]; then name=$name-mntp model=$OUT/runs/$name/mntp; fi
R=$OUT/runs/$name I=$OUT/indexes/$name
mkdir -p "$OUT/data" "$R" "$I"

# stage SECONDS OUTPUT WHAT COMMAND...: run the command unless its output stands. SECONDS is what it took on two cores.
stage() {
  local seconds=$1 output=$2 what=$3 log=$R/log.txt
  shift 3
  left=$((left - seconds))
  if [ -e "$output" ]; then echo "-- have $output"; return; fi
  printf -- '-- %s (%dm%02ds gone, about %dm%02ds to go)\n' "$what" $((SECONDS / 60)) $((SECONDS % 60)) $(((left + seconds) / 60)) $(((left + seconds) % 60))
  # Progress bars go to the log; what a command prints is for the reader.
  "$@" 2>> "$log" || { tail -n 20 "$log" >&2; echo "stopped at: $what; all of it is in $log" >&2; exit 1; }
}
train() { # NAME MODEL HEAD OBJECTIVE ROWS NEGATIVES FLAGS...
  local out=$R/$1 from=$2 head=$3 objective=$4 rows=$5 negatives=$6
  shift 6
  # --lora_rank 0: a random model has nothing to adapt. In-batch passages only (--negatives 0) is enough while the model knows little.
  python train.py --model "$from" --lora_rank 0 --head "$head" --objective "$objective" --train "$rows" --negatives "$negatives" --corpus "$D" \
    --query_length 32 --passage_length 64 --tokens_per_chunk 2048 --workers 1 --seed "$SEED" --log_every 20 --save_every 100 --out "$out" --resume "$@"
}
search() { # NAME SPLIT: the run of an index over a split's queries
  python index.py search --index "$I/$1" --queries "$D/queries.$2.jsonl" --k 100 --out "$R/$1.$2.trec"
}

stage 25 "$D" "data: $SOURCE, a tokenizer, a random Llama that starts as a lexical matcher" \
  python data.py demo --source "$SOURCE" --seed "$SEED" --out "$D" "${data[@]}"
stage 8 "$I/bm25" "BM25: the baseline, with stemming and Lucene's own k1 and b" \
  python index.py bm25 --corpus "$D" --stemming --k1 1.2 --b 0.75 --out "$I/bm25"
# With real Llama weights MNTP comes first: they are strong and causal, and it teaches them to look right. Random weights have nothing to keep,
# and what MNTP learns in minutes is which words are frequent, which buries the lexical start: hence an option, not a stage.
if [ "$MNTP" -gt 0 ]; then
  stage 60 "$model/summary.json" "MNTP: $MNTP steps of predicting hidden words" \
    python train.py --model "$D/model" --lora_rank 0 --objective mntp --corpus "$D" --block_length 128 --queries_per_step 32 --max_steps "$MNTP" --lr 1e-3 \
      --tokens_per_chunk 2048 --workers 1 --seed "$SEED" --log_every 20 --save_every 100 --out "$model" --resume
fi
stage 75 "$R/sparse-cl/summary.json" "sparse, CL: learn which words speak for a passage" \
  train sparse-cl "$model" sparse cl "$D/train.jsonl" 0 "${sparse[@]}"
stage 45 "$R/dense-cl/summary.json" "dense, CL: the same texts, the other head" \
  train dense-cl "$model" dense cl "$D/train.jsonl" 0 "${dense[@]}"

# CL+KD needs hard negatives and a teacher. The synthetic world has an oracle. On real text the sum of BM25 and the model ranks better than
# either, so it has something to teach both: it searches some training queries, and what it ranks high without being right is a hard negative.
rows=$D/train.jsonl
if [ "$mined" -gt 0 ]; then
  rows=$R/mined.jsonl
  stage 20 "$I/sparse-cl" "index of the sparse CL model" python index.py build --model "$R/sparse-cl" --corpus "$D" --out "$I/sparse-cl"
  if [ ! -e "$rows" ]; then head -n "$mined" "$D/queries.train.jsonl" > "$D/queries.mined.jsonl"; fi
  stage 6 "$R/bm25.mined.trec" "search $mined training queries by BM25" search bm25 mined
  stage 8 "$R/sparse-cl.mined.trec" "search them by the sparse model" search sparse-cl mined
  stage 5 "$R/teacher.trec" "teacher: the sum of both" \
    python data.py fuse --runs "$R/bm25.mined.trec" "$R/sparse-cl.mined.trec" --scale 10 --k 100 --out "$R/teacher.trec"
  stage 5 "$rows" "hard negatives with the teacher's scores" \
    python data.py mine --run "$R/teacher.trec" --qrels "$D/qrels/train.tsv" --queries "$D/queries.train.jsonl" --negatives 16 --depth 50 --scores --out "$rows"
fi
stage 25 "$R/sparse/summary.json" "sparse, CL+KD: go on with hard negatives and the teacher" \
  train sparse "$R/sparse-cl" sparse cl+kd "$rows" 3 "${sparse_kd[@]}"
stage 20 "$R/dense/summary.json" "dense, CL+KD" \
  train dense "$R/dense-cl" dense cl+kd "$rows" 3 "${dense_kd[@]}"

for head in sparse dense; do
  stage 15 "$I/$head" "index of the $head model" python index.py build --model "$R/$head" --corpus "$D" --out "$I/$head"
done
for index in bm25 dense sparse; do
  stage 5 "$R/$index.test.trec" "search the test queries: $index" search $index test
done
stage 4 "$R/sum.test.trec" "sum of BM25 and sparse" python data.py fuse --runs "$R/bm25.test.trec" "$R/sparse.test.trec" --k 100 --out "$R/sum.test.trec"

printf -- '-- results (%dm%02ds)\n' $((SECONDS / 60)) $((SECONDS % 60))
python evaluate.py --qrels "$D/qrels/test.tsv" --run "$R"/{bm25,dense,sparse,sum}.test.trec --names BM25 dense sparse BM25+sparse \
  --metrics mrr@10 ndcg@10 recall@100 --costs --groups "$D/test.groups.json"
query=$(sed -n '1s/.*"text": "\(.*\)"}$/\1/p' "$D/queries.test.jsonl")
echo "-- why sparse ranked the first passage first for a test query"
python index.py explain --index "$I/sparse" --query "$query"
