//! All templates of a daemon: made once per key, loaded when first needed, evicted when they exceed a budget.
//!
//! ```text
//! get ─▶ loaded? ─▶ turn of this key ─▶ on disk? ──────────────────────▶ load ─▶ evict what was used longest ago
//!                                         └ no ─▶ room for a build ─▶ build ┘
//! ```
//! Whoever waits for one key holds up no other. A build runs programs of the image, which may take as long as they are
//! allowed to: few run at a time, and loading what is on disk waits for none of them.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use heyvm_jail::egress::Egress;
use nix::fcntl::Flock;
use tokio::sync::Semaphore;

use super::{
    blocking,
    launch::Host,
    record::Slots,
    template::{Build, Recipe, Template, build_with_a_good_clock},
    turns::Turns,
};
use crate::{Error, Progress};

mod files;

/// Builds at a time. One that hangs in its image's programs takes a place, and hardly any processor.
const BUILDS: usize = 4;
/// A template that was made again and does not resume either is not made a third time before this.
const DISCARDED_AGAIN: Duration = Duration::from_secs(600);

/// Memory for a few templates, on whatever host.
const LEAST_MEMORY: u64 = 1 << 30;
const DISK: u64 = 20 << 30;

/// What templates may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budgets {
    /// Bytes of memory of those that are loaded. Those that VMs run on count, and are never evicted.
    pub memory_bytes: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

impl Budgets {
    /// Those of a daemon whose configuration names none: a quarter of the host's memory, and 20 GiB of its disk.
    pub fn of_this_host() -> Self {
        Self { memory_bytes: (files::total_memory() / 4).max(LEAST_MEMORY), disk_bytes: DISK }
    }
}

/// All templates of a daemon.
pub struct Templates {
    dir: PathBuf,
    budgets: Budgets,
    loaded: Mutex<HashMap<String, Loaded>>,
    failures: Mutex<HashMap<String, Failure>>,
    discarded: Mutex<HashMap<String, Instant>>,
    turns: Turns,
    builds: Semaphore,
}

struct Loaded {
    template: Template,
    last_used: Instant,
}

/// A build that failed, for those who waited for it: they need not try the same in turn.
struct Failure {
    at: Instant,
    what: String,
    console_tail: Vec<String>,
}

impl Templates {
    /// Templates kept in `dir`.
    pub fn new(dir: PathBuf, budgets: Budgets) -> Self {
        Self {
            dir,
            budgets,
            loaded: Mutex::default(),
            failures: Mutex::default(),
            discarded: Mutex::default(),
            turns: Turns::default(),
            builds: Semaphore::new(BUILDS),
        }
    }

    /// The template of a recipe: loaded, from disk, or made.
    pub async fn get(
        &self,
        host: &Arc<Host>,
        egress: Option<&Arc<Egress>>,
        slots: &Slots,
        recipe: &Recipe,
        progress: &Progress,
    ) -> Result<Template, Error> {
        let key = recipe.key(host);
        let build = async |home: &Path| {
            progress("booting a template (once per image and size)", None, None);
            let slot = slots.take(&key);
            let built = build_with_a_good_clock(|| Build { host, egress, recipe, home, slot }).await;
            slots.give_back(slot, &key);
            built
        };
        self.get_or_build(&key, build).await
    }

    async fn get_or_build(
        &self,
        key: &str,
        build: impl AsyncFnOnce(&Path) -> Result<(), Error>,
    ) -> Result<Template, Error> {
        if let Some(found) = self.find_loaded(key) {
            return Ok(found);
        }
        let asked_at = Instant::now();
        let _one_per_key = self.turns.wait_for(&key.to_owned()).await;
        if let Some(found) = self.find_loaded(key) {
            return Ok(found);
        }
        if let Some(error) = self.failed_since(key, asked_at) {
            return Err(error);
        }
        let home = self.dir.join(key);
        let _across_daemons = self.lock(key).await?;
        let looked_for = home.clone();
        if !blocking(move || files::exists(&looked_for)).await? {
            let _room = self.builds.acquire().await.map_err(|_| Error::Unreachable("the daemon is ending".into()))?;
            if let Err(error) = build(&home).await {
                self.remember_failure(key, &error);
                return Err(error);
            }
        }
        let (name, from) = (key.to_owned(), home.clone());
        let template = blocking(move || Template::load(&name, &from)).await?;
        let loaded = Loaded { template: template.clone(), last_used: Instant::now() };
        self.lock_loaded().insert(key.to_owned(), loaded);
        self.evict_from_memory();
        self.evict_from_disk(home).await;
        Ok(template)
    }

