# What build-wheel and build-portable have in common: sourced by both, which set `python`, `jobs` and `temp`.
# shellcheck shell=bash disable=SC2034,SC2154

version=0.3.36
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${EDGEMERGE_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/edgemerge/wheels}

# No vision (LLAVA), no llama.cpp "common" (lean.cmake), several files per compiler run (UNITY).
# Without FMA contraction ggml's quantisers give the bytes of the C source: the oracle of our codecs.
# Set flags for a processor: lean_flags x86_64
lean_flags() {
  local compiler_flags="-ffp-contract=off"
  # Nor with AMX, which only servers have: virtual machines show it and die of SIGILL at its first instruction,
  # and its file cannot be compiled together with others.
  if [ "$1" = x86_64 ]; then compiler_flags+=" -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"; fi
  flags=(
    -DLLAVA_BUILD=OFF
    -DCMAKE_UNITY_BUILD=ON
    -DCMAKE_UNITY_BUILD_BATCH_SIZE=12
    "'-DCMAKE_C_FLAGS=$compiler_flags'"
    "'-DCMAKE_CXX_FLAGS=$compiler_flags'"
  )
}

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# Refuse to begin without the compilers that are named.
need_compilers() {
  local compiler
  for compiler in "$@"; do
    command -v "$compiler" >/dev/null ||
      fail "no compiler '$compiler': llama-cpp-python is built from source and needs a C and a C++" \
        "compiler (Debian: apt install ${package:-build-essential})."
  done
}

# Print for how many compilers at once there is memory, here or in this container.
# A compiler run peaks at 450 MiB (measured, with this unity batch size): never let a small board swap.
count_jobs() {
  local found mem_mib jobs
  found=$(PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH} "$python" -c '
import os
from edgemerge.machine import control_group
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
memory = min([memory, *(limit for _, limit in control_group.memory_limits())])
print(memory >> 20, control_group.usable_processors())') || return 1
  read -r mem_mib jobs <<<"$found"
  if [ "$jobs" -gt $((mem_mib / 768)) ]; then jobs=$((mem_mib / 768)); fi
  if [ "$mem_mib" -lt 3072 ]; then jobs=1; fi
  echo "${CMAKE_BUILD_PARALLEL_LEVEL:-$jobs}"
}

# Build the wheel of a source (a version on PyPI, or a folder) into $temp/out with $flags and a CMake file.
build() {
  mkdir -p "$temp/out" "$temp/tmp"
  # pip's own wheel cache and local wheel folders ignore CMAKE_ARGS: never take a wheel from there.
  # TMPDIR: on many boards /tmp lives in memory.
  if ! TMPDIR=$temp/tmp \
    CMAKE_BUILD_PARALLEL_LEVEL=$jobs \
    CMAKE_ARGS="${flags[*]} '-DCMAKE_PROJECT_llama_cpp_INCLUDE=$here/$2'" \
    "$python" -m pip wheel --disable-pip-version-check --no-cache-dir --no-deps \
    --no-binary llama-cpp-python -w "$temp/out" "$1" >"$temp/log" 2>&1; then
    tail -n 40 "$temp/log" >&2
    fail "building llama-cpp-python $version failed; the end of its log stands above."
  fi
}
