# shellcheck shell=bash
# Sourced by the scripts beside it, not run: `use_venv EXTRAS` goes to the root of the checkout, makes .venv where there
# is none, installs the package with these extras where something changed since, and puts .venv/bin on the path.

use_venv() {
  local extras=$1 python stamp state
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
  if [ ! -x .venv/bin/python ]; then
    for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
      if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
      python=
    done
    if [ -z "$python" ]; then
      echo "No Python 3.11 or newer found: install one, or name it, as in PYTHON=/path/to/python3.12 $0" >&2
      exit 2
    fi
    echo "Making .venv with $("$python" --version)" >&2
    if ! "$python" -m venv .venv; then
      rm -rf .venv
      echo "$python cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)" >&2
      exit 2
    fi
  fi
  # What the installation depends on; the same again means there is nothing to do.
  state=$(cat setup.py pyproject.toml; .venv/bin/python --version; pwd)
  stamp=.venv/installed-$extras
  if [ "$state" != "$(cat "$stamp" 2>/dev/null)" ]; then
    echo "Installing qbheat_jax[$extras] (a few minutes the first time)" >&2
    # setuptools warns of every editable installation that folders shadow packages, which is what one wants here.
    if ! PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" >&2; then
      echo "The installation failed; the lines above say why. Run the same command again once it is mended." >&2
      exit 1
    fi
    printf '%s' "$state" >"$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
