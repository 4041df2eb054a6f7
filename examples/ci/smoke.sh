#!/bin/sh
# Chunk a checkpoint, serve it in the background, run `surfw infer --json` on it, and stop the server.
#   sh smoke.sh CHECKPOINT PROMPT [PORT]
# Needs surfw and curl on the PATH. Prints the output of `surfw infer --json`.
set -eu
checkpoint=${1:?CHECKPOINT} prompt=${2:?PROMPT} port=${3:-8765}
work=$(mktemp -d)
server=
trap 'exit 130' INT TERM
trap 'kill "$server" 2>/dev/null && wait "$server" || true; rm -rf "$work"' EXIT

surfw chunk "$checkpoint" --store "$work/store" --name smoke >&2
surfw serve --store "$work/store" --port "$port" --no-live --announce >"$work/address" 2>"$work/server.log" &
server=$!
tries=0
# Our server writes its address to this file. This prevents using another server that already has the port.
until [ -s "$work/address" ] && curl --silent --fail --output /dev/null "http://127.0.0.1:$port/readyz"; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ] || ! kill -0 "$server" 2>/dev/null; then
        cat "$work/server.log" >&2
        exit 1
    fi
    sleep 0.1
done
surfw infer --source "ws://127.0.0.1:$port" --model smoke --prompt "$prompt" --json
