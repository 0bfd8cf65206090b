#!/usr/bin/env bash
# Installs Quire as a user would, in a home of its own and far from the checkout: adds a folder, asks, watches, searches,
# lets the doctor look, uninstalls, and checks that nothing stays behind but what README says.
#
#   packaging/wheel_smoke_test.sh            with pipx when there is one, else from a wheel in a fresh environment
#   INSTALL=wheel packaging/wheel_smoke_test.sh          (or INSTALL=pipx) one of the two
#   PYTHON=python3.12 packaging/wheel_smoke_test.sh      another Python than python3
#   UNDER="nice -n 19" packaging/wheel_smoke_test.sh     what computes runs under this command
#
# About five minutes when pip has a wheel of llama-cpp-python in its cache; it is compiled otherwise. Touches nothing
# outside a temporary directory, which is removed, but pip's cache.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
install=${INSTALL:-$(command -v pipx >/dev/null && echo pipx || echo wheel)}
PIP_CACHE_DIR=$("$python" -m pip cache dir)
export PIP_CACHE_DIR
scratch=$(mktemp -d)
watching=
trap '[[ -z $watching ]] || kill "$watching" 2>/dev/null || true; rm -rf "$scratch"' EXIT

export HOME=$scratch/home
mkdir "$HOME"
# One thread: on a busy machine llama.cpp's threads wait for one another most of the time.
export QUIRE_THREADS=${QUIRE_THREADS:-1}
unset PYTHONPATH VIRTUAL_ENV XDG_DATA_HOME XDG_CACHE_HOME XDG_CONFIG_HOME XDG_STATE_HOME
unset QUIRE_DATA_DIR QUIRE_CACHE_DIR QUIRE_CONFIG_DIR QUIRE_LOG_DIR

began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*"; }
fail() {
    echo "wheel smoke test: $*" >&2
    exit 1
}
computing() { ${UNDER:-} "$@"; }

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
before=$(find "$HOME" -type f | sort) # what installing itself wrote there
say "$("$command" --version)"
sample=$("$installed/python" -c 'from quire import paths; print(paths.assets() / "sample")')
[[ $sample == "$scratch"/*/quire/assets/sample ]] || fail "the sample is taken from $sample"
[[ -f $sample/lighthouse.md ]] || fail "the sample is not in the package"
notes=$HOME/notes
cp -r "$sample" "$notes"
documents=$(cd "$notes" && find . -type f -exec cksum {} + | sort)

say "quire add ~/notes"
computing "$command" add "$notes"
say "quire ask"
computing "$command" ask --json --max-tokens 16 "Who was the engineer of the lighthouse at Grey Point?" >answer.json
"$installed/python" - <<'CHECK' || fail "the answer is not what it should be: $(cat answer.json)"
import json

told = json.load(open("answer.json"))
print(f"answer: {told['answer']!r}")
print(f"tokens: {told['tokens']}")
assert told["tokens"]["reused"] > 0, "no stored KV was used"
assert told["answer"].strip(), "nothing was answered"
CHECK

say "quire watch"
"$command" watch >watch.txt 2>&1 &
watching=$!
for _ in {1..600}; do
    [[ ! -s watch.txt ]] || break
    kill -0 "$watching" 2>/dev/null || fail "quire watch ended: $(cat watch.txt)"
    sleep 0.1
done
found() { "$command" search --json "ferry to Mandal" | grep -q 'ferry\.md'; }
! found || fail "what was not written yet is found"
echo "The ferry to Mandal leaves the north quay at a quarter past six." >"$notes/ferry.md"
saved=$SECONDS
until found; do
    ((SECONDS - saved < 60)) || fail "a saved file is not searchable: $(cat watch.txt)"
done
say "searchable $((SECONDS - saved)) s after it was saved, a start of quire search included"
kill -TERM "$watching"
wait "$watching" || fail "quire watch ended with $?: $(cat watch.txt)"
watching=
cat watch.txt

say "quire search"
"$command" search "ferry to Mandal" | sed -n 1,2p # and not head, which would hang up
say "quire doctor"
"$command" doctor || fail "the doctor found something"

say "uninstalling"
uninstall
[[ ! -e $command && ! -L $command ]] || fail "$command is still there"
[[ ! -e $sample ]] || fail "$sample is still there"
rm "$notes/ferry.md"
[[ $(cd "$notes" && find . -type f -exec cksum {} + | sort) == "$documents" ]] || fail "the documents are not as they were"
if [[ $(uname) == Linux ]]; then # whose places README names
    places=$(grep -oE '`~/[^`]*/quire(/log)?`' "$checkout/README.md" | tr -d '`' | sed "s|^~|$HOME|")
    say "left behind, as README says:"
    while read -r place; do
        [[ ! -d $place ]] || du -sh "$place"
    done <<<"$places"
    left=$(find "$HOME" -type f ! -path "$notes/*" | sort | comm -23 - <(echo "$before"))
    while read -r place; do
        left=$(grep -vF "$place/" <<<"$left" || true)
    done <<<"$places"
    [[ -z $left ]] || fail "this stays behind, and README does not say so: $left"
fi
say "all well ($install)"
