#!/bin/sh
# Install moltis for the user who runs this: one Python file and a launcher.
set -eu

usage() {
    cat <<'END'
usage: sh install.sh [--from URL|FILE] [--prefix DIR] [-- SUBCOMMAND ...]
       sh install.sh --uninstall [--prefix DIR]

  --from URL|FILE   where moltis.py comes from: a gateway (http://gateway:9090), a
                    URL, or a file (default: moltis.py beside this script)
  --prefix DIR      install as DIR/bin/moltis and DIR/lib/moltis (default: ~/.local)
  --uninstall       remove what this script has installed
  -- SUBCOMMAND     run it with the installed moltis, as in: -- node list

Run it again to upgrade.  It needs Python 3.8 or later, and no root.
END
}

main() {
    source=
    prefix=
    uninstall=no
    while [ $# -gt 0 ]; do
        case $1 in
        --from=*) source=${1#*=} ;;
        --prefix=*) prefix=${1#*=} ;;
        --from | --prefix)
            [ $# -gt 1 ] || fail "$1 needs a value" 2
            if [ "$1" = --from ]; then source=$2; else prefix=$2; fi
            shift
            ;;
        --uninstall) uninstall=yes ;;
        -h | --help)
            usage
            return
            ;;
        --)
            shift
            break
            ;;
        *) fail "unknown argument $1; see sh install.sh --help" 2 ;;
        esac
        shift
    done
    choose_places
    if [ "$uninstall" = yes ]; then
        remove
        return
    fi
    find_python
    check_modules
    refuse_foreign_launcher
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    fetch
    check_program
    put_in_place
    rm -rf "$work"
    trap - EXIT HUP INT TERM
    say_where
    if [ $# -gt 0 ]; then
        exec "$launcher" "$@"
    fi
}

say() {
    printf 'install.sh: %s\n' "$*" >&2
}

fail() { # MESSAGE [STATUS]
    say "$1"
    exit "${2:-1}"
}

choose_places() {
    if [ -z "$prefix" ]; then
        [ -n "${HOME:-}" ] || fail "HOME is not set; say where with --prefix DIR" 2
        prefix=$HOME/.local
    fi
    case $prefix in
    /*) ;;
    *) prefix=$PWD/$prefix ;;
    esac
    bin=$prefix/bin
    library=$prefix/lib/moltis
    launcher=$bin/moltis
    # The existing Moltis has a program of the same name: ours says whose it is.
    mark='# Installed by install.sh of moltis.py'
}

# -- what is on this machine

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 \
        python3.9 python3.8 /usr/libexec/platform-python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        # Apple's /usr/bin/python3 opens a dialog where its tools are not installed.
        if [ "$(command -v "$candidate")" = /usr/bin/python3 ] &&
            [ "$(uname)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then
            continue
        fi
        # The interpreter itself: not a shim, nor a virtual environment that may go.
        python=$("$candidate" -I -c 'import os, sys
if sys.version_info >= (3, 8):
    path = "%s/bin/python%d.%d" % (sys.base_prefix, *sys.version_info[:2])
    virtual = sys.prefix != sys.base_prefix and os.path.exists(path)
    print(path if virtual else sys.executable)' 2>/dev/null) || continue
        [ -z "$python" ] || return 0
    done
    fail "no Python 3.8 or later here; install the package python3"
}

check_modules() {
    # Without `site`, and so without the .pth files of others: 3 to 25 ms of a start.
    options=-IS
    find_missing
    if [ -n "$missing" ]; then # some systems keep a few among what is added to Python
        options=-I
        find_missing
    fi
    for module in $missing; do
        case $module in
        sqlite3) say "$python has no module sqlite3, which a gateway needs;" \
            "install $(package_of sqlite3)" ;;
        ssl) say "$python has no module ssl, which https:// and wss:// need;" \
            "install $(package_of ssl)" ;;
        *) fail "$python has no module $module; install $(package_of "$module")" ;;
        esac
    done
}

find_missing() { # with $options
    missing=$("$python" $options -c 'import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        print(name)' argparse http.server json py_compile sqlite3 ssl \
        urllib.request zlib) || fail "$python does not work"
}

package_of() { # MODULE
    system=$(sed -n 's/^ID=//p; s/^ID_LIKE=//p' /etc/os-release 2>/dev/null |
        tr -d '"' | tr '\n' ' ')
    case " $system" in
    *openwrt*)
        case $1 in
        ssl) echo "the package python3-openssl" ;;
        *) echo "the package python3-$1 or python3" ;;
        esac
        ;;
    *freebsd*) echo "the port py3-$1" ;;
    *debian* | *ubuntu*) echo "the package python3 (python3-minimal is not enough)" ;;
    *suse*) echo "the package python3 (python3-base is not enough)" ;;
    *rhel* | *fedora* | *centos*) echo "the package python3-libs" ;;
    *) echo "the package python3 of your system, or one with $1 in its name" ;;
    esac
}

refuse_foreign_launcher() {
    if [ -e "$launcher" ] && ! grep -qF "$mark" "$launcher"; then
        fail "$launcher is another program; choose another place with --prefix DIR"
    fi
}

# -- moltis.py

fetch() { # into $work/moltis.py
    if [ -z "$source" ]; then
        # From a pipe, $0 is the shell: what lies in this directory is not meant.
        source=$(dirname "$0")/moltis.py
        { [ -f "$0" ] && [ -f "$source" ]; } ||
            fail "no moltis.py beside this script; say --from http://GATEWAY:9090" 2
    fi
    case $source in
    http://* | https://*) download ;;
    *)
        [ -f "$source" ] || fail "there is no file $source"
        cp "$source" "$work/moltis.py"
        ;;
    esac
}

download() {
    case ${source#*://} in
    */?*) ;;
    *) source=${source%/}/moltis.py ;; # the address of a gateway
    esac
    if command -v curl >/dev/null 2>&1; then
        curl -fsSL -o "$work/moltis.py" "$source" || no_download
    elif command -v wget >/dev/null 2>&1; then
        wget -q -O "$work/moltis.py" "$source" || no_download
    else
        "$python" -I -c 'import shutil, sys, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=60) as answer:
        with open(sys.argv[2], "wb") as file:
            shutil.copyfileobj(answer, file)
