#!/bin/bash
# What tools/board runs on the emulated board, as its root: /wheels, /models and /out are there.
set -euo pipefail

step() { echo "== $* (${SECONDS} s)"; }
export NUMBA_CACHE_DIR=/tmp/compiled PIP_NO_COMPILE=no # it means yes to pip; emulation is slow
cd /out

for tool in cc gcc c++ g++ clang make; do
  if command -v $tool; then
    echo "this board has a compiler" >&2
    exit 1
  fi
done

step "install, without a network"
sh /wheels/install.sh --into /opt/edgemerge
PATH=/opt/edgemerge/bin:$PATH

step "merge"
edgemerge merge -m task_arithmetic --base /models/base /models/expert-a /models/expert-b -P lambda=0.7 \
  --type Q4_K_M -o ward.gguf
if [ -e /tmp/compiled ]; then
  echo "the wheel's kernels were not used: $(ls /tmp/compiled/*)" >&2
  exit 1
fi

step "run"
edgemerge run ward.gguf -p "What is aspirin?" -n 8 --temperature 0

step "doctor"
edgemerge doctor --json >doctor.json
python3 -c 'import json; print(json.load(open("doctor.json"))["llama"]["features"])'

step "serve, and one request of OpenAI's interface"
edgemerge serve ward.gguf --port 8080 &
server=$!
for _ in $(seq 120); do
  if curl -sf http://127.0.0.1:8080/v1/models >/dev/null; then break; fi
  sleep 1
done
# These models have no chat template.
curl -sS --fail-with-body http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \
  -d '{"model": "ward", "prompt": "What is aspirin?", "max_tokens": 8, "temperature": 0}' >answer.json ||
  cat answer.json
python3 -c '
import json
answer = json.load(open("answer.json"))
print(repr(answer["choices"][0]["text"]), answer["usage"])
assert answer["usage"]["completion_tokens"] > 0
'
kill -TERM $server
wait $server

step "bench"
edgemerge bench ward.gguf -p 16 -n 8 -r 1
step "done"
