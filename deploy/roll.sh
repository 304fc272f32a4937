#!/bin/sh
# Replace the containers of one service one by one, under load:
#
#     deploy/roll.sh llm
#
# For each container that runs: one more is started and has to become healthy, then the old one is stopped. It gets
# SIGTERM, takes nothing new, hands its turns over and is removed. New containers take the image and settings of now.
# Compose's own variables (COMPOSE_FILE, COMPOSE_PROJECT_NAME, ...) say which deployment is meant.
set -eu
service=${1:?usage: deploy/roll.sh SERVICE}
export COMPOSE_FILE="${COMPOSE_FILE:-$(dirname "$0")/compose.yaml}"

old=$(docker compose ps --quiet "$service")
count=$(printf '%s\n' "$old" | grep -c . || true)
if [ "$count" = 0 ]; then
    echo "no container of $service runs: docker compose up first" >&2
    exit 1
fi
for container in $old; do
    docker compose up --detach --wait --no-deps --no-build --no-recreate --scale "$service=$((count + 1))" "$service"
    docker stop "$container" # waits for stop_grace_period at most
    docker rm "$container"
done
