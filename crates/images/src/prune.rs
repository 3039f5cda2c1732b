//! Rules for removing images, and what was removed. An image in use is never removed, nor one without a registry to
//! fetch it from again, unless that is asked for.

use std::collections::HashSet;

use crate::{Error, Image, store::blocking, work::Work};

/// Which images go.
#[derive(Debug, Clone)]
pub struct Prune {
    /// Digests of images that sandboxes need.
    pub used: HashSet<String>,
    /// Names that stay: the default image and what stands in for it.
    pub kept: Vec<String>,
    /// How far to go.
    pub extent: Extent,
}

/// How many of the unused images go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Those without a name; then, least recently used first, those from registries until the rest has so many bytes.
    Budget(u64),
    /// All that a registry can give again.
    Unused,
    /// All, imported ones too.
    All,
}

impl Prune {
    /// Whether an image goes while all images together have `held` bytes.
    pub(crate) fn gives_up(&self, image: &Image, names: &[String], held: u64) -> bool {
        if self.used.contains(&image.digest) {
            return false;
        }
        if names.is_empty() {
            return true;
        }
        let can_come_again = image.source == "registry";
        !names.iter().any(|name| self.kept.contains(name))
            && match self.extent {
                Extent::Budget(budget) => can_come_again && held > budget,
                Extent::Unused => can_come_again,
                Extent::All => true,
            }
    }
}

/// Images that are no longer in the store.
#[derive(Default)]
pub struct Removed {
    /// Their names; the digest of one that had none.
    pub names: Vec<String>,
    /// Their bytes.
    pub bytes: u64,
    pub(crate) work: Option<Work>,
}

impl Removed {
    /// Frees the disk space.
    pub async fn delete(&mut self) -> Result<(), Error> {
        let work = self.work.take();
        blocking(move || {
            if let Some(work) = work {
                work.remove();
            }
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(digest: &str, source: &str) -> Image {
        Image {
            name: digest.into(),
            digest: digest.into(),
            root_digest: None,
            rootfs: "/nowhere".into(),
            size_bytes: 10,
            config: Default::default(),
            created_at: 0,
            source: source.into(),
            private: false,
            recipe: None,
        }
    }

    #[test]
    fn an_image_in_use_or_kept_stays_at_any_extent() {
        for extent in [Extent::Budget(0), Extent::Unused, Extent::All] {
            let rule = Prune { used: ["used".to_owned()].into(), kept: vec!["default:1".into()], extent };
            assert!(!rule.gives_up(&image("used", "registry"), &["a:1".into()], 100), "{extent:?}");
            assert!(!rule.gives_up(&image("used", "registry"), &[], 100), "{extent:?}");
            assert!(!rule.gives_up(&image("x", "registry"), &["default:1".into()], 100), "{extent:?}");
            assert!(rule.gives_up(&image("x", "import"), &[], 0), "{extent:?}: nothing names it");
        }
    }

    #[test]
    fn what_no_registry_gives_again_goes_only_when_all_do() {
        let named = ["a:1".to_owned()];
        let gives_up = |extent, source, held| {
            Prune { used: HashSet::new(), kept: Vec::new(), extent }.gives_up(&image("x", source), &named, held)
        };
        assert!(!gives_up(Extent::Budget(50), "registry", 50) && gives_up(Extent::Budget(50), "registry", 51));
        assert!(!gives_up(Extent::Budget(50), "import", 51) && !gives_up(Extent::Unused, "import", 51));
        assert!(gives_up(Extent::Unused, "registry", 1) && gives_up(Extent::All, "import", 1));
    }
}
