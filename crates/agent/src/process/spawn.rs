//! Starts a program the way `vfork` does: the new process borrows the agent's memory until it is the other program,
//! so that nothing is copied, and it is born inside the sandbox's cgroup.
//!
//! Everything the child needs is prepared before it exists; the child itself makes system calls alone.

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    ptr,
    sync::OnceLock,
};

use nix::{
    libc::{self, c_char, c_int},
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
    unistd::Pid,
};

use super::user::Identity;

/// The descriptor of a script that is too long for an argument: the highest that every shell can name.
pub const SCRIPT: RawFd = 9;
/// What the child's descriptors are, in the order in which they are put in place.
const TARGETS: [RawFd; 5] = [0, 1, 2, 3, SCRIPT];
/// Enough for a few frames of system calls.
const STACK: usize = 32 << 10;

/// A program to start, with everything looked up.
pub struct Program {
    /// Another root directory than the agent's.
    pub root: Option<CString>,
    /// Files to try, in this order.
    pub candidates: Vec<CString>,
    /// Arguments, its name first.
    pub argv: Vec<CString>,
    /// `NAME=value`.
    pub env: Vec<CString>,
    /// Its directory.
    pub cwd: CString,
    /// Who it runs as.
    pub identity: Identity,
}

/// The descriptors a program starts with.
pub struct Descriptors<'a> {
    /// 0, 1 and 2.
    pub standard: [BorrowedFd<'a>; 3],
    /// 3: where a session's shell reports.
    pub report: Option<BorrowedFd<'a>>,
    /// [`SCRIPT`]: a script that is too long for an argument.
    pub script: Option<BorrowedFd<'a>>,
    /// Whether 0 is to be its controlling terminal.
    pub terminal: bool,
}

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No process could be made.
    #[error("no process could be made: {0}")]
    Fork(#[source] io::Error),
    /// Its directory cannot be entered.
    #[error("its directory cannot be entered: {0}")]
    Directory(#[source] io::Error),
    /// It cannot become the user.
    #[error("it cannot run as that user: {0}")]
    User(#[source] io::Error),
    /// Its descriptors could not be set up.
    #[error("its input and output could not be set up: {0}")]
    Descriptors(#[source] io::Error),
    /// The file is not there or cannot be run.
    #[error("{0}")]
    Exec(#[source] io::Error),
}

impl SpawnError {
    /// The exit code a shell gives for it.
    pub fn code(&self) -> i32 {
        match self {
            Self::Exec(error) if error.raw_os_error() == Some(libc::ENOENT) => 127,
            _ => 126,
        }
    }
}

/// How far the child got.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Descriptors,
    Directory,
    User,
    Exec,
}

/// What the child works from and reports in; lives in the parent's memory.
struct Plan {
    /// Null-terminated, like the two below.
    candidates: Vec<*const c_char>,
    /// One slot before the program's arguments is free: a script without `#!` becomes an argument of the shell.
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    root: *const c_char,
    cwd: *const c_char,
    uid: u32,
    gid: u32,
    groups: Vec<libc::gid_t>,
    /// Sources of [`TARGETS`]; -1 for none.
    descriptors: [RawFd; TARGETS.len()],
    terminal: bool,
    /// Signals that this process ignores: bit 0 is signal 1.
    ignored: u64,
    step: Step,
    error: c_int,
}

/// Starts `program` in a session of its own and, where `cgroup` is given, inside that cgroup.
///
/// Returns when it runs or could not be started. Signals of the whole thread are held meanwhile.
pub fn spawn(
    program: &Program,
    descriptors: &Descriptors<'_>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Pid, SpawnError> {
    let mut plan = Plan::new(program, descriptors);
    let mut stack = vec![0_u128; STACK / 16];
    // SAFETY: all-zero is a valid clone_args; the unset fields mean "none".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (libc::CLONE_VM | libc::CLONE_VFORK) as u64 | CLONE_CLEAR_SIGHAND;
    args.exit_signal = libc::SIGCHLD as u64;
    args.stack = stack.as_mut_ptr() as u64;
    args.stack_size = (stack.len() * 16) as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    let mut before = SigSet::empty();
    // A handler must not run in the child: it would act on the parent's memory.
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), Some(&mut before))
        .map_err(|e| SpawnError::Fork(e.into()))?;
    // SAFETY: `args` names a stack that is free and outlives the child's use of it (CLONE_VFORK: the child is another
    // program or dead when this returns); `plan` outlives it, too, and nobody else touches it.
    let made = unsafe { clone(&args, &raw mut plan) };
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None).ok();
    if made < 0 {
        return Err(SpawnError::Fork(io::Error::from_raw_os_error(-made as i32)));
    }
    let pid = Pid::from_raw(made as i32);
    if plan.error == 0 {
        return Ok(pid);
    }
    nix::sys::wait::waitpid(pid, None).ok();
    let error = io::Error::from_raw_os_error(plan.error);
    Err(match plan.step {
        Step::Descriptors => SpawnError::Descriptors(error),
        Step::Directory => SpawnError::Directory(error),
        Step::User => SpawnError::User(error),
        Step::Exec => SpawnError::Exec(error),
    })
}

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

