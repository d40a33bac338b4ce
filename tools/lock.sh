#!/bin/sh
# Write the locks from the exact versions in requirements.in, with the hashes of every file of each
# version, so that pip installs nothing else: requirements.lock for work on this project,
# requirements-server.lock for the image, with what a server needs alone, and
# requirements-clients.lock for other projects' clients, which have an environment of their own.
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python -m venv "$scratch/uv"
"$scratch/uv/bin/pip" install -q --disable-pip-version-check uv==0.13.9
compile() { "$scratch/uv/bin/uv" pip compile -q --generate-hashes --no-annotate --no-header "$@"; }
compile requirements.in --no-deps --universal --python-version 3.11 -o "$scratch/all"
compile pyproject.toml --extra runtime --extra client --extra openai --constraint requirements.in \
    --python-version 3.12 --python-platform x86_64-manylinux_2_28 -o "$scratch/server"
compile requirements-clients.in --universal --python-version 3.11 -o "$scratch/clients"
mv "$scratch/all" requirements.lock
mv "$scratch/server" requirements-server.lock
mv "$scratch/clients" requirements-clients.lock
