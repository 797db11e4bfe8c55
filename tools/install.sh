#!/bin/sh
# Install edgemerge from the folder of wheels that this file lies in: no network, no compiler, no root.
#
#   sh install.sh [--into FOLDER]
#
# It makes an environment in FOLDER (default ~/.local/share/edgemerge) and a link to the command in
# ~/.local/bin. Each wheel is checked against its hash. The same command updates an installation.
set -eu

wheels=$(cd "$(dirname "$0")" && pwd)
into=${XDG_DATA_HOME:-$HOME/.local/share}/edgemerge

fail() {
  echo "install.sh: $*" >&2
  exit 1
}

case $#,${1-} in
  0,) ;;
  2,--into) into=$2 ;;
  *) fail "usage: sh install.sh [--into FOLDER]" ;;
esac

machine=$(uname -m)
list=
for python in python3.13 python3.12 python3.11 python3; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  if [ -e "$wheels/$machine-$version.txt" ]; then
    list=$wheels/$machine-$version.txt
    break
  fi
done
if [ -z "$list" ]; then
  here=$(cd "$wheels" && echo ./*.txt)
  fail "no Python here has wheels in $wheels for $machine, which is for: $here"
fi
# A 32-bit system may have a 64-bit kernel, whose name uname gives.
"$python" -c 'import sys; sys.exit(sys.maxsize < 2**32)' ||
  fail "$python is a 32-bit program, and the wheels are for 64-bit ones: install a 64-bit system"
"$python" -c 'import platform, sys; sys.exit(platform.libc_ver()[0] != "glibc")' ||
  fail "$python does not use glibc, which the wheels need: install a system that has it, as Debian"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python has no module venv: run apt install python$version-venv as root first"

echo "installing edgemerge for $machine and Python $version into $into"
# An environment of another Python, as before an upgrade of the system, is made anew.
clear=
if [ -e "$into/pyvenv.cfg" ] && ! "$into/bin/python$version" -c '' 2>/dev/null; then clear=--clear; fi
"$python" -m venv $clear "$into"
into=$(cd "$into" && pwd)
updates=
if [ -e "$into/bin/edgemerge" ]; then updates=yes; fi
install() {
  "$into/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$wheels" \
    --require-hashes "$@"
}
install -r "$list"
# To pip, a wheel of the same version is installed already, whatever is in it: ours are built anew without one.
if [ -n "$updates" ]; then
  grep -E '^(edgemerge|llama-cpp-python)==' "$list" >"$into/own.txt"
  install --force-reinstall --no-deps -r "$into/own.txt"
  rm "$into/own.txt"
fi
mkdir -p "$HOME/.local/bin"
ln -sf "$into/bin/edgemerge" "$HOME/.local/bin/edgemerge"
"$into/bin/edgemerge" --version
case :$PATH: in
  *":$HOME/.local/bin:"*) ;;
  *) echo "now put $HOME/.local/bin on your PATH, or call $into/bin/edgemerge" ;;
esac
