//! The warm pool: clones restored ahead, connected, warmed up and halted, so that a create has little left to do.
//! Under TCG most of a clone's first moments go into translating code; a clone from the pool has that behind it.
//!
//! A pooled VM lives in `sandboxes/reserve-…`, an id no sandbox has; a daemon that starts removes what an earlier one
//! left. Nothing of a sandbox is in it: entropy, clock, names and address come when it is claimed.
//!
//! This module decides what the pool should hold; [`super::pool_keeper`] does it. Two VMs of each kind are made soon after
//! a create, the others when creates have paused, as far as memory allows. Kinds share the pool by how often they were
//! asked for lately; a kind that is short of its first two takes the place of the one that has most for its share.

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::{Rehearsal, VmId, VmSpec};

/// How the ids of pooled VMs begin.
const PREFIX: &str = "reserve-";
/// Digits behind it.
const DIGITS: usize = 16;
/// VMs of a kind that are made without waiting for a pause.
const EAGER: usize = 2;
/// Pooled VMs, of whatever kind.
const CAPACITY: usize = 24;
/// A kind that no one has asked for in this time gives everything up.
const KIND_LIFE: Duration = Duration::from_secs(600);
/// The client of the last create wants the processor first.
const AFTER_CREATE: Duration = Duration::from_millis(400);
/// Creates have paused after this.
const PAUSE: Duration = Duration::from_secs(2);
/// How often a kind was asked for is halved after this.
const HALF_LIFE: Duration = Duration::from_secs(600);
/// A kind that could not be made is tried again after this.
const BACK_OFF: Duration = Duration::from_secs(60);
/// How often the host's memory is looked at.
const LOOK: Duration = Duration::from_secs(10);

/// A new id of the pool's.
pub fn new_id() -> VmId {
    format!("{PREFIX}{:0DIGITS$x}", rand::random::<u64>())
}

/// Whether an id is of the pool's own making.
pub fn is_of_the_pool(id: &str) -> bool {
    let digits = id.strip_prefix(PREFIX).unwrap_or_default();
    digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// What a pooled VM is fit for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kind {
    /// Template, disk size and processor share.
    pub machine: String,
    /// What it has warmed up with.
    pub rehearsal: Option<Rehearsal>,
}

/// How much memory the host has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Enough for more.
    Plenty,
    /// Not for more.
    Enough,
    /// So little that the pool gives some back.
    Scarce,
}

/// What is to be done next.
#[derive(Debug)]
pub enum Next<V> {
    /// Make one more of a kind.
    Make(Kind, Box<VmSpec>),
    /// Terminate one.
    Evict(V),
    /// Nothing, for so long or until the pool changes.
    Wait(Duration),
}

/// The VMs in the pool, and the kinds that were asked for.
pub struct WarmPool<V> {
    state: Mutex<State<V>>,
    /// Of each kind, at most; 0: no pool.
    depth: usize,
    changed: Notify,
}

struct State<V> {
    shelves: Vec<Shelf<V>>,
    closed: bool,
}

struct Shelf<V> {
    kind: Kind,
    spec: VmSpec,
    ready: Vec<V>,
    last_asked: Instant,
    /// How often it was asked for, of late.
    demand: f64,
    not_before: Instant,
}

impl<V> Shelf<V> {
    fn demand(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.last_asked).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.demand * (-age).exp2()
    }

    /// How well it is supplied with `count` VMs.
    fn supply(&self, count: usize, now: Instant) -> f64 {
        count as f64 / (1.0 + self.demand(now))
    }
}

impl<V: Clone> WarmPool<V> {
    /// An empty pool for so many VMs of each kind.
    pub fn new(depth: usize) -> Self {
        Self { state: Mutex::new(State { shelves: Vec::new(), closed: false }), depth, changed: Notify::new() }
    }

    /// From now on nothing is made: the daemon ends. Gives back what is there.
    pub fn close(&self) -> Vec<V> {
        let mut state = self.lock();
        state.closed = true;
        self.changed.notify_one();
        state.shelves.drain(..).flat_map(|shelf| shelf.ready).collect()
    }

    /// Notes that VMs of a kind are wanted. `spec` must have nothing of a sandbox in it.
    pub fn ask(&self, kind: &Kind, spec: VmSpec, now: Instant) {
        let mut state = self.lock();
        if self.depth == 0 || state.closed {
            return;
        }
        match state.shelves.iter_mut().find(|shelf| shelf.kind == *kind) {
            Some(shelf) => {
                (shelf.demand, shelf.last_asked, shelf.spec) = (shelf.demand(now) + 1.0, now, spec);
            }
            None => {
                let kind = kind.clone();
                state.shelves.push(Shelf {
                    kind,
                    spec,
                    ready: Vec::new(),
                    last_asked: now,
                    demand: 1.0,
                    not_before: now,
                });
            }
        }
        self.changed.notify_one();
    }

    /// Takes out a VM of this kind.
    pub fn take(&self, kind: &Kind) -> Option<V> {
        self.lock().shelves.iter_mut().find(|shelf| shelf.kind == *kind)?.ready.pop()
    }

