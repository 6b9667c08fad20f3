#!/usr/bin/env bash
# Everything that waits for a GPU, in one go and within nine minutes: facts, correctness, flagship benchmarks, a
# training run, tuning, the other benchmarks. See docs/gpu_validation.md.
#
#   OUT=/path/to/folder benchmarks/run_gpu.sh [op ...]      (default OUT: runs/gpu-<date>; default ops: all)
#
# Each step writes as it goes, so that one that is ended keeps what it has; a step that fails is written down and the
# next one runs. The exit code is the number of failed steps (at most 99). LIMIT seconds in all (default 540),
# STEP_LIMIT per step (default 150); PYTHON names the interpreter; INSTALL=1 sets up .venv with the CUDA build of
# PyTorch first, which counts in no limit.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-runs/gpu-$(date -u +%Y%m%d-%H%M%S)}
LIMIT=${LIMIT:-540}
STEP_LIMIT=${STEP_LIMIT:-150}
mkdir -p "$OUT/logs"
SUMMARY="$OUT/summary.txt"
: > "$SUMMARY"
FAILED=0
# The kernels must run on the device, never under the interpreter.
unset TRITON_INTERPRET

if [ "${INSTALL:-0}" = 1 ]; then
  make .venv/.tools > "$OUT/logs/install.log" 2>&1 || { echo "installation failed: $OUT/logs/install.log"; exit 99; }
  PYTHON=.venv/bin/python
fi
PYTHON=${PYTHON:-python3}

if [ "$#" -gt 0 ]; then
  OPS=("$@")
else
  mapfile -t OPS < <(cd astrobiogen/kernels && for d in */; do [ -f "$d/triton_kernels.py" ] && echo "${d%/}"; done)
fi

# What of an op's benchmarks comes first: pytest's -k.
declare -A FLAGSHIP=(
  [rms_norm]="2048x4352 and bfloat16" [swiglu]="2048x11648 and bfloat16" [rope]="2048x64x68r68 and halves and bfloat16"
  [attention]="2048x2048x64x8x68 and bfloat16" [linear_cross_entropy]="2048x4352x32000 and bfloat16"
  [conv_nd]="wide and bfloat16" [edge_attention]="bfloat16"
)
# Functions of an op's package that the battery knows beside the one with its name.
declare -A BESIDE=([rms_norm]="add_rms_norm" [conv_nd]="conv_transpose_nd conv_nd_norm")

BEGIN=$SECONDS
UNTIL=$LIMIT
share() { UNTIL=$((LIMIT * $1 / 100)); }   # the steps that follow end at this percentage of LIMIT

step() {
  local name=$1; shift
  local log="$OUT/logs/$name.log" begin=$SECONDS code=0 left=$((UNTIL - (SECONDS - BEGIN)))
  if [ "$left" -lt 1 ]; then
    printf 'skipped     -    %s (no time left)\n' "$name" >> "$SUMMARY"
    return
  fi
  [ "$left" -gt "$STEP_LIMIT" ] && left=$STEP_LIMIT
  printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$name"
  timeout --kill-after=5 "$left" "$@" > "$log" 2>&1 || code=$?
  if [ "$code" -eq 0 ]; then
    printf 'ok      %5ds  %s\n' "$((SECONDS - begin))" "$name" >> "$SUMMARY"
  else
    FAILED=$((FAILED + 1))
    printf 'FAILED  %5ds  %s (exit %d, %s)\n' "$((SECONDS - begin))" "$name" "$code" "$log" >> "$SUMMARY"
    tail -n 5 "$log" | sed 's/^/    /'
  fi
}

# 0. What this machine is. Without a GPU the rest would only repeat the CPU tests.
step facts-driver nvidia-smi -q
step facts-library "$PYTHON" -m astrobiogen.doctor --json
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "PyTorch finds no CUDA device: see $OUT/logs/facts-library.log" | tee -a "$SUMMARY"
  exit 99
fi

# 1. Correctness on the card: every case that the emulator runs, pipelined loops in their steady state among them.
share 40
for op in "${OPS[@]}"; do
  # shellcheck disable=SC2086
  step "correctness-$op" "$PYTHON" -m astrobiogen.testing.ptx.run --card "$op" ${BESIDE[$op]:-}
done
step correctness-properties "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_attention_properties.py \
  tests/kernels/test_conv_nd_properties.py tests/kernels/test_large_tensors.py

# 2. The flagship benchmark of every op, one process per op, so that one op's fault costs no other op's figures.
share 75
for op in "${OPS[@]}"; do
  step "flagship-$op" "$PYTHON" -m pytest -q -p no:cacheprovider "benchmarks/bench_$op.py" --device cuda --save \
    --results "$OUT/results" -k "${FLAGSHIP[$op]:-bfloat16}"
done

# 3. Training on the bundled data.
share 85
step training "$PYTHON" -m astrobiogen.train --smoke --output "$OUT/training"

# 4. Tuning: one named constant at a time, each in a process and a result folder of its own.
share 100
SWEEP=(
  "rms_norm BACKWARD_PROGRAMS_PER_SM 1 4"
  "rms_norm ELEMENTS_PER_PROGRAM 1024 4096"
)
# An op's own list: lines "NAME VALUE ..." in kernels/<op>/tuning.txt.
for op in "${OPS[@]}"; do
  if [ -f "astrobiogen/kernels/$op/tuning.txt" ]; then
    while read -r line; do
      [ -n "$line" ] && [ "${line:0:1}" != "#" ] && SWEEP+=("$op $line")
    done < "astrobiogen/kernels/$op/tuning.txt"
  fi
done
for entry in "${SWEEP[@]}"; do
  read -r op name values <<< "$entry"
  [[ " ${OPS[*]} " == *" $op "* ]] || continue
  for value in $values; do
    step "tuning-$op-$name-$value" "$PYTHON" -m pytest -q -p no:cacheprovider "benchmarks/bench_$op.py" --device cuda \
      --save --set "$op.$name=$value" --results "$OUT/tuning/$name=$value" -k "${FLAGSHIP[$op]:-bfloat16}"
  done
done

# 5. What is left of the benchmarks.
for op in "${OPS[@]}"; do
  step "benchmark-$op" "$PYTHON" -m pytest -q -p no:cacheprovider "benchmarks/bench_$op.py" --device cuda --save \
    --results "$OUT/results"
done

printf '\n%s\n' "results: $OUT   (copy $OUT/results/* to benchmarks/results/ and tick docs/gpu_validation.md)"
cat "$SUMMARY"
exit $((FAILED > 99 ? 99 : FAILED))
