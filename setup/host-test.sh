#!/usr/bin/env bash
# What setup/host.sh says where a host lacks something: each case is a shell whose PATH has stand-ins and little else.
# shellcheck disable=SC2016 # scripts of stand-ins and cases are for other shells to expand
set -euo pipefail
cd "$(dirname "$0")/.."

# Spaces in paths are part of every case.
work=$(mktemp -d "${TMPDIR:-/tmp}/heyvm host test.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/a clone/setup" "$work/plain"
cp setup/host.sh "$work/a clone/setup/"
cp Cargo.toml "$work/a clone/"
for program in awk bash basename cat chmod cut df dirname env grep head id ln mkdir mktemp rm sed sort tail touch tr uname; do
    ln -s "$(command -v "$program")" "$work/plain/$program"
done

failures=0
stand_ins=
host() { # begins a case: a host without anything
    stand_ins=$work/stand-ins
    rm -rf "$stand_ins" "${work:?}/home" "$work/a clone/target"
    mkdir -p "$stand_ins" "$work/home"
}
has() { # NAME SCRIPT
    printf '#!/usr/bin/env bash\n%s\n' "$2" >"$stand_ins/$1"
    chmod +x "$stand_ins/$1"
}
says() { # EXPECTED-STATUS EXPECTED-TEXT COMMAND: what the command prints, after host.sh was read
    local status=0 said
    said=$(env -i HOME="$work/home" PATH="$stand_ins:$work/plain" bash -c "
        set -euo pipefail
        . '$work/a clone/setup/host.sh'
        PATH='$stand_ins:$work/plain'
        $3" 2>&1 </dev/null) || status=$?
    if [ "$status" != "$1" ] || [[ $said != *"$2"* ]]; then
        printf 'FAILED: %s\n  expected status %s and: %s\n  got status %s and: %s\n' "$3" "$1" "$2" "$status" "$said" >&2
        failures=$((failures + 1))
    fi
}

host # no package manager
says 1 'has no package manager known here' 'install_packages run'
says 1 'hint: install the programs named above by hand' 'install_packages run'

host # neither root nor sudo
has apt-get 'exit 1'
has id 'echo 1000'
says 1 'you are neither root nor is there sudo' 'install_packages run'
says 1 'hint: as root: apt-get install' 'install_packages run'

host # no network: apt
has id 'echo 0'
has apt-get 'echo "E: Failed to fetch" >&2; exit 100'
has apt-cache 'exit 100'
says 1 'apt-get could not install' 'install_packages run'
says 1 'E: Failed to fetch' 'install_packages run'
says 1 'the package lists could not be refreshed' 'install_packages run'
says 1 'apt knows no kernel package' 'fetch_kernel'

host # no network: dnf
has id 'echo 0'
has dnf 'echo "Curl error (6)" >&2; exit 1'
says 1 'dnf could not install' 'install_packages run'
says 1 'without a network connection nothing can be installed' 'install_packages run'

host # what a package manager says it has done is looked at
has id 'echo 0'
has dnf 'exit 0'
says 1 'still missing after the installation' 'install_packages run'

host # Ubuntu: one of the names is unknown to apt
has id 'echo 0'
has apt-get 'case $* in *download*) touch one.deb two.deb ;; esac'
has apt-cache 'case $2 in linux-image-virtual) echo "  Depends: linux-image-6.8.0-31-generic" ;; linux-modules-6*) ;; *) exit 100 ;; esac'
has dpkg-deb 'mkdir -p "$3/boot" && touch "$3/boot/vmlinuz-6.8.0"'
says 0 'kernel: linux-image-6.8.0-31-generic linux-modules-6.8.0-31-generic' 'fetch_kernel; echo "$GUEST_KERNEL"'
says 0 'a clone/target/guest-kernel' 'fetch_kernel; echo "$GUEST_KERNEL"'

host # the kernel's packages cannot be fetched
has id 'echo 0'
has apt-get 'exit 100'
has apt-cache 'echo "  Depends: linux-image-6.1.0-9-amd64"'
says 1 'kernel could not be fetched' 'fetch_kernel'

host # another distribution, whose kernel cannot be read
has uname 'echo 0.0.0-none'
says 1 'no kernel for the guests' 'fetch_kernel'

host # no disk space
has df 'printf "Filesystem 1024-blocks Used Available\n/dev/x 9 9 1048576\n"'
says 1 '3 GB of free disk space are needed below' 'need_disk "$HOME/not/there yet" 3'
says 0 '' 'need_disk "$HOME" 1'

host # no Rust and no network; nor does anybody know who we are
has curl 'exit 6'
has getent 'exit 2'
has sh 'cat >/dev/null'
says 1 'Rust is not installed, and rustup could not be fetched' 'ensure_rust'

host # a Rust that is too old, and one that does not run
has getent 'exit 2'
has cargo 'echo "cargo 1.63.0"'
says 1 'or newer is needed; cargo is 1.63.0' 'ensure_rust'
has cargo 'echo "no default toolchain" >&2; exit 1'
says 1 'cargo is there but does not run: no default toolchain' 'ensure_rust'

host # not this kind of machine
has uname 'case $1 in -s) echo Darwin ;; *) echo arm64 ;; esac'
says 1 'this is Darwin on arm64' 'need_x86_64'

host # cargo without rustc, and a build that fails
says 1 'rustc is missing' 'build_programs'
has rustc 'echo "host: x86_64-unknown-linux-gnu"'
has cargo 'echo "error: failed to download" >&2; exit 101'
says 1 'the build failed' 'build_programs'

[ "$failures" = 0 ] || exit 1
