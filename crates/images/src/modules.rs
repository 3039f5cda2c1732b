//! Modules of a guest's kernel: which ones, in which order they are loaded.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read},
    path::Path,
};

use crate::Error;

/// Drivers and file systems that a guest does not work without, by their file's name.
const NEEDED: &str = "virtio_mmio virtio_blk virtio_net virtio_console virtio-rng erofs overlay ext4 fuse";

/// Modules that programs in a guest expect (Docker, VPNs, `ss`, FUSE file systems), as far as the kernel has them. All are
/// loaded at boot: images have no modules of this kernel that a guest could load later.
const EXPECTED: &str = "
    tun loop bridge br_netfilter veth dummy macvlan ipvlan vxlan binfmt_misc
    inet_diag tcp_diag udp_diag raw_diag unix_diag netlink_diag af_packet_diag
    nf_tables nft_chain_nat nft_compat nft_connlimit nft_ct nft_fib_inet nft_fib_ipv4 nft_fib_ipv6 nft_hash nft_limit
    nft_log nft_masq nft_nat nft_numgen nft_objref nft_quota nft_redir nft_reject_inet nft_reject_ipv4 nft_reject_ipv6
    nft_socket nft_tproxy nf_conntrack_netlink nf_log_syslog
    xt_addrtype xt_comment xt_connmark xt_conntrack xt_limit xt_LOG xt_mark xt_MASQUERADE xt_multiport xt_nat xt_owner
    xt_physdev xt_REDIRECT xt_set xt_state xt_statistic xt_TCPMSS xt_tcpudp xt_u32 ipt_REJECT ip6t_REJECT";

/// Files of the wanted modules and all they need, in load order. Format of modules.dep: `file: its needs, nearest first`.
pub fn closure(modules: &Path) -> Result<Vec<String>, Error> {
    let table = modules.join("modules.dep");
    if !table.exists() {
        run_depmod(modules)?;
    }
    let text = fs::read_to_string(&table).map_err(Error::io("reading", &table))?;
    let builtin = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
    let mut files = Vec::new();
    let mut seen = BTreeSet::new();
    let needed = NEEDED.split_whitespace().map(|name| (name, true));
    for (wanted, needed) in needed.chain(EXPECTED.split_whitespace().map(|name| (name, false))) {
        let same = |path: &str| normal(path) == wanted.replace('-', "_");
        let Some(line) = text.lines().find(|line| line.split(':').next().is_some_and(same)) else {
            if !needed || builtin.lines().any(same) {
                continue;
            }
            return Err(Error::invalid(format!("the kernel has no {wanted}, built in or as a module")));
        };
        let (file, needs) = line.split_once(':').unwrap_or((line, ""));
        let ordered = needs.split_whitespace().rev().chain([file]);
        files.extend(ordered.filter(|file| seen.insert((*file).to_owned())).map(str::to_owned));
    }
    Ok(files)
}

/// A package that was unpacked, not installed, comes without the table.
fn run_depmod(modules: &Path) -> Result<(), Error> {
    let version = modules.file_name().unwrap_or_default();
    // …/lib/modules/VERSION
    let base = modules.ancestors().nth(3).unwrap_or(Path::new("/"));
    let status = std::process::Command::new("depmod").arg("-b").arg(base).arg(version).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Error::HostNotReady {
            what: "depmod does not work here".into(),
            hint: "install the package kmod".into(),
        }),
    }
}

/// `kernel/drivers/block/virtio_blk.ko.xz` → `virtio_blk`.
fn normal(path: &str) -> String {
    plain_name(path).trim_end_matches(".ko").replace('-', "_")
}

/// `kernel/drivers/block/virtio_blk.ko.xz` → `virtio_blk.ko`.
pub fn plain_name(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split(".ko").next().unwrap_or(name).to_owned() + ".ko"
}

/// Reads a module, whatever the distribution packs it with.
pub fn decompressed(file: &Path) -> Result<Vec<u8>, Error> {
    let io = Error::io("reading the module", file);
    let read = || -> io::Result<Vec<u8>> {
        let reader = fs::File::open(file)?;
        let mut bytes = Vec::new();
        match file.extension().and_then(|e| e.to_str()) {
            Some("xz") => xz2::read::XzDecoder::new(reader).read_to_end(&mut bytes)?,
            Some("zst") => zstd::Decoder::new(reader)?.read_to_end(&mut bytes)?,
            Some("gz") => flate2::read::GzDecoder::new(reader).read_to_end(&mut bytes)?,
            _ => io::BufReader::new(reader).read_to_end(&mut bytes)?,
        };
        Ok(bytes)
    };
    read().map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(table: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.dep"), table).unwrap();
        dir
    }

    fn needed() -> String {
        NEEDED.split_whitespace().map(|name| format!("kernel/{name}.ko.xz:\n")).collect()
    }

    #[test]
    fn expected_modules_come_with_what_they_need_where_the_kernel_has_them() {
        let bridge = "kernel/net/bridge.ko.xz: kernel/net/stp.ko.xz kernel/net/llc.ko.xz\n";
        let rest = "kernel/net/stp.ko.xz: kernel/net/llc.ko.xz\nkernel/net/llc.ko.xz:\nkernel/sound/snd.ko.xz:\n";
        let dir = tree(&format!("{}{bridge}{rest}", needed()));
        let order: Vec<String> = closure(dir.path()).unwrap().iter().map(|file| normal(file)).collect();
        assert_eq!(order[NEEDED.split_whitespace().count()..], ["llc", "stp", "bridge"]);
    }

    #[test]
    fn a_kernel_without_a_needed_module_is_refused() {
        let dir = tree(&needed().replace("kernel/ext4.ko.xz:\n", ""));
        assert!(matches!(closure(dir.path()), Err(Error::Invalid(message)) if message.contains("ext4")));
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        closure(dir.path()).unwrap();
    }
}
