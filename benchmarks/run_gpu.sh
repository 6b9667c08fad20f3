#!/usr/bin/env bash
# Everything that waits for a GPU, in one go: facts, correctness, benchmarks, tuning. See docs/gpu_validation.md.
#
#   OUT=/path/to/folder benchmarks/run_gpu.sh [op ...]      (default OUT: runs/gpu-<date>; default ops: all)
#
# A step that fails is written down and the next one runs; the exit code is the number of failed steps (at most 99).
# STEP_LIMIT seconds per step (default 1500); PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu-$(date -u +%Y%m%d-%H%M%S)}
STEP_LIMIT=${STEP_LIMIT:-1500}
mkdir -p "$OUT/logs"
SUMMARY="$OUT/summary.txt"
: > "$SUMMARY"
FAILED=0
# The kernels must run on the device, never under the interpreter.
unset TRITON_INTERPRET

if [ "$#" -gt 0 ]; then
  OPS=("$@")
else
  mapfile -t OPS < <(cd astrobiogen/kernels && for d in */; do [ -f "$d/triton_kernels.py" ] && echo "${d%/}"; done)
fi

step() {
  local name=$1; shift
  local log="$OUT/logs/$name.log" begin=$SECONDS code=0
  printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$name"
  timeout "$STEP_LIMIT" "$@" > "$log" 2>&1 || code=$?
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

# 1. Correctness of every op on the GPU: the same battery as on the CPU, with the Triton kernels on the device.
step correctness-battery "$PYTHON" -m pytest -q tests/test_testing.py tests/test_registry.py
for op in "${OPS[@]}"; do
  step "correctness-$op" "$PYTHON" -m pytest -q "tests/kernels/test_$op.py" --junitxml "$OUT/correctness-$op.xml"
done

# 2. Benchmarks, one process per op, so that one op's fault costs no other op's figures.
for op in "${OPS[@]}"; do
  step "benchmark-$op" "$PYTHON" -m pytest -q "benchmarks/bench_$op.py" --device cuda --save --results "$OUT/results"
done

# 3. Tuning: one named constant at a time, each in a process and a result folder of its own.
SWEEP=(
  "rms_norm BACKWARD_PROGRAMS_PER_SM 1 2 4"
  "rms_norm ELEMENTS_PER_PROGRAM 1024 2048 4096"
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
    step "tuning-$op-$name-$value" "$PYTHON" -m pytest -q "benchmarks/bench_$op.py" --device cuda --save \
      --set "$op.$name=$value" --results "$OUT/tuning/$name=$value"
  done
done

printf '\n%s\n' "results: $OUT   (copy $OUT/results/* to benchmarks/results/ and tick docs/gpu_validation.md)"
cat "$SUMMARY"
exit $((FAILED > 99 ? 99 : FAILED))
