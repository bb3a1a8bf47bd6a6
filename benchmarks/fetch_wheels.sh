#!/usr/bin/env bash
# Wheels for a machine without network that has torch but not all of this package's other requirements: Linux, x86-64,
# Python 3.12 unless PYTHON_VERSION says otherwise. There: python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
# lightly and kornia are compared with where they are there; nothing needs them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-.whl}
packages=(pydantic pydantic-core annotated-types typing-inspection ruamel.yaml kornia kornia-rs lightly lightly-utils)
rm -rf "$folder"
# pydantic takes one version of pydantic-core alone, so pip chooses these together; the others need nothing that is missing
platforms=()
for name in manylinux_2_34_x86_64 manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
  platforms+=(--platform "$name")
done
target=(--only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" -d "$folder")
python3 -m pip download -q "${target[@]}" pydantic
rm -f "$folder"/typing_extensions-*.whl
python3 -m pip download -q --no-deps "${target[@]}" "${packages[@]:4}"
du -ch "$folder"/*.whl
