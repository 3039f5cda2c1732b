# shellcheck shell=bash
# What quickstart, test and bench need of the host: packages, Rust, a guest kernel, the two programs. To be sourced.
#
# Installs only what is missing, never removes a package, and says what it does. Everything it fetches or builds
# lies in the project's own target directory.

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # a user's PATH often lacks what mkfs.ext4, nft and modprobe are in

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
fail() { # SENTENCE [WHAT TO DO]...
    printf 'error: %s\n' "$1" >&2
    shift
    local hint
    for hint in "$@"; do printf '  hint: %s\n' "$hint" >&2; done
    exit 1
}

# --- packages -------------------------------------------------------------------------------------------------------

# What must be there (a command, a file with a leading /, or nss:MODULE of the resolver), the set it belongs to, and the package that has it:
# Debian and Ubuntu, Fedora, Arch, openSUSE, Alpine. `-` where a distribution has no such package.
packages_table() {
    cat <<'TABLE'
qemu-system-x86_64                  run    qemu-system-x86     qemu-system-x86-core  qemu-system-x86  qemu-x86            qemu-system-x86_64
mkfs.erofs                          run    erofs-utils         erofs-utils           erofs-utils      erofs-utils         erofs-utils
mkfs.ext4                           run    e2fsprogs           e2fsprogs             e2fsprogs        e2fsprogs           e2fsprogs
mmdebstrap                          run    mmdebstrap          mmdebstrap            -                mmdebstrap          mmdebstrap
pasta                               run    passt               passt                 passt            passt               passt
nft                                 run    nftables            nftables              nftables         nftables            nftables
ip                                  run    iproute2            iproute               iproute2         iproute2            iproute2
newuidmap                           run    uidmap              shadow-utils          shadow           shadow              shadow-uidmap
modprobe                            run    kmod                kmod                  kmod             kmod                kmod
curl                                run    curl                curl                  curl             curl                curl
nss:myhostname                      run    libnss-myhostname   systemd-libs          systemd          nss-myhostname      -
/etc/ssl/certs                      run    ca-certificates     ca-certificates       ca-certificates  ca-certificates     ca-certificates
xz                                  run    xz-utils            xz                    xz               xz                  xz
zstd                                run    zstd                zstd                  zstd             zstd                zstd
gcc                                 build  gcc                 gcc                   gcc              gcc                 gcc
/usr/include/stdio.h                build  libc6-dev           glibc-devel           glibc            glibc-devel         musl-dev
libc.a                              build  libc6-dev           glibc-static          glibc            glibc-devel-static  musl-dev
protoc                              build  protobuf-compiler   protobuf-compiler     protobuf         protobuf-devel      protoc
openssl                             test   openssl             openssl               openssl          openssl             openssl
jq                                  test   jq                  jq                    jq               jq                  jq
/usr/bin/python3                    test   python3             python3               python           python3             python3
python:requests                     test   python3-requests    python3-requests      python-requests  python3-requests    py3-requests
python:ensurepip                    test   python3-venv        python3               python           python3             python3
docker-registry                     test   docker-registry     docker-distribution   -                distribution-registry docker-registry
skopeo                              test   skopeo              skopeo                skopeo           skopeo              skopeo
umoci                               test   umoci               umoci                 umoci            umoci               umoci
initdb                              test   postgresql          postgresql-server     postgresql       postgresql-server   postgresql
shellcheck                          test   shellcheck          ShellCheck            shellcheck       ShellCheck          shellcheck
pebble                              test   pebble              -                     -                -                   -
chromium                            test   chromium            chromium              chromium         chromium            chromium
chromedriver                        test   chromium-driver     chromedriver          chromium         chromedriver        chromium-chromedriver
podman                              bench  podman              podman                podman           podman              podman
runc                                bench  runc                runc                  runc             runc                runc
nginx                               edge   nginx               nginx                 nginx            nginx               nginx
wrk                                 edge   wrk                 -                     wrk              wrk                 wrk
TABLE
}

host_has() { # COMMAND, FILE, nss:MODULE, python:MODULE or libc.a
    case $1 in
    /*) [ -e "$1" ] ;;
    python:*) /usr/bin/python3 -c "import ${1#python:}" 2>/dev/null ;;
    nss:*) compgen -G "/lib*/libnss_${1#nss:}.so.2" >/dev/null || compgen -G "/usr/lib*/libnss_${1#nss:}.so.2" >/dev/null ||
        compgen -G "/lib/*/libnss_${1#nss:}.so.2" >/dev/null || compgen -G "/usr/lib/*/libnss_${1#nss:}.so.2" >/dev/null ;;
    initdb) command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null ;;
    libc.a) [ "$(gcc -print-file-name=libc.a 2>/dev/null)" != libc.a ] && command -v gcc >/dev/null ;;
    *) command -v "$1" >/dev/null ;;
    esac
}

