#!/usr/bin/env bash
# Unpack Debian's Redis 7.0 into .redis7/ (no root, nothing is installed), for the tests that run on Redis and Valkey.
set -euo pipefail
cd "$(dirname "$0")/.."
{ command -v apt-get && command -v dpkg; } >/dev/null || { echo "this needs apt-get and dpkg; elsewhere set KIMIA_REDIS7 to a redis-server of 7.0" >&2; exit 1; }
target="$PWD/.redis7"
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
(cd "$packages" && apt-get -q download redis-server redis-tools libjemalloc2 liblzf1 libatomic1 libsystemd0)
mkdir -p "$target"
for package in "$packages"/*.deb; do dpkg -x "$package" "$target"; done
LD_LIBRARY_PATH="$(echo "$target"/usr/lib/*-linux-gnu):$(echo "$target"/lib/*-linux-gnu)" "$target/usr/bin/redis-server" --version