    /// Removes a template that does not resume, so that the next `get` makes it again. `false` where that was tried a
    /// while ago already: the template is not to blame.
    pub async fn discard(&self, template: &Template) -> Result<bool, Error> {
        let _one_per_key = self.turns.wait_for(&template.key).await;
        {
            let mut loaded = self.lock_loaded();
            if loaded.get(&template.key).is_some_and(|other| !other.template.is_same(template)) {
                // It was made again meanwhile.
                return Ok(true);
            }
            let mut discarded = self.discarded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            discarded.retain(|_, at| at.elapsed() < DISCARDED_AGAIN);
            if discarded.contains_key(&template.key) {
                return Ok(false);
            }
            discarded.insert(template.key.clone(), Instant::now());
            loaded.remove(&template.key);
        }
        let _across_daemons = self.lock(&template.key).await?;
        let home = self.dir.join(&template.key);
        blocking(move || files::remove(&home)).await.map(|()| true)
    }

    /// Waits until no other daemon works on this key.
    async fn lock(&self, key: &str) -> Result<Flock<File>, Error> {
        let (dir, key) = (self.dir.clone(), key.to_owned());
        blocking(move || files::lock(&dir, &key)).await
    }

    /// Removes what a daemon that was killed while it made a template has left, its QEMU first. Blocks.
    pub fn clean_up(&self) {
        files::clean_up(&self.dir);
    }

    fn find_loaded(&self, key: &str) -> Option<Template> {
        let mut loaded = self.lock_loaded();
        let found = loaded.get_mut(key)?;
        found.last_used = Instant::now();
        Some(found.template.clone())
    }

    fn failed_since(&self, key: &str, asked_at: Instant) -> Option<Error> {
        let failures = self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let failure = failures.get(key).filter(|failure| failure.at >= asked_at)?;
        Some(Error::Boot { what: failure.what.clone(), console_tail: failure.console_tail.clone() })
    }

    fn remember_failure(&self, key: &str, error: &Error) {
        let (what, console_tail) = match error {
            Error::Boot { what, console_tail } => (what.clone(), console_tail.clone()),
            other => (format!("has no template: {other}"), Vec::new()),
        };
        let mut failures = self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        failures.insert(key.to_owned(), Failure { at: Instant::now(), what, console_tail });
        // Those who wait now have waited no longer than a build takes; older failures matter to nobody.
        failures.retain(|_, failure| failure.at.elapsed() < super::template::BUILD_DEADLINE);
    }

    /// Drops what was used longest ago and no VM runs on, until the rest is within its budget.
    fn evict_from_memory(&self) {
        let mut loaded = self.lock_loaded();
        let mut total: u64 = loaded.values().map(|loaded| loaded.template.bytes()).sum();
        while total > self.budgets.memory_bytes {
            let unused = loaded.values().filter(|loaded| !loaded.template.is_in_use());
            let Some(oldest) = unused.min_by_key(|loaded| loaded.last_used) else { return };
            total = total.saturating_sub(oldest.template.bytes());
            let key = oldest.template.key.clone();
            loaded.remove(&key);
        }
    }

    /// Removes from disk what was loaded longest ago and is not loaded now; `used` is the newest.
    async fn evict_from_disk(&self, used: PathBuf) {
        let kept: Vec<String> = self.lock_loaded().keys().cloned().collect();
        let (dir, budget) = (self.dir.clone(), self.budgets.disk_bytes);
        let evicted = blocking(move || {
            files::mark_used(&used)
                .and_then(|()| files::evict(&dir, &kept, budget))
                .map_err(Error::io("looking through", &dir))
        });
        if let Err(error) = evicted.await {
            tracing::warn!(%error, "templates could not be evicted");
        }
    }

    fn lock_loaded(&self) -> MutexGuard<'_, HashMap<String, Loaded>> {
        self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn templates(dir: &Path, memory_mib: u64, disk_mib: u64) -> Arc<Templates> {
        let budgets = Budgets { memory_bytes: memory_mib * MIB, disk_bytes: disk_mib * MIB };
        Arc::new(Templates::new(dir.to_owned(), budgets))
    }

    /// A template of a mebibyte.
    fn write(home: &Path) -> Result<(), Error> {
        fs::create_dir_all(home).unwrap();
        fs::write(home.join("memory"), vec![7; MIB as usize]).unwrap();
        fs::write(home.join("state"), "state").unwrap();
        Ok(())
    }

