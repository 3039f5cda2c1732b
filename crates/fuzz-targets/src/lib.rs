//! What cargo-fuzz calls with bytes of its own making, and the tests with `seeds/` and what chance makes of them: where
//! heyvm reads what others have written. Each panics when something was done that no bytes may bring about.
//!
//! - [`agent_hello`], [`agent_messages`] (`agent`): what a guest and its host say to each other.
//! - [`archive_unpacker`] (`archive`): tar files that somebody uploads.
//! - [`mount_requests`] (`mounts`): what a guest's kernel asks of a directory of the host.
//! - `outside`: a directory beside which nothing may change.
#![forbid(unsafe_code)]

mod agent;
mod archive;
mod mounts;
mod outside;

pub use agent::{agent_hello, agent_messages};
pub use archive::archive_unpacker;
pub use mounts::mount_requests;

#[cfg(test)]
mod tests {
    use std::{fs, panic::catch_unwind, path::Path};

    use rand::{Rng, SeedableRng, rngs::StdRng};

    /// How many bytes are made of each seed.
    const MADE_OF_EACH: u64 = 100;

    /// One to eight changes: a byte, a bit, a piece that is lost, doubled or moved here from another place.
    fn changed(seed: &[u8], random: &mut StdRng) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..random.random_range(1..=8) {
            let at = random.random_range(0..=bytes.len());
            let to = random.random_range(at..=bytes.len().min(at + 64));
            match random.random_range(0..5) {
                0 if at < bytes.len() => bytes[at] = random.random(),
                1 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
                2 => drop(bytes.drain(at..to)),
                3 => bytes.splice(at..at, seed[..(to - at).min(seed.len())].to_vec()).for_each(drop),
                _ => bytes.splice(at..at, vec![random.random(); to - at]).for_each(drop),
            }
        }
        bytes
    }

    fn try_all(name: &str, target: fn(&[u8])) {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
        let seeds: Vec<_> = fs::read_dir(seeds).unwrap().map(|seed| seed.unwrap().path()).collect();
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for path in seeds {
            let seed = fs::read(&path).unwrap();
            target(&seed);
            for number in 0..MADE_OF_EACH {
                let bytes = changed(&seed, &mut StdRng::seed_from_u64(number));
                if catch_unwind(|| target(&bytes)).is_err() {
                    let kept = std::env::temp_dir().join(format!("{name}-{number}"));
                    fs::write(&kept, bytes).unwrap();
                    panic!("change {number} of {}, which is now in {}", path.display(), kept.display());
                }
            }
        }
    }

    #[test]
    fn hellos() {
        try_all("agent_hello", super::agent_hello);
    }

    #[test]
    fn messages() {
        try_all("agent_messages", super::agent_messages);
    }

    #[test]
    fn archives() {
        try_all("archive_unpacker", super::archive_unpacker);
    }

    #[test]
    fn mounts() {
        try_all("mount_requests", super::mount_requests);
    }
}
