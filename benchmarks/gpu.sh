#!/usr/bin/env bash
# Everything that wants an accelerator, in at most ten minutes: writes benchmarks/gpu.csv, to be
# committed, with one row a part: what it did, exit status, seconds, last line. What is skipped has
# a row with the reason; the limits of the parts add up to ten minutes. `--dry FILE` runs the parts
# that a CPU can, at sizes so small that targets of speed and memory mean nothing: it shows that
# every part runs.
#
#     bash benchmarks/gpu.sh [--dry FILE]
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
OUT=benchmarks/gpu.csv DEVICE=cuda SMALL=""
if [ "${1:-}" = --dry ]; then
    OUT=${2:?--dry FILE: where the rows go} DEVICE=cpu SMALL=yes
elif ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmarks/gpu.sh: there is no CUDA device here; bash benchmarks/gpu.sh --dry FILE tries the script" >&2
    exit 2
fi
NAME=$(python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")')
COMMIT=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
echo "part,device,commit,status,seconds,last_line" >"$OUT"

row() { # part status seconds text
    printf '%s,"%s",%s,%s,%s,"%s"\n' "$1" "$NAME" "$COMMIT" "$2" "$3" "$(tr -d '\n' <<<"$4" | tr '"' "'")" >>"$OUT"
}
part() { # part seconds command...
    local name=$1 limit=$2 began=$SECONDS log status
    shift 2
    log=$(mktemp)
    timeout "$limit" "$@" >"$log" 2>&1
    status=$?
    [ $status = 124 ] && echo "timeout after $limit s" >>"$log"
    row "$name" $status $((SECONDS - began)) "$(grep -v '^ *$' "$log" | tail -n 1 | cut -c1-300)"
    rm -f "$log"
}
need() { # module part: says in the file that the part is skipped where the module is missing
    python -c "import $1" 2>/dev/null || { row "$2" skipped 0 "the package $1 is not installed"; return 1; }
}

part rmu-engines 50 python benchmarks/rmu.py --device $DEVICE ${SMALL:+--width 32 --rounds 1} --no-save
part vocabulary-losses 40 python benchmarks/vocab.py --device $DEVICE ${SMALL:+--vocab 512 --tokens 64 --width 16 --rounds 1} --no-save
part second-model 45 python benchmarks/posthoc.py --device $DEVICE ${SMALL:+--width 32 --blocks 2 --rounds 1} --no-save
if need bitsandbytes adamw-8bit; then
    part adamw-8bit 40 python -m pytest -q tests/unit/test_lean_steps.py -k 8_bit
fi
if [ "$DEVICE" = cpu ]; then
    row liger skipped 0 "its kernels want CUDA"
elif need liger_kernel liger; then
    part liger 40 python -m pytest -q tests/unit/test_vocab_liger.py
fi
part removal-and-audit 80 python -m excise run demo --device $DEVICE --out "$(mktemp -d)/out" --quiet ${SMALL:+--dry-run}
part parity-by-method 80 python benchmarks/parity.py --device $DEVICE ${SMALL:+--methods rmu npo sgtm}
part distillation-utilisation 40 python benchmarks/distil.py --device $DEVICE ${SMALL:+--dtype float32 --width 64 --blocks 2 --vocab 512 --rows 4 --tokens 64 --steps 6 --matrix 512} --no-save
part compiled-blocks 40 python benchmarks/compiled.py --device $DEVICE ${SMALL:+--width 32 --blocks 1 --pairs 2} --no-save
part relearning-grid 40 python benchmarks/relearn.py --device $DEVICE --rounds 1 --no-save
part routing-overhead 35 python benchmarks/routing.py --device $DEVICE ${SMALL:+--width 64 --pairs 3} --no-save
if python -c "from excise.fetch import require; require('smollm2-135m')" 2>/dev/null; then
    part smollm-cyber 70 python -m excise run smollm-cyber --device $DEVICE --out "$(mktemp -d)/out" --quiet ${SMALL:+--dry-run}
else
    row smollm-cyber skipped 0 "the model is not here; excise fetch smollm2-135m"
fi
cat "$OUT"
! cut -d, -f4- "$OUT" | grep -Eq '^[1-9]'
