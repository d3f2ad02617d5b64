# What the end-to-end tests share: a temporary directory, a server under test, and assertions.
# Sourced by each test; not a test itself. Needs VARVE_BIN, the directory of varved and varve.
set -euo pipefail
export PYTHONDONTWRITEBYTECODE=1 LC_ALL=C PATH=$PATH:/usr/sbin:/sbin

e2e_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VARVE_BIN=$(cd "${VARVE_BIN:-$e2e_dir/../../build/bin}" && pwd)
T=$(mktemp -d "${TMPDIR:-/tmp}/varve-e2e-XXXXXX")
owned=()    # processes to end when the test ends
mounted=()  # and file systems to unmount
server_pid= # the server under test, if one runs
socket= admin= port=

finish() {
    local status=$? process
    trap - EXIT
    set +e
    for process in "${owned[@]}"; do
        kill -9 "$process" 2>/dev/null
    done
    wait 2>/dev/null
    for directory in "${mounted[@]}"; do
        umount "$directory"
    done
    if [ $status != 0 ] && [ -e "$T/server.log" ]; then
        echo "--- the end of the server's log:" >&2
        tail -40 "$T/server.log" >&2
    fi
    rm -rf "$T"
    exit $status
}
trap finish EXIT
trap 'exit 1' INT TERM
trap 'echo "failed: ${BASH_SOURCE[0]##*/}:$LINENO: $BASH_COMMAND" >&2' ERR

step() { echo "-- $*"; }

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# same WHAT EXPECTED ACTUAL
same() {
    [ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"
}

# server_start POOL [OPTION...]: starts varved with a unix socket and a TCP port of its own and
# returns when it is ready. Sets server_pid, socket, admin (paths) and port.
server_start() {
    local pool=$1 line ready=
    shift
    socket=$T/nbd.sock admin=$T/admin.sock
    rm -f "$T/server.stderr"
    mkfifo "$T/server.stderr"
    "$VARVE_BIN/varved" --pool "$pool" --unix "$socket" --admin "$admin" --listen 127.0.0.1:0 \
        "$@" 2>"$T/server.stderr" &
    server_pid=$!
    owned+=("$server_pid")
    exec {server_errors}<"$T/server.stderr"
    while IFS= read -r -t 60 -u "$server_errors" line; do
        echo "$line" >>"$T/server.log"
        case $line in "varved: ready"*) ready=$line && break ;; esac
    done
    [ -n "$ready" ] || fail "the server did not become ready: $(tail -3 "$T/server.log")"
    # The rest of its log, until it ends.
    cat <&"$server_errors" >>"$T/server.log" &
    exec {server_errors}<&-
    port=$(sed -n 's/.*127\.0\.0\.1:\([0-9][0-9]*\).*/\1/p' <<<"$ready")
    [ -n "$port" ] || fail "the ready line names no port: $ready"
}

# Ends it as an operator would; it must commit and exit 0.
server_stop() {
    local status=0
    kill -TERM "$server_pid"
    wait "$server_pid" || status=$?
    server_pid=
    same "the server's exit status after SIGTERM" 0 "$status"
}

server_kill9() {
    kill -9 "$server_pid"
    wait "$server_pid" 2>/dev/null || true
    server_pid=
}

varve() { "$VARVE_BIN/varve" --admin "$admin" "$@"; }
# refused_varve STATUS VERB...: as refused, of a varve command.
refused_varve() {
    local expected=$1
    shift
    refused "$expected" "$VARVE_BIN/varve" --admin "$admin" "$@"
}

# uri EXPORT: of the unix socket. uri_tcp EXPORT: of the port.
uri() { echo "nbd+unix:///$1?socket=$socket"; }
uri_tcp() { echo "nbd://127.0.0.1:$port/$1"; }

# figure FILTER VERB...: one value out of a command's JSON.
figure() {
    local filter=$1
    shift
    varve --json "$@" | jq -er "$filter"
}

# used DISK; unique DISK@SNAP: bytes.
used() { figure ".disks[] | select(.name == \"$1\") | .used" list; }
unique() { figure ".snapshots[] | select(.name == \"${1#*@}\") | .unique" list "${1%@*}"; }
pool_used() { figure .used status; }

# Until no deletion is pending: space given back in the background shows in the figures.
reclaimed() {
    local end=$((SECONDS + 60))
    until [ "$(figure .reclaim_pending status)" = 0 ]; do
        [ $SECONDS -lt $end ] || fail "the space of a deletion is not given back after a minute"
        sleep 0.05
    done
}

# Until all snapshots have checksums.
checksummed() {
    local end=$((SECONDS + 60))
    until [ "$(figure .checksums_pending status)" = 0 ]; do
        [ $SECONDS -lt $end ] || fail "checksums are missing after a minute"
        sleep 0.05
    done
}

# detached DISK: until the server has noticed that its last client is gone.
detached() {
    local end=$((SECONDS + 30))
    until [ "$(figure ".disks[] | select(.name == \"$1\") | .clients" list)" = 0 ]; do
        [ $SECONDS -lt $end ] || fail "$1 still has clients after 30 s: $(varve clients "$1")"
        sleep 0.05
    done
}

# refused STATUS COMMAND...: it must exit with STATUS and say why in one line on stderr.
refused() {
    local expected=$1 status=0
    shift
    timeout 60 "$@" >"$T/refused.out" 2>"$T/refused.err" </dev/null || status=$?
    [ "$status" = "$expected" ] ||
        fail "expected exit status $expected, got $status, of: $* ($(cat "$T/refused.err"))"
    [ "$(wc -l <"$T/refused.err")" = 1 ] ||
        fail "expected one line on stderr of: $*; got: $(cat "$T/refused.err")"
    echo "   $(cat "$T/refused.err")"
}

# checksum URI: of everything an export holds.
checksum() { nbdcopy "$1" - | sha256sum | cut -d' ' -f1; }

# io ARGUMENT...: qemu-io; what it reads must be what the commands say.
io() {
    if ! qemu-io -f raw "$@" >"$T/qemu-io" 2>&1 || grep -qE 'failed|error' "$T/qemu-io"; then
        fail "qemu-io $*: $(cat "$T/qemu-io")"
    fi
}

# Nothing wrong, nothing leaked.
check_clean() {
    local report
    report=$(varve --json check) || fail "varve check: $report"
    same "varve check" "true 0 0" \
        "$(jq -r '"\(.ok) \(.errors | length) \(.leaked_blocks)"' <<<"$report")"
}

# pattern BYTES SEED: repeatable noise on stdout.
pattern() {
    python3 -c '
import random, sys
size, source = int(sys.argv[1]), random.Random(int(sys.argv[2]))
for offset in range(0, size, 1 << 20):
    sys.stdout.buffer.write(source.randbytes(min(1 << 20, size - offset)))' "$1" "$2"
}
