#!/usr/bin/env bash
# Installs Quire as a user would, far from the checkout, and asks it one question about the documents it ships with.
#
#   packaging/wheel_smoke_test.sh            with pipx when there is one, else from a wheel in a fresh environment
#   INSTALL=wheel packaging/wheel_smoke_test.sh          (or INSTALL=pipx) one of the two
#   PYTHON=python3.12 packaging/wheel_smoke_test.sh      another Python than python3
#
# About two minutes when pip has a wheel of llama-cpp-python in its cache; it is compiled otherwise. Touches nothing
# outside a temporary directory, which is removed, but pip's cache.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
install=${INSTALL:-$(command -v pipx >/dev/null && echo pipx || echo wheel)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for kind in DATA CACHE CONFIG; do
    export "QUIRE_${kind}_DIR=$scratch/$(echo $kind | tr '[:upper:]' '[:lower:]')"
done
# One thread: on a busy machine llama.cpp's threads wait for one another most of the time.
export QUIRE_THREADS=${QUIRE_THREADS:-1}
unset PYTHONPATH VIRTUAL_ENV

began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*"; }
fail() {
    echo "wheel smoke test: $*" >&2
    exit 1
}

case $install in
wheel)
    say "building the wheel"
    "$python" -m venv "$scratch/venv"
    installed=$scratch/venv/bin
    "$installed/python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch/dist" "$checkout"
    say "installing $(cd "$scratch/dist" && echo *.whl)"
    "$installed/python" -m pip install --quiet "$scratch"/dist/*.whl
    command=$installed/quire
    uninstall() { "$installed/python" -m pip uninstall --quiet --yes quire; }
    ;;
pipx)
    export PIPX_HOME=$scratch/pipx PIPX_BIN_DIR=$scratch/bin PIPX_MAN_DIR=$scratch/man PIPX_DEFAULT_BACKEND=pip
    say "pipx install"
    pipx install --python "$python" "$checkout"
    installed=$PIPX_HOME/venvs/quire/bin
    command=$PIPX_BIN_DIR/quire
    uninstall() { pipx uninstall quire; }
    ;;
*) fail "INSTALL is wheel or pipx, not $install" ;;
esac

cd "$scratch" # so that nothing is found in the checkout
say "$("$command" --version)"
sample=$("$installed/python" -c 'from quire import paths; print(paths.assets() / "sample")')
[[ $sample == "$scratch"/*/quire/assets/sample ]] || fail "the sample is taken from $sample"
[[ -f $sample/lighthouse.md ]] || fail "the sample is not in the package"

say "quire add $sample"
"$command" add "$sample"
say "quire ask"
"$command" ask --json --max-tokens 16 "Who was the engineer of the lighthouse at Grey Point?" >answer.json
"$installed/python" - <<'CHECK' || fail "the answer is not what it should be: $(cat answer.json)"
import json

told = json.load(open("answer.json"))
print(f"answer: {told['answer']!r}")
print(f"tokens: {told['tokens']}")
assert told["tokens"]["reused"] > 0, "no stored KV was used"
assert told["answer"].strip(), "nothing was answered"
CHECK

say "quire doctor"
"$command" doctor || fail "the doctor found something"

say "uninstalling"
uninstall
[[ ! -e $command && ! -L $command ]] || fail "$command is still there"
[[ ! -e $sample ]] || fail "$sample is still there"
say "all well ($install)"