    async fn get(templates: &Templates, key: &str) -> Template {
        templates.get_or_build(key, async |home| write(home)).await.unwrap()
    }

    fn on_disk(dir: &Path) -> Vec<String> {
        let all = fs::read_dir(dir).unwrap().flatten().filter(|entry| entry.path().join("state").exists());
        let mut names: Vec<String> = all.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn in_memory(templates: &Templates) -> Vec<String> {
        let mut keys: Vec<String> = templates.lock_loaded().keys().cloned().collect();
        keys.sort();
        keys
    }

    #[tokio::test]
    async fn key_is_built_once_however_many_want_it() {
        let dir = tempfile::tempdir().unwrap();
        let templates = templates(dir.path(), 64, 64);
        let builds = AtomicUsize::new(0);
        let one = || {
            templates.get_or_build("a", async |home| {
                builds.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(50)).await;
                write(home)
            })
        };
        let all = futures::future::join_all((0..8).map(|_| one())).await;
        assert!(all.iter().all(|template| template.as_ref().unwrap().is_same(all[0].as_ref().unwrap())));
        assert_eq!(builds.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn image_that_hangs_holds_up_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let templates = templates(dir.path(), 64, 64);
        write(&dir.path().join("kept")).unwrap();
        let hanging: Vec<_> = (0..BUILDS)
            .map(|number| {
                let templates = Arc::clone(&templates);
                tokio::spawn(async move {
                    templates.get_or_build(&format!("hangs-{number}"), async |_| std::future::pending().await).await
                })
            })
            .collect();
        while templates.builds.available_permits() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Every place for a build is taken: what is on disk is loaded all the same.
        get(&templates, "kept").await;
        hanging[0].abort();
        get(&templates, "new").await;
    }

    #[tokio::test]
    async fn those_who_waited_for_a_failed_build_get_its_error() {
        let dir = tempfile::tempdir().unwrap();
        let templates = templates(dir.path(), 64, 64);
        let builds = AtomicUsize::new(0);
        let fails = || {
            templates.get_or_build("a", async |_| {
                builds.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(Error::Boot { what: "ended while it booted".into(), console_tail: vec!["why".into()] })
            })
        };
        for outcome in futures::future::join_all((0..4).map(|_| fails())).await {
            let Err(Error::Boot { what, console_tail }) = outcome else { panic!("no boot failure") };
            assert_eq!((what.as_str(), console_tail), ("ended while it booted", vec!["why".to_owned()]));
        }
        assert_eq!(builds.load(Ordering::Relaxed), 1);
        get(&templates, "a").await;
    }

    #[tokio::test]
    async fn memory_is_given_back_least_recently_used_first_and_never_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let templates = templates(dir.path(), 2, 64);
        let _a_vm_runs_on_it = get(&templates, "a").await;
        for key in ["b", "c", "b", "d"] {
            get(&templates, key).await;
        }
        assert_eq!(in_memory(&templates), ["a", "d"], "the one that was used last, and the one in use");
        get(&templates, "b").await;
        assert_eq!(in_memory(&templates), ["a", "b"]);
        assert_eq!(on_disk(dir.path()), ["a", "b", "c", "d"], "what is on disk stays there");
    }

    #[tokio::test]
    async fn disk_is_given_back_least_recently_used_first_and_never_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let templates = templates(dir.path(), 2, 4);
        let held = get(&templates, "a").await;
        for key in ["b", "c", "d"] {
            get(&templates, key).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(on_disk(dir.path()), ["a", "c", "d"], "b was used longest ago and is not loaded");
        // A template that is held resumes VMs also when its files are gone.
        heyvm_trees::remove(&dir.path().join("a")).unwrap();
        held.descriptors(Path::new("/dev/null")).unwrap();
    }

    #[tokio::test]
    async fn discarded_template_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let templates = templates(dir.path(), 64, 64);
        let (first, also_first) = (get(&templates, "a").await, get(&templates, "a").await);
        assert!(templates.discard(&first).await.unwrap());
        assert!(on_disk(dir.path()).is_empty());
        let second = get(&templates, "a").await;
        assert!(!second.is_same(&first));
        assert!(templates.discard(&also_first).await.unwrap());
        assert_eq!(on_disk(dir.path()), ["a"], "a second complaint about the first is out of date");
        assert!(!templates.discard(&second).await.unwrap(), "the template is not to blame");
    }
}
