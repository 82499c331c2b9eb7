#!/usr/bin/env bash
# The test suite under the oldest and the newest supported torch, transformers and Triton.
#
#   scripts/versions.sh [SET ...]      oldest newest (default: both)
#   PYTEST_ARGS="-m 'not slow'" VERSIONS_DIR=/elsewhere scripts/versions.sh oldest
#
# Makes a virtual environment a set (once; delete VERSIONS_DIR to make them anew), runs pytest in it
# and prints a table of versions and outcomes. Fails where a set fails.
set -uo pipefail
cd "$(dirname "$0")/.."

ROOT=${VERSIONS_DIR:-build/versions}
PYTHON=${PYTHON:-python3}
default='-m "not gpu and not slow"'
ARGS=${PYTEST_ARGS:-$default}
# numpy: the interpreter of Triton 3.6, which the tests use, fails with 2.4
declare -A SETS=(
    [oldest]="torch==2.11.0 transformers==5.10.1 triton==3.6.0 numpy==2.3.5"
    [newest]="torch transformers triton"
)

versions() {
    "$1" - <<'PY'
import importlib.metadata as metadata
import platform

found = [f"Python {platform.python_version()}"]
for name in ("torch", "transformers", "triton", "numpy"):
    try:
        found.append(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        found.append(f"no {name}")
print(", ".join(found))
PY
}

table=() failed=0
for name in "${@:-oldest newest}"; do
    for set in $name; do
        if [[ -z ${SETS[$set]:-} ]]; then
            echo "unknown set $set; known are: ${!SETS[*]}" >&2
            exit 2
        fi
        home=$ROOT/$set
        python=$home/bin/python
        if [[ ! -e $home/.ready ]]; then
            # torch first, so that the rest takes the one that is there
            read -ra pins <<<"${SETS[$set]}"
            "$PYTHON" -m venv "$home" &&
                "$python" -m pip install --quiet "${pins[0]}" &&
                "$python" -m pip install --quiet "${pins[@]}" -e ".[recsys,test]" &&
                touch "$home/.ready" || { table+=("$set | ${SETS[$set]} | not installed"); failed=1; continue; }
        fi
        eval "\"$python\" -m pytest -q $ARGS" 2>&1 | tee "$home/pytest.log"
        status=${PIPESTATUS[0]}
        ((status == 0)) || failed=1
        table+=("$set | $(versions "$python") | $(grep . "$home/pytest.log" | tail -n 1)")
    done
done
printf '\nset | versions | outcome\n'
printf '%s\n' "${table[@]}"
exit "$failed"
