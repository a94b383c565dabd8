#!/bin/sh
# The entry point of the `cli` service: `demo [options]`, or any command. Afterwards the runs are in /out (./runs of the
# checkout) and belong to its owner. If something cannot be copied, a message says so; the command does not fail.
if [ "$1" = demo ]; then
    shift
    set -- fedalloy demo --connection fedalloy --runs-dir /app/runs --collect-to /out "$@"
fi
# Docker has just made the folder as root, so it should belong to the owner of the checkout.
[ "$(stat -c %u /out)" != 0 ] || chown "$(stat -c %u:%g /app/checkout)" /out
"$@"
code=$?
fedalloy collect /app/runs /out > /tmp/collected || true
exit "$code"