except OSError as error:
    sys.exit(str(error))' "$source" "$work/moltis.py" || no_download
    fi
}

no_download() {
    fail "cannot download $source; is that the address of a gateway?"
}

check_program() {
    # Also its last lines: half a program may compile as well.
    "$python" -I -c 'import re, sys
text = open(sys.argv[1], "rb").read()
for part in (rb"^\"\"\"moltis:", rb"^__version__ = ", rb"^if __name__ == .*:\n.*\n\Z"):
    if not re.search(part, text, re.M):
        sys.exit(1)
compile(text, sys.argv[1], "exec")' "$work/moltis.py" 2>/dev/null ||
        fail "what is at $source is not moltis.py, or not all of it"
}

put_in_place() {
    mkdir -p "$bin" "$library" || fail "cannot write to $prefix; use --prefix DIR"
    # Nothing that an import makes is garbage: not to look takes 7 ms off a start.
    code='import gc, sys; gc.disable(); sys.path.insert(0, sys.argv.pop(1))'
    code="$code; import moltis; gc.freeze(); gc.enable(); sys.exit(moltis.main())"
    cat >"$work/moltis" <<END
#!/bin/sh
$mark.
# It imports the program, so that Python takes the compiled form and starts fast.
exec $(quote "$python") $options -c '$code' $(quote "$library") "\$@"
END
    chmod 755 "$work/moltis"
    chmod 644 "$work/moltis.py"
    # Renamed within the directory: a moltis that starts now finds the old or the new.
    cp "$work/moltis.py" "$library/.moltis.py.new"
    mv -f "$library/.moltis.py.new" "$library/moltis.py"
    "$python" -I -m py_compile "$library/moltis.py"
    cp "$work/moltis" "$bin/.moltis.new"
    mv -f "$bin/.moltis.new" "$launcher"
}

quote() {
    printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"
}

say_where() {
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$library/moltis.py")
    say "moltis $version is $launcher"
    case :${PATH:-}: in
    *:"$bin":*)
        first=$(command -v moltis) || first=$launcher
        [ "$first" = "$launcher" ] || say "but \`moltis\` is still $first on your PATH"
        ;;
    *) say "$bin is not on your PATH; add to ~/.profile: export PATH=\"$bin:\$PATH\"" ;;
    esac
}

# -- and away

remove() {
    refuse_foreign_launcher
    rm -f "$launcher" "$library/moltis.py"
    rm -rf "$library/__pycache__"
    rmdir "$library" 2>/dev/null || true
    say "moltis is removed from $prefix"
    data=${MOLTIS_DATA_DIR:-${HOME:-}/.moltis}
    if [ -e "$data/node.json" ]; then
        say "this machine is still a node; to end that:" \
            "python3 $(quote "$data/moltis.py") node remove"
    elif [ -d "$data" ]; then
        say "$data is kept"
    fi
}

main "$@"
