#!/usr/bin/env bash
# All that needs a GPU, in one call of at most LIMIT seconds that needs no network:
#
#   [PYTHON=python3] [OUT=gpu_output] [LIMIT=590] tools/gpu.sh [--dry-run] [--beside CLONE]
#
# PYTHON has a CUDA build of torch, setuptools, pybind11, ninja, pytest and rich, as .venv-cuda of `make cuda-build` has.
# The training step and the tests of models need transformers and lightning too. What is left out without them has a
# line in the summary. The extension is built for this GPU alone, in a copy of the clone.
# Speed is measured before anything is tested, so that a call that is cut short leaves figures. Every step has a time
# limit, a log ($OUT/STEP.log) and a line in $OUT/summary.txt; the last steps get what is left of LIMIT. Ends with 1
# where a step failed.
#
# --beside CLONE  builds that clone too, and measures its kernels before and after this one's
# --dry-run       runs speed, linear, llama and tests on the CPU, at tiny sizes, with the extension that the clone holds.
#                 The build only runs `lit-did doctor`; streams, memcheck and racecheck are left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=$(realpath -s "$(command -v "${PYTHON:-python3}")") || exit 2
DEVICE=cuda BESIDE="" FAILED=0
TOTAL=${LIMIT:-590}
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DEVICE=cpu ;;
    --beside) BESIDE=$(realpath "${2:?"--beside needs a folder"}") && shift ;;
    *) sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done
OUT=${OUT:-gpu_output}
mkdir -p "$OUT" && OUT=$(realpath "$OUT") || exit 2
: > "$OUT/summary.txt"
RUN=$(mktemp -d) && trap 'rm -rf "$RUN"' EXIT
export PATH=$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1 LIT_DID_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}

if ! "$PYTHON" -c 'from importlib.util import find_spec; exit(find_spec("torch") is None)'; then
  echo "tools/gpu.sh: $PYTHON has no torch. Pass PYTHON=.venv/bin/python after \`make install\`, or on a machine with a" \
    "GPU PYTHON=.venv-cuda/bin/python after \`make cuda-build\`." >&2
  exit 2
fi

step() { # name, limit in seconds, command
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  [ $DEVICE = cpu ] && limit=$((20 * limit)) # it may be busy
  [ $((TOTAL - SECONDS)) -lt "$limit" ] && limit=$((TOTAL - SECONDS))
  if [ "$limit" -lt 5 ]; then
    code=124 && echo "no time left" > "$OUT/$name.log"
  else
    timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || code=$?
  fi
  [ $code = 0 ] || FAILED=1
  printf '%-14s exit %3d %4d s | %s\n' "$name" $code $((SECONDS - begin)) "$(tail -1 "$OUT/$name.log" | cut -c1-120)" |
    tee -a "$OUT/summary.txt"
  return $code
}

skip() { # name, what is not installed
  printf '%-14s skipped: %s is not installed\n' "$1" "$2" | tee -a "$OUT/summary.txt"
}

build() { # clone, folder to copy it to; the benchmarks and tests are this clone's
  mkdir "$2" && cp -r "$1"/{csrc,lit_did,setup.py,pyproject.toml,README.md} benchmarks tests "$2" && cd "$2" || return
  if [ $DEVICE = cuda ]; then
    rm -rf lit_did/_C*.so lit_did/lib
    "$PYTHON" setup.py build_ext --inplace || return
  fi
  "$PYTHON" -m lit_did.doctor
}
export -f build
export DEVICE PYTHON

if [ $DEVICE = cuda ]; then
  capability='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
  if ! TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c "$capability" 2> "$OUT/build.log"); then
    echo "tools/gpu.sh: torch of $PYTHON finds no CUDA device ($(tail -1 "$OUT/build.log")). Without a GPU, pass" \
      "--dry-run. With one, PYTHON needs a CUDA build of torch: \`make cuda-build\` makes .venv-cuda/bin/python." >&2
    exit 2
  fi
  export TORCH_CUDA_ARCH_LIST
  SPEED=() LINEAR=() LLAMA=()
else
  SPEED=(--vocabulary 129 --gib 1e-5 --repeats 1) LLAMA=(--size tiny --pairs 1 --length 16 --steps 1)
  LINEAR=(--cases 32x512xfloat32 --tokens 64 --repeats 1 --contestants lit_did "liger's way")
fi
if [ -n "$BESIDE" ]; then
  (build "$BESIDE" "$RUN/beside") > "$OUT/build_beside.log" 2>&1 &
fi
step build 240 bash -c 'build "$@"' build . "$RUN/clone" || { tail -40 "$OUT/build.log"; exit 1; }
wait
cd "$RUN/clone" || exit 2

speed() { # name, folder
  step "$1" 90 env -C "$2" "$PYTHON" -m benchmarks.bandwidth --device $DEVICE "${SPEED[@]}" --output "$OUT/$1"
}
[ -n "$BESIDE" ] && speed beside "$RUN/beside"
speed speed "$RUN/clone"
if [ -n "$BESIDE" ]; then
  speed speed_again "$RUN/clone"
  speed beside_again "$RUN/beside"
fi
step linear 90 "$PYTHON" -m benchmarks.linear --device $DEVICE "${LINEAR[@]}" --output "$OUT"
MISSING=$("$PYTHON" -c 'from importlib.util import find_spec
print(*(name for name in ("lightning", "transformers") if find_spec(name) is None), sep=" or ")')
if [ -z "$MISSING" ]; then
  step llama 120 "$PYTHON" -m benchmarks.llama_step --device $DEVICE "${LLAMA[@]}" --output "$OUT"
else
  skip llama "$MISSING"
fi

# Tests that need a GPU are in a file test_cuda*.py of the folder of what they test.
TESTS=("$PYTHON" -m pytest -q -p no:cacheprovider)
ON_GPU=(tests/*/test_cuda*.py)
if [ -n "$MISSING" ]; then
  skip "tests/models" "$MISSING"
  ON_GPU=(tests/ops/test_cuda*.py)
fi
if [ $DEVICE = cuda ]; then
  PARALLEL=()
  "$PYTHON" -c 'import xdist' 2> /dev/null && PARALLEL=(-n 4)
  OMP_NUM_THREADS=2 step tests 180 "${TESTS[@]}" "${ON_GPU[@]}" "${PARALLEL[@]}" -k "not stream_of_the_caller"
  # Alone: it is judged by when the device is idle.
  step streams 40 "${TESTS[@]}" tests/ops/test_cuda.py -k "stream_of_the_caller"
  # Small cases: the sanitizer runs kernels a hundred times slower. Without torch's cache every tensor is an allocation
  # of its own, whose end the sanitizer sees.
  for tool in memcheck racecheck; do
    command -v compute-sanitizer > /dev/null || { skip $tool compute-sanitizer; continue; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step $tool 80 compute-sanitizer --tool $tool --error-exitcode 9 \
      "${TESTS[@]}" tests/ops/test_cuda.py \
      -k "test_backward_in_place or test_two_dtypes_of or (test_linear_statistics and bf16-all)"
  done
else
  step tests 60 "${TESTS[@]}" "${ON_GPU[@]}" tests/ops/test_sequence_reduction.py -k test_packed_values
fi
cat "$OUT/summary.txt"
exit $FAILED
