#!/bin/sh
# What only a GPU can tell, in under nine minutes; without one the same at toy size, to show that nothing in it is broken.
#
#     sh tests/gpu.sh [OUT]         OUT/gpu.md, each table as soon as it is measured, and OUT/*.json  (out/gpu)
#
# Needs torch, transformers, safetensors and pytest, and no network. A step that fails or runs out of its time is said so,
# and the next one begins: first what must be right, then speed as it is without a compiler, then compiled, one architecture
# at a time, for as long as there is time. PYTHON names another interpreter, SECONDS_IN_ALL another end.

cd "$(dirname "$0")/.." || exit 2
out=${1:-out/gpu}
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
mkdir -p "$out" || exit 2
table=$out/gpu.md
failed=0
end=$(($(date +%s) + ${SECONDS_IN_ALL:-530}))
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$(cd "$out" && pwd)/compiled}" # what one step has compiled, the next finds

if nvidia-smi >/dev/null 2>&1; then
    shape="--size=0.5B --dtype=bfloat16" wide="--batch_size=16 --seq_len=1024" long="--batch_size=4 --seq_len=4096"
    decoding="--seq_len=512 --decode_steps=32" loss="16384 896 151936" run="--size=50M --seq_len=512" seconds=30
    only=cuda compiled="dense mod dtf stt"
else
    shape="--size=demo" wide="--batch_size=2 --seq_len=64" long="--batch_size=1 --seq_len=128"
    decoding="--seq_len=32 --decode_steps=4" loss="256 64 5000" run="--size=demo --seq_len=64" seconds=4
    only="flash or repeated or triton or idle_rows" compiled=""
fi

# step NAME SECONDS COMMAND…: runs the command for at most so long, its output into the table
step() {
    name=$1 limit=$2 left=$((end - $(date +%s)))
    shift 2
    if [ $left -lt 10 ]; then
        printf '\n## %s\n\nNot begun: its time was up.\n' "$name" >>"$table"
        failed=$((failed + 1))
        return
    fi
    [ "$limit" -le $left ] || limit=$left
    printf '\n## %s\n\n    %s\n\n```\n' "$name" "$*" >>"$table"
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    grep -v '^{' "$out/$name.txt" | tail -60 >>"$table"
    printf '```\n' >>"$table"
    if [ $status -ne 0 ]; then
        failed=$((failed + 1))
        echo "Exit status $status (124: it ran out of its $limit s)." >>"$table"
    fi
    echo "$name: exit status $status, $(date +%T)" >&2
}

# measure NAME SECONDS KEYS…: bench.py at this shape
measure() {
    name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" bench.py $shape --repeats=3 "$@" --output_path="$out/$name.json"
}

echo "# Measured by tests/gpu.sh, $(date +%F), revision $(git describe --always --dirty --exclude='*' 2>/dev/null)" >"$table"
step machine 30 "$python" -c "
import platform, subprocess, torch, transformers
print('torch', torch.__version__, 'transformers', transformers.__version__, platform.processor() or platform.machine())
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), 'CUDA', torch.version.cuda)
    print(subprocess.run(['nvidia-smi'], capture_output=True, text=True).stdout)
"
step tests 120 "$python" -m pytest -q -p no:xdist -o addopts= -k "$only" tests/test_model.py tests/test_kernels.py tests/test_routers.py
step loss 60 "$python" tests/measure_loss.py $loss
rm -rf "$out/data" "$out/run"
step data 30 "$python" -c "
import sys; sys.path.insert(0, 'tests')
from pathlib import Path
from helpers import toy_data
toy_data(Path('$out/data'))
"
run="train.py --data_dir=$out/data --out_dir=$out/run --architecture=dtf $run --max_steps=100000 --eval_interval=0 --log_interval=20"
step run 90 "$python" $run --compile=false --max_seconds=$seconds
step resume 90 "$python" $run --compile=false --resume=auto --max_seconds=$seconds
measure train 60 $wide --measure=train
measure train_long 60 $long --measure=train
measure decode 90 $decoding --batch_size=8 --measure=prefill,decode1,decode8,decode64
for architecture in $compiled; do
    measure "train_$architecture" 120 $wide --measure=train --compile --architecture=$architecture
    measure "decode_$architecture" 90 $decoding --batch_size=8 --measure=decode1,decode8 --compile --architecture=$architecture
done
echo "$table: $failed steps failed" >&2
exit $((failed > 0))