    /// Adds one; gives it back where there is no place for it any more.
    pub fn add(&self, kind: &Kind, vm: V) -> Result<(), V> {
        match self.lock().shelves.iter_mut().find(|shelf| shelf.kind == *kind) {
            Some(shelf) => shelf.ready.push(vm),
            None => return Err(vm),
        }
        Ok(())
    }

    /// A kind could not be made; it is let be for a while.
    pub fn back_off(&self, kind: &Kind, now: Instant) {
        if let Some(shelf) = self.lock().shelves.iter_mut().find(|shelf| shelf.kind == *kind) {
            shelf.not_before = now + BACK_OFF;
        }
    }

    /// Resolves when there may be something else to do.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What is to be done next.
    pub fn next(&self, now: Instant, memory: Memory) -> Next<V> {
        let mut state = self.lock();
        if state.closed || state.shelves.is_empty() {
            return Next::Wait(KIND_LIFE);
        }
        let stale = |shelf: &Shelf<V>| now.saturating_duration_since(shelf.last_asked) >= KIND_LIFE;
        if let Some(vm) = state.shelves.iter_mut().filter(|shelf| stale(shelf)).find_map(|shelf| shelf.ready.pop()) {
            return Next::Evict(vm);
        }
        state.shelves.retain(|shelf| !stale(shelf));
        if memory == Memory::Scarce
            && let Some(vm) = state.best_supplied(now, 1).and_then(|shelf| shelf.ready.pop())
        {
            return Next::Evict(vm);
        }
        let Some(last_asked) = state.shelves.iter().map(|shelf| shelf.last_asked).max() else {
            return Next::Wait(KIND_LIFE);
        };
        let quiet = now.saturating_duration_since(last_asked);
        let wanted = if quiet >= PAUSE { self.depth } else { self.depth.min(EAGER) };
        if quiet < AFTER_CREATE {
            return Next::Wait(AFTER_CREATE - quiet);
        }
        let shelves = state.shelves.iter().filter(|shelf| shelf.not_before <= now && shelf.ready.len() < wanted);
        // Who lacks its first ones comes first, then who is supplied worst for its demand, then who asked last.
        let next = shelves.min_by(|a, b| {
            let rank = |shelf: &Shelf<V>| (shelf.ready.len() >= EAGER, shelf.supply(shelf.ready.len() + 1, now));
            let ((a_has, a_supply), (b_has, b_supply)) = (rank(a), rank(b));
            a_has.cmp(&b_has).then(a_supply.total_cmp(&b_supply)).then(b.last_asked.cmp(&a.last_asked))
        });
        let Some(next) = next else {
            return Next::Wait(if quiet < PAUSE { PAUSE - quiet } else { LOOK });
        };
        if memory != Memory::Plenty {
            return Next::Wait(LOOK);
        }
        let (kind, spec, has) = (next.kind.clone(), Box::new(next.spec.clone()), next.ready.len());
        if state.total() < CAPACITY {
            return Next::Make(kind, spec);
        }
        // Full: only the first ones of a kind are worth another kind's surplus.
        match state.best_supplied(now, EAGER + 1).filter(|_| has < EAGER).and_then(|shelf| shelf.ready.pop()) {
            Some(vm) => Next::Evict(vm),
            None => Next::Wait(LOOK),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<V>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<V> State<V> {
    fn total(&self) -> usize {
        self.shelves.iter().map(|shelf| shelf.ready.len()).sum()
    }

    /// The shelf with the most for its demand, of those with `least` or more.
    fn best_supplied(&mut self, now: Instant, least: usize) -> Option<&mut Shelf<V>> {
        let shelves = self.shelves.iter_mut().filter(|shelf| shelf.ready.len() >= least);
        shelves.max_by(|a, b| {
            let supply = |shelf: &Shelf<V>| shelf.supply(shelf.ready.len(), now);
            supply(a).total_cmp(&supply(b)).then(b.last_asked.cmp(&a.last_asked))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use heyvm_images::{Image, Kernel};

    use super::*;

    fn spec() -> VmSpec {
        let image = Image {
            name: "box".into(),
            digest: "sha256:m".into(),
            root_digest: None,
            rootfs: "/root.erofs".into(),
            size_bytes: 1,
            config: Default::default(),
            created_at: 0,
            source: "registry".into(),
            private: false,
            recipe: None,
        };
        let kernel = Kernel { version: "6".into(), vmlinuz: "/v".into(), initramfs: "/i".into(), digest: "k".into() };
        VmSpec {
            kernel,
            image,
            memory_mib: 512,
            cpu_millis: 250,
            disk_gib: 5,
            hostname: "reserve".into(),
            env: Vec::new(),
            working_dir: String::new(),
            certificates: String::new(),
            user: String::new(),
            rehearsal: None,
        }
    }

    fn kind(name: &str) -> Kind {
        Kind { machine: name.into(), rehearsal: None }
    }

    /// A pool whose VMs are their kinds' names, and a clock.
    struct Trial {
        pool: WarmPool<String>,
        now: Instant,
        evicted: Vec<String>,
    }

    impl Trial {
        fn new(depth: usize) -> Self {
            Self { pool: WarmPool::new(depth), now: Instant::now(), evicted: Vec::new() }
        }

        fn ask(&mut self, name: &str) {
            self.pool.ask(&kind(name), spec(), self.now);
        }

        /// Does what is to be done until there is nothing for now.
        fn settle(&mut self, memory: Memory) -> Duration {
            for _ in 0..1000 {
                match self.pool.next(self.now, memory) {
                    Next::Make(kind, _) => self.pool.add(&kind, kind.machine.clone()).unwrap(),
                    Next::Evict(vm) => self.evicted.push(vm),
                    Next::Wait(duration) => return duration,
                }
            }
            panic!("it never rests")
        }

        fn after(&mut self, pause: Duration) -> HashMap<String, usize> {
            self.now += pause;
            self.settle(Memory::Plenty);
            self.counts()
        }

        fn counts(&self) -> HashMap<String, usize> {
            let state = self.pool.lock();
            state.shelves.iter().map(|shelf| (shelf.kind.machine.clone(), shelf.ready.len())).collect()
        }
    }

    #[test]
    fn the_pools_ids_are_known_from_all_others() {
        assert!(is_of_the_pool(&new_id()));
        for other in
            ["", "reserve-", "reserve-mine", "reserve-00000000000000000", "cbbe1029-0000-4000-8000-000000000000"]
        {
            assert!(!is_of_the_pool(other), "{other}");
        }
    }

    #[test]
    fn first_two_are_made_soon_and_the_rest_in_a_pause() {
        let mut trial = Trial::new(10);
        trial.ask("a");
        assert_eq!(trial.after(AFTER_CREATE / 2)["a"], 0, "the client wants the processor first");
        assert_eq!(trial.after(AFTER_CREATE / 2)["a"], EAGER);
        assert_eq!(trial.after(PAUSE)["a"], 10);
        assert_eq!(trial.pool.take(&kind("a")).as_deref(), Some("a"));
        assert_eq!(trial.pool.take(&kind("b")), None);
    }

    #[test]
    fn kind_that_is_asked_for_most_has_most_whatever_was_asked_for_since() {
        let mut trial = Trial::new(12);
        for _ in 0..10 {
            trial.ask("often");
        }
        for other in ["a", "b", "c"] {
            trial.now += Duration::from_secs(1);
            trial.ask(other);
        }
        let counts = trial.after(Duration::from_secs(60));
        assert_eq!(counts.values().sum::<usize>(), CAPACITY);
        assert!(counts["often"] >= 9, "{counts:?}");
        assert!(["a", "b", "c"].iter().all(|other| counts[*other] >= EAGER), "{counts:?}");
    }

    #[test]
    fn new_kind_gets_its_first_two_although_others_fill_the_pool() {
        let mut trial = Trial::new(12);
        for old in ["a", "b"] {
            trial.ask(old);
        }
        assert_eq!(trial.after(PAUSE).values().sum::<usize>(), CAPACITY);
        trial.ask("new");
        assert_eq!(trial.after(AFTER_CREATE)["new"], EAGER);
        assert_eq!(trial.evicted.len(), EAGER);
    }

    #[test]
    fn kind_that_nobody_asks_for_is_forgotten() {
        let mut trial = Trial::new(4);
        trial.ask("old");
        trial.after(PAUSE);
        trial.now += KIND_LIFE / 2;
        trial.ask("new");
        let counts = trial.after(KIND_LIFE / 2);
        assert_eq!(counts, HashMap::from([("new".to_owned(), 4)]));
        assert_eq!(trial.evicted, ["old"; 4]);
        assert_eq!(trial.pool.add(&kind("old"), "late".into()), Err("late".into()));
    }

    #[test]
    fn scarce_memory_empties_the_pool_and_none_is_made_without_plenty() {
        let mut trial = Trial::new(4);
        trial.ask("a");
        trial.after(PAUSE);
        trial.settle(Memory::Scarce);
        assert_eq!((trial.counts()["a"], trial.evicted.len()), (0, 4));
        trial.settle(Memory::Enough);
        assert_eq!(trial.counts()["a"], 0);
    }

    #[test]
    fn pool_that_is_closed_or_of_no_depth_makes_nothing() {
        let mut none = Trial::new(0);
        none.ask("a");
        assert!(none.after(PAUSE).is_empty());
        let mut trial = Trial::new(4);
        trial.ask("a");
        trial.after(PAUSE);
        assert_eq!(trial.pool.close().len(), 4);
        trial.ask("a");
        assert!(trial.after(PAUSE).is_empty());
        assert_eq!(trial.pool.add(&kind("a"), "late".into()), Err("late".into()));
    }

    #[test]
    fn kind_that_fails_is_let_be_for_a_while() {
        let mut trial = Trial::new(4);
        trial.ask("broken");
        trial.pool.back_off(&kind("broken"), trial.now);
        assert_eq!(trial.after(PAUSE)["broken"], 0);
        assert_eq!(trial.after(BACK_OFF)["broken"], 4);
    }
}