impl Plan {
    fn new(program: &Program, descriptors: &Descriptors<'_>) -> Self {
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
        };
        let number = |fd: Option<BorrowedFd<'_>>| fd.map_or(-1, |fd| fd.as_raw_fd());
        let [stdin, stdout, stderr] = descriptors.standard.map(|fd| fd.as_raw_fd());
        let mut argv = vec![c"/bin/sh".as_ptr()];
        argv.extend(pointers(&program.argv));
        Self {
            candidates: pointers(&program.candidates),
            argv,
            env: pointers(&program.env),
            root: program.root.as_ref().map_or(ptr::null(), |root| root.as_ptr()),
            cwd: program.cwd.as_ptr(),
            uid: program.identity.uid,
            gid: program.identity.gid,
            groups: program.identity.groups.clone(),
            descriptors: [stdin, stdout, stderr, number(descriptors.report), number(descriptors.script)],
            terminal: descriptors.terminal,
            ignored: ignored_signals(),
            step: Step::Descriptors,
            error: 0,
        }
    }
}

/// `struct sigaction` as the kernel knows it; all-zero is SIG_DFL.
#[repr(C)]
#[derive(Default)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// The signals that this process ignores. Nothing here changes that after the start, so that it is read once.
fn ignored_signals() -> u64 {
    static IGNORED: OnceLock<u64> = OnceLock::new();
    *IGNORED.get_or_init(|| {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(u64::MAX)
    })
}

/// Makes the child and gives its id to the parent, or a negative error number.
///
/// # Safety
/// `args` must ask for CLONE_VM and CLONE_VFORK and name a free stack; `plan` must be valid until this returns.
#[cfg(target_arch = "x86_64")]
unsafe fn clone(args: &libc::clone_args, plan: *mut Plan) -> isize {
    let result: isize;
    // SAFETY: the parent sees a system call that clobbers rax, rcx and r11; the child starts on its own stack and
    // never returns from `child`.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {plan}",
            "call {child}",
            "ud2",
            "2:",
            plan = in(reg) plan,
            child = in(reg) child as extern "C" fn(*mut Plan) -> !,
            inout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") ptr::from_ref(args),
            in("rsi") size_of::<libc::clone_args>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// The child's whole life up to the other program. All signals are blocked.
extern "C" fn child(plan: *mut Plan) -> ! {
    // SAFETY: the parent waits inside `clone` while this runs and nobody else knows of the plan.
    let plan = unsafe { &mut *plan };
    let failed = become_program(plan);
    plan.error = if failed == 0 { libc::EINVAL } else { failed };
    // SAFETY: ends this process alone; no destructor of the parent's runs.
    unsafe { libc::_exit(127) }
}

/// Returns only when it failed, with the error number.
fn become_program(plan: &mut Plan) -> c_int {
    // SAFETY: plain system calls on this process, with pointers into the plan, which the parent keeps alive. Those
    // that glibc would spread over the parent's threads (setuid and its like) are made directly.
    unsafe {
        libc::setsid();
        for (&target, &source) in TARGETS.iter().zip(&plan.descriptors) {
            if source == target && libc::fcntl(source, libc::F_SETFD, 0) < 0
                || source >= 0 && source != target && libc::dup2(source, target) < 0
            {
                return errno();
            }
        }
        if plan.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return errno();
        }
        plan.step = Step::Directory;
        if !plan.root.is_null() && libc::chroot(plan.root) < 0 || libc::chdir(plan.cwd) < 0 {
            return errno();
        }
        plan.step = Step::User;
        if (plan.uid, plan.gid) != (0, 0) || !plan.groups.is_empty() {
            let (uid, gid) = (plan.uid as usize, plan.gid as usize);
            if libc::syscall(libc::SYS_setgroups, plan.groups.len(), plan.groups.as_ptr()) < 0
                || libc::syscall(libc::SYS_setresgid, gid, gid, gid) < 0
                || libc::syscall(libc::SYS_setresuid, uid, uid, uid) < 0
            {
                return errno();
            }
        }
        // CLONE_CLEAR_SIGHAND leaves ignored what is ignored: SIGPIPE by Rust's runtime, SIGINT by a shell that started us
        // in the background. glibc's `sigaction` refuses two of them.
        for signal in (1..=64).filter(|signal| plan.ignored >> (signal - 1) & 1 == 1) {
            let default = KernelAction::default();
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, ptr::null::<u8>(), size_of::<u64>());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        plan.step = Step::Exec;
        exec_first(plan)
    }
}

/// As `execvp` does it: a file that is not there is passed over, one that may not be run is remembered.
///
/// # Safety
/// The plan's pointers must be valid and its lists end with a null pointer.
unsafe fn exec_first(plan: &mut Plan) -> c_int {
    let mut worst = libc::ENOENT;
    for index in 0.. {
        // SAFETY: the list ends with a null pointer, which ends this loop; the other lists do, too.
        unsafe {
            let file = *plan.candidates.as_ptr().add(index);
            if file.is_null() {
                break;
            }
            libc::execve(file, plan.argv.as_ptr().add(1), plan.env.as_ptr());
            match errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => worst = libc::EACCES,
                libc::ENOEXEC => {
                    *plan.argv.as_mut_ptr().add(1) = file;
                    libc::execve(*plan.argv.as_ptr(), plan.argv.as_ptr(), plan.env.as_ptr());
                    return libc::ENOEXEC;
                }
                other => return other,
            }
        }
    }
    worst
}

fn errno() -> c_int {
    nix::errno::Errno::last_raw()
}
