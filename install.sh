#!/bin/sh
# Install moltis for the user who runs this: find a Python, get moltis.py, and run
# `moltis install`, which does the rest; see `sh install.sh --help`.
set -eu

fail() { # MESSAGE
    printf 'install.sh: %s\n' "$1" >&2
    exit 1
}

set_alarm() { # COMMAND...
    "$python" -I -c 'import os, signal, sys
signal.alarm(600)
os.execvp(sys.argv[1], sys.argv[1:])' "$@"
}

main() {
    from=$(dirname "$0")/moltis.py option=''
    # From a pipe, $0 is the shell: what lies in this directory is not meant.
    { [ -f "$0" ] && [ -f "$from" ]; } || from=''
    for word; do
        shift
        case $option:$word in
        :--from=*) from=${word#*=} ;;
        :--from) option=from from='' ;;
        from:*) from=$word option='' ;;
        *) set -- "$@" "$word" && [ "$word" != -- ] || option=none ;;
        esac
    done

    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 \
        python3.9 python3.8 platform-python /usr/libexec/platform-python ''; do
        # Apple's /usr/bin/python3 opens a dialog where its tools are not installed.
        case $(uname)$(command -v "$python") in
        Darwin/usr/bin/python3) xcode-select -p >/dev/null 2>&1 || continue ;;
        esac
        "$python" -I -c 'import argparse, http.server, json, sys, urllib.request, zlib
sys.exit(sys.version_info < (3, 8))' 2>/dev/null || continue
        break
    done
    [ -n "$python" ] || fail "no complete Python 3.8 or later here; install python3"

    program=$from
    case $from in
    http://* | https://*)
        case $from in *.py*) ;; *) from=${from%/}/moltis.py ;; esac
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        trap 'exit 1' HUP INT TERM
        program=$work/moltis.py
        # Ended after 10 minutes: a server may send its answer byte by byte.
        if command -v curl; then
            set_alarm curl -fsSL -o "$program" "$from"
        elif command -v wget; then
            set_alarm wget -q -O "$program" "$from"
        else
            set_alarm "$python" -I -c 'import sys, urllib.request
urllib.request.urlretrieve(*sys.argv[1:])' "$from" "$program"
        fi >/dev/null || fail "cannot download $from; is that the address of a gateway?"
        ;;
    esac
    [ -f "$program" ] ||
        fail "there is no ${from:-moltis.py here}; say --from http://GATEWAY:9090"
    case $(sed -n '2p;$p' "$program") in
    ???moltis:*'exit(main())') ;;
    *) fail "$from is not moltis.py, or not all of it" ;; # half of it may run as well
    esac
    "$python" -I "$program" install "$@"
}

main "$@"