package_manager() {
    local name
    for name in apt-get dnf pacman zypper apk; do
        if command -v "$name" >/dev/null; then
            echo "$name"
            return
        fi
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# Prints "WHAT PACKAGE" for all that the sets need and the host lacks.
missing_packages() { # SETS…
    local manager=$1 what set apt dnf pacman zypper apk package
    shift
    while read -r what set apt dnf pacman zypper apk; do
        case " $* " in *" $set "*) ;; *) continue ;; esac
        host_has "$what" && continue
        case $manager in
        apt-get) package=$apt ;;
        dnf) package=$dnf ;;
        pacman) package=$pacman ;;
        zypper) package=$zypper ;;
        apk) package=$apk ;;
        *) package=$what ;;
        esac
        echo "$what $package"
    done < <(packages_table)
}

install_packages() { # SETS…: run, build, test, bench, edge (what the edge is measured with)
    local manager missing packages
    manager=$(package_manager)
    missing=$(missing_packages "${manager:-none}" "$@")
    [ -n "$missing" ] || return 0
    packages=$(awk '$2 != "-" && !seen[$2]++ {print $2}' <<<"$missing")
    [ -n "$manager" ] || fail "this host lacks $(awk '{printf "%s ", $1}' <<<"$missing")and has no package manager known here (apt, dnf, pacman, zypper, apk)" \
        "install the programs named above by hand, then run this again"
    local nowhere
    nowhere=$(awk '$2 == "-" {printf "%s ", $1}' <<<"$missing")
    [ -z "$nowhere" ] || note "not packaged by this distribution, going on without: $nowhere"
    [ -n "$packages" ] || return 0
    if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
        fail "these packages must be installed, and you are neither root nor is there sudo: $(tr '\n' ' ' <<<"$packages")" \
            "as root: $manager install $(tr '\n' ' ' <<<"$packages")"
    fi
    say "Installing $(tr '\n' ' ' <<<"$packages")(by $manager)"
    need_disk / 1
    # shellcheck disable=SC2086 # one word per package
    case $manager in
    apt-get) apt_install $packages ;;
    dnf) as_root dnf install -y $packages ;;
    pacman) as_root pacman -Sy --needed --noconfirm $packages ;;
    zypper) as_root zypper --non-interactive install --no-recommends $packages ;;
    apk) as_root apk add $packages ;;
    esac || fail "$manager could not install $(tr '\n' ' ' <<<"$packages")" \
        "its own message stands above; without a network connection nothing can be installed"
    missing=$(missing_packages "$manager" "$@" | awk '$2 != "-" {printf "%s (package %s) ", $1, $2}')
    [ -z "$missing" ] || fail "still missing after the installation: $missing"
}

APT_OPTIONS=(-y -q -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 --no-install-recommends)

apt_lists() {
    [ -z "${APT_LISTS_FRESH:-}" ] || return 0
    as_root apt-get update -q -o DPkg::Lock::Timeout=300 >/dev/null || note "the package lists could not be refreshed (no network?); trying with those at hand"
    APT_LISTS_FRESH=1
}

# Never removes anything. The one version conflict we know: a qemu-utils from backports, which the distribution's
# qemu-system-x86 cannot stand beside; apt would remove it silently.
apt_install() { # PACKAGES…
    local log=$PROJECT/target/apt.log ours theirs
    mkdir -p "$PROJECT/target"
    apt_lists
    if as_root env DEBIAN_FRONTEND=noninteractive apt-get install "${APT_OPTIONS[@]}" --no-remove "$@" >"$log" 2>&1; then
        return 0
    fi
    theirs=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true)
    ours=$(apt-cache policy qemu-system-x86 | awk '/Candidate:/ {print $2}')
    if grep -q 'remove is disabled\|qemu-utils' "$log" && [ -n "$theirs" ] && [ -n "$ours" ] && [ "$theirs" != "$ours" ]; then
        say "qemu-utils $theirs conflicts with this distribution's qemu-system-x86 $ours"
        note "qemu-utils is brought to $ours, rather than removed; heyvm itself does not use it"
        if as_root env DEBIAN_FRONTEND=noninteractive apt-get install "${APT_OPTIONS[@]}" --no-remove --allow-downgrades \
            "$@" "qemu-utils=$ours" >"$log" 2>&1; then
            return 0
        fi
    fi
    tail -n 20 "$log" >&2
    return 1
}

