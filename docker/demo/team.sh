#!/bin/sh
# Trains one of the demo's teams; started again, it goes on from its last checkpoint.
#
#   team.sh NAME [OPTION...]
set -eu
name=$1
shift
run=/runs/$name
if offshoot checkpoints "$run" latest >/dev/null 2>&1; then
    set -- --resume latest "$@"
fi
# Without TLS: the network is the containers' own.
exec offshoot train --model-name /demo/model.gguf --split-point-1 2 --split-point-2 20 \
    --server server:50051 --token-file "/tokens/$name/token" --allow-insecure-token \
    --session-name "$name" --output-dir "$run" "$@"
