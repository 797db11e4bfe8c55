# Options that have pip take wheels of another machine; sourced by arm64 and wheels.
# shellcheck shell=bash disable=SC2034

# Set `target` for a processor and a version of Python: pip_target aarch64 3.11
pip_target() {
  local minor
  target=(
    --only-binary=:all: --python-version "$2" --implementation cp
    --abi "cp${2/./}" --abi abi3 --abi none --platform "manylinux2014_$1"
  )
  for minor in 17 24 26 27 28 31 34 35; do target+=(--platform "manylinux_2_${minor}_$1"); done
}