# --- disk, Rust, programs -------------------------------------------------------------------------------------------

need_disk() { # DIRECTORY GIGABYTES
    local directory=$1 free
    while [ ! -d "$directory" ]; do directory=$(dirname "$directory"); done
    free=$(df -Pk "$directory" | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free" -ge "$2" ] || fail "$2 GB of free disk space are needed below $directory; there are $free" \
        "free some space, or put the project on a larger disk"
}

need_x86_64() {
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "heyvm runs on Linux on x86-64; this is $(uname -s) on $(uname -m)"
}

# Finds cargo, also where HOME is not the user's own; installs it by rustup where there is none.
ensure_rust() {
    local wanted home
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$PROJECT/Cargo.toml")
    # Fails for a user whom no list of users knows, as in containers.
    home=$({ getent passwd "$(id -u)" 2>/dev/null || true; } | cut -d: -f6)
    for home in "$HOME" "$home"; do
        if [ -x "$home/.cargo/bin/cargo" ]; then
            PATH=$home/.cargo/bin:$PATH
            [ ! -d "$home/.rustup" ] || export RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
            export CARGO_HOME=${CARGO_HOME:-$home/.cargo}
            break
        fi
    done
    if ! command -v cargo >/dev/null; then
        say "Installing Rust by rustup (the distributions' own Rust is mostly older than $wanted)"
        (
            set -o pipefail
            curl --proto '=https' --tlsv1.2 -sSf --max-time 600 https://sh.rustup.rs | sh -s -- -y -q --profile minimal --no-modify-path >&2
        ) ||
            fail "Rust is not installed, and rustup could not be fetched" \
                "install Rust $wanted or newer from https://rustup.rs and run this again; Debian's package rustc is too old"
        PATH=$HOME/.cargo/bin:$PATH
    fi
    local have
    have=$(cargo --version 2>/dev/null | awk '{print $2}') || true
    [ -n "$have" ] || fail "cargo is there but does not run: $(cargo --version 2>&1 | head -n 1)"
    [ "$(printf '%s\n%s\n' "$wanted" "$have" | sort -V | head -n 1)" = "$wanted" ] ||
        fail "Rust $wanted or newer is needed; cargo is $have" "rustup update stable, or install Rust from https://rustup.rs"
}

# Builds target/release/heyvm and, static, target/HOST/release/heyvm-agent. The agent is always built with an explicit
# target: without one, +crt-static would reach the procedural macros, too, and break them.
# shellcheck disable=SC2034 # AGENT and HEYVM are for the script that sources this
build_programs() {
    local host
    need_disk "$PROJECT/target" 4
    command -v rustc >/dev/null || fail "cargo is there, but rustc is missing" "install Rust as a whole, from https://rustup.rs"
    host=$(rustc -vV | sed -n 's/^host: //p')
    AGENT=$PROJECT/target/$host/release/heyvm-agent
    HEYVM=$PROJECT/target/release/heyvm
    (
        cd "$PROJECT" || exit 1
        RUSTFLAGS='-C target-feature=+crt-static' cargo build --locked --release --target "$host" -p heyvm-agent &&
            cargo build --locked --release -p heyvm
    ) || fail "the build failed; cargo's message stands above" "without a network connection the first build cannot fetch its crates"
}

# Builds the public SDK's own tests, unmodified, to target/sdk/tests/NAME. They are a client that we did not write.
build_sdk_tests() {
    local manifest target=$PROJECT/target/sdk
    manifest=$(cd "$PROJECT/tests/sdk" && cargo metadata --locked --format-version 1 --filter-platform "$(rustc -vV | sed -n 's/^host: //p')" |
        jq -r '.packages[] | select(.name == "heyo-sdk") | .manifest_path') || fail "the SDK whose tests are run cannot be fetched" "this needs a network connection once"
    mkdir -p "$target/tests"
    CARGO_PROFILE_TEST_DEBUG=0 CARGO_PROFILE_DEV_DEBUG=0 cargo test --locked --no-default-features --manifest-path "$manifest" \
        --target-dir "$target" --test smoke --test shell_protocol --test kvm_e2e --no-run --message-format json |
        jq -r 'select(.executable != null) | "\(.target.name) \(.executable)"' |
        while read -r name executable; do ln -sf "$executable" "$target/tests/$name"; done
    [ -e "$target/tests/smoke" ] || fail "the SDK's tests could not be built" "cargo's message stands above"
}

# Puts schemathesis and all it needs, in the versions of tests/schema/requirements.txt, into target/schemathesis.
# shellcheck disable=SC2034 # SCHEMATHESIS is for the script that sources this
install_schemathesis() {
    local wanted=$PROJECT/tests/schema/requirements.txt target=$PROJECT/target/schemathesis
    SCHEMATHESIS=$target/bin/schemathesis
    ! cmp -s "$wanted" "$target/requirements.txt" || return 0
    say "Installing schemathesis"
    rm -rf "$target"
    {
        /usr/bin/python3 -m venv "$target" &&
            "$target/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r "$wanted" >&2
    } || fail "schemathesis could not be installed" "pip's message stands above; this needs a network connection once"
    cp "$wanted" "$target/"
}

# --- the guest's kernel -----------------------------------------------------------------------------------------------

# Unpacks a distribution's kernel package to target/guest-kernel (boot/vmlinuz-*, lib/modules/*), once.
fetch_kernel() {
    GUEST_KERNEL=$PROJECT/target/guest-kernel
    [ ! -e "$GUEST_KERNEL/.complete" ] || return 0
    rm -rf "$GUEST_KERNEL"
    mkdir -p "$GUEST_KERNEL"
    if command -v apt-get >/dev/null; then
        kernel_from_apt
    else
        kernel_from_host
    fi
    compgen -G "$GUEST_KERNEL/boot/vmlinuz-*" >/dev/null || fail "no guest kernel in $GUEST_KERNEL" "unpack any Linux kernel package of 5.15 or newer there"
    touch "$GUEST_KERNEL/.complete"
}

kernel_from_apt() {
    local meta image packages version
    apt_lists
    for meta in linux-image-cloud-amd64 linux-image-virtual linux-image-amd64; do
        # apt-cache fails for a name that it does not know, as others' are.
        image=$({ apt-cache depends "$meta" 2>/dev/null || true; } | awk '/Depends: linux-image-[0-9]/ {print $2; exit}')
        [ -z "$image" ] || break
    done
    [ -n "$image" ] || fail "apt knows no kernel package (linux-image-cloud-amd64, linux-image-virtual)" \
        "run apt-get update with a network connection and try again"
    version=${image#linux-image-}
    packages=$image
    # Ubuntu keeps a kernel's modules in packages of their own.
    for extra in "linux-modules-$version" "linux-modules-extra-$version"; do
        if apt-cache show "$extra" >/dev/null 2>&1; then packages="$packages $extra"; fi
    done
    say "Fetching the guest's kernel: $packages"
    (
        mkdir -p "$PROJECT/target/guest-kernel.deb" && cd "$PROJECT/target/guest-kernel.deb" || exit 1
        # shellcheck disable=SC2086 # one word per package
        apt-get download -q -o APT::Sandbox::User=root $packages >/dev/null || exit 1
        for deb in *.deb; do dpkg-deb -x "$deb" "$GUEST_KERNEL" || exit 1; done
    ) || fail "the guest's kernel could not be fetched" "this needs a network connection once"
    rm -rf "$PROJECT/target/guest-kernel.deb"
    # Where /lib is a link to /usr/lib, newer packages have their modules there.
    if [ ! -d "$GUEST_KERNEL/lib/modules" ] && [ -d "$GUEST_KERNEL/usr/lib/modules" ]; then
        ln -s usr/lib "$GUEST_KERNEL/lib"
    fi
}

kernel_from_host() {
    local version image
    version=$(uname -r)
    for image in "/boot/vmlinuz-$version" "/lib/modules/$version/vmlinuz" /boot/vmlinuz-linux; do
        [ -r "$image" ] || continue
        say "Using this host's own kernel $version in the guests"
        mkdir -p "$GUEST_KERNEL/boot" "$GUEST_KERNEL/lib/modules"
        cp "$image" "$GUEST_KERNEL/boot/vmlinuz-$version"
        cp -a "/lib/modules/$version" "$GUEST_KERNEL/lib/modules/"
        return 0
    done
    fail "no kernel for the guests: /boot/vmlinuz-$version cannot be read" \
        "unpack a Linux kernel package to $GUEST_KERNEL (boot/vmlinuz-*, lib/modules/*) and touch $GUEST_KERNEL/.complete"
}
