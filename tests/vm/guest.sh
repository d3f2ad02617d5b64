# Boots a Linux guest in QEMU and runs commands in it, one at a time. Sourced by tests; they have
# sourced tests/e2e/lib.sh first. In the guest the host's loopback addresses are at 10.0.2.2.

vm_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# guest_boot [PROGRAM...]: boots the guest, with these programs in it; returns when it takes commands.
guest_boot() {
    local kernel
    kernel=$("$vm_dir/kernel") || fail "no kernel for the guest"
    "$vm_dir/initramfs" "$kernel" "$T/initramfs" "$@"
    mkfifo "$T/serial.in" "$T/serial.out"
    # Both ends open for both directions, so that neither side waits for the other to open.
    exec {guest_in}<>"$T/serial.in" {guest_out}<>"$T/serial.out"
    qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 384 -nodefaults -no-reboot \
        -display none -kernel "$kernel"/boot/vmlinuz-* -initrd "$T/initramfs" \
        -append "console=ttyS0 quiet panic=-1 random.trust_cpu=on" \
        -serial "file:$T/guest.log" -chardev "pipe,id=commands,path=$T/serial" \
        -serial chardev:commands -netdev user,id=net0 -device virtio-net-pci,netdev=net0,romfile= \
        >"$T/qemu.log" 2>&1 &
    guest_pid=$!
    owned+=("$guest_pid")
    guest_answer 300 || fail "the guest did not start: $(tail -5 "$T/guest.log" "$T/qemu.log")"
}

# guest_answer SECONDS: prints what the guest says up to its mark; returns the mark's status.
guest_answer() {
    local part line= end=$((SECONDS + $1))
    while [ $SECONDS -lt $end ]; do
        if ! IFS= read -r -t 5 -u "$guest_out" part; then
            line+=$part
            kill -0 "$guest_pid" 2>/dev/null || fail "the guest ended: $(tail -5 "$T/guest.log")"
            continue
        fi
        line+=${part%$'\r'}
        case $line in
        "@ready "* | "@done "*) return "${line##* }" ;;
        "") ;;
        *) printf '%s\n' "$line" ;;
        esac
        line=
    done
    fail "the guest did not answer within $1 s: $(tail -20 "$T/guest.log")"
}

# guest_try COMMAND: runs it in the guest's shell; output and status are the command's.
guest_try() {
    printf '%s\n' "$1" >&"$guest_in"
    guest_answer 300
}

# guest COMMAND: the same, and the test fails if the command fails.
guest() {
    local output status=0
    output=$(guest_try "$1") || status=$?
    [ -z "$output" ] || printf '%s\n' "$output"
    [ $status = 0 ] || fail "in the guest, status $status: $1: $output"
}

guest_stop() {
    printf 'poweroff -f\n' >&"$guest_in"
    wait "$guest_pid" || true
    exec {guest_in}>&- {guest_out}>&-
}
