#!/bin/sh
# A gate for pipelines: is TUNED, as an adapter merged into BASE, as fast as BASE? Ends with 0, or with the exit code of
# the first command that says no (3), cannot tell (4) or fails (1, 2). See docs/gate.md.
#
#     examples/gate.sh BASE TUNED OUT        # OUT is a new folder; what was made and measured stays there
#
# Settings, with what they are otherwise:
#     RANK=8  MARGIN=0.01  TIME=180 (seconds for each shape, at most)  SHAPES="1x128"  PROVIDER=cpu
set -eu
if [ $# -ne 3 ]; then
    echo "usage: $0 BASE TUNED OUT" >&2
    exit 2
fi
base=$1 tuned=$2 out=$3

surgery extract --rank "${RANK:-8}" "$base" "$tuned" -o "$out/adapter"
surgery merge "$base" "$out/adapter" -o "$out/merged"
surgery verify "$out/merged" --base "$base" --adapter "$out/adapter"
surgery export-onnx "$base" -o "$out/base-onnx/model.onnx"
surgery export-onnx "$out/merged" -o "$out/merged-onnx/model.onnx"
surgery prove "$out/base-onnx/model.onnx" "$out/merged-onnx/model.onnx" --provider "${PROVIDER:-cpu}"

shapes=
for shape in ${SHAPES:-1x128}; do
    shapes="$shapes --shape $shape"
done
# shellcheck disable=SC2086 # one word for each option
surgery bench "$out/base-onnx/model.onnx" "$out/merged-onnx/model.onnx" $shapes --provider "${PROVIDER:-cpu}" \
    --margin "${MARGIN:-0.01}" --seconds "${TIME:-180}" --expect equivalent --record "$out/bench.json"
