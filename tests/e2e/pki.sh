# Certificates and keys for tests, by GnuTLS' tools, as a user would make them. Sourced.

_certtool() { certtool "$@" >"$T/certtool.log" 2>&1 || fail "certtool $*: $(cat "$T/certtool.log")"; }

# pki_authority DIR: ca-cert.pem, ca-key.pem.
pki_authority() {
    mkdir -p "$1"
    printf '%s\n' 'cn = Test authority' ca cert_signing_key crl_signing_key 'expiration_days = 9' \
        >"$1/ca.info"
    _certtool --generate-privkey --key-type=ecdsa --outfile "$1/ca-key.pem"
    _certtool --generate-self-signed --load-privkey "$1/ca-key.pem" --template "$1/ca.info" \
        --outfile "$1/ca-cert.pem"
}

# pki_certificate AUTHORITY DIR server|client NAME [TEMPLATE-LINE...]: DIR/server-cert.pem and
# server-key.pem, or client-..., and the authority's certificate beside them.
pki_certificate() {
    local authority=$1 directory=$2 kind=$3 name=$4
    shift 4
    mkdir -p "$directory"
    printf '%s\n' "cn = $name" "tls_www_$kind" signing_key "dns_name = $name" \
        'ip_address = 127.0.0.1' "${@-expiration_days = 9}" >"$directory/$kind.info"
    _certtool --generate-privkey --key-type=ecdsa --outfile "$directory/$kind-key.pem"
    _certtool --generate-certificate --load-ca-certificate "$authority/ca-cert.pem" \
        --load-ca-privkey "$authority/ca-key.pem" --load-privkey "$directory/$kind-key.pem" \
        --template "$directory/$kind.info" --outfile "$directory/$kind-cert.pem"
    [ "$authority" -ef "$directory" ] || cp "$authority/ca-cert.pem" "$directory/"
}

# pki_revoke AUTHORITY CERTIFICATE...: a list of these, ca-crl.pem on stdout.
pki_revoke() {
    local authority=$1
    shift
    cat "$@" >"$T/revoked.pem"
    printf '%s\n' 'expiration_days = 9' 'crl_number = 1' >"$T/crl.info"
    _certtool --generate-crl --load-ca-certificate "$authority/ca-cert.pem" \
        --load-ca-privkey "$authority/ca-key.pem" --load-certificate "$T/revoked.pem" \
        --template "$T/crl.info" --outfile "$T/crl.pem"
    cat "$T/crl.pem"
}

# pki_user FILE USER: a new key of the user's in it.
pki_user() { psktool -u "$2" -p "$1" >/dev/null 2>&1 || fail "psktool"; }
