#!/bin/sh
# Makes the demo's tenants, once: who may use the server is in /access, each team's token where only that
# team's container sees it. The operator's token is for the console and the commands.
set -eu
umask 077

add() {
    name=$1
    shift
    token=/tokens/$name/token
    if [ -s "$token" ]; then
        return
    fi
    # Left over from a start that was broken off.
    offshoot tenant remove "$name" --tenants /access/tenants.toml 2>/dev/null || true
    offshoot tenant add "$name" --tenants /access/tenants.toml "$@" >"$token.new"
    mv "$token.new" "$token"
    echo "made tenant $name"
}

add support
add scribe
add ops --operator
