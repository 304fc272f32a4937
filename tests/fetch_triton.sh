#!/usr/bin/env bash
# Unpack a real Triton server into .triton/ (no root, nothing is installed), for the tests of KIMIA_ENGINE=triton://...
#
# The server comes in PyPI's nvidia-pytriton; its Python backend needs a Python with a shared library, of the same
# version as .venv, whose packages it then reads: Debian's /usr/bin/python3.11 is one. KIMIA_TRITON_PYTHON names another.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
python=${KIMIA_TRITON_PYTHON:-/usr/bin/python$version}
[ -x "$python" ] || { echo "this needs Python $version with a shared library: KIMIA_TRITON_PYTHON=/path/to/python$version" >&2; exit 1; }
ldd "$(readlink -f "$python")" >/dev/null
draft=$(mktemp -d "$PWD/.triton-XXXXXX")
trap 'rm -rf "$draft"' EXIT
"$python" -m venv --without-pip "$draft"
.venv/bin/python -m pip --python "$draft/bin/python" install -q --retries 1 --no-deps nvidia-pytriton==0.7.0
packages="$draft/lib/python$version/site-packages"
server="$packages/pytriton/tritonserver"
cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"
printf '%s\n' "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" "$PWD" > "$packages/kimia.pth"
LD_LIBRARY_PATH="$packages/nvidia_pytriton.libs" "$server/bin/tritonserver" --help >/dev/null 2>&1 || [ $? -eq 1 ]
rm -rf .triton
mv "$draft" .triton
trap - EXIT
echo "Triton is in .triton"
