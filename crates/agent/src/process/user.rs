//! Users and groups as the sandbox's own `/etc/passwd` and `/etc/group` know them.
//!
//! glibc's look-ups load plug-ins at run time, which a static program cannot; the files say all that is needed.

use std::{fs, io, io::Read, path::Path};

/// These files are small; a guest may have made them anything.
const MAX_FILE: u64 = 4 << 20;
/// Supplementary groups the kernel takes at most.
const MAX_GROUPS: usize = 65_536;

/// Who a process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// Why there is no such identity.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    /// Not in `/etc/passwd`.
    #[error("there is no user {0:?} in the sandbox's /etc/passwd")]
    NoUser(String),
    /// Not in `/etc/group`.
    #[error("there is no group {0:?} in the sandbox's /etc/group")]
    NoGroup(String),
}

impl Identity {
    /// Root, as every image has it.
    pub fn root() -> Self {
        Self { home: "/root".into(), ..Self::default() }
    }

    /// Finds `user`, or `user:group`, by names or numbers below the directory `etc`; empty means root.
    pub fn find(spec: &str, etc: &Path) -> Result<Self, UserError> {
        if spec.is_empty() {
            return Ok(Self::root());
        }
        Self::resolve(spec, &read(&etc.join("passwd")), &read(&etc.join("group")))
    }

    fn resolve(spec: &str, passwd: &str, group: &str) -> Result<Self, UserError> {
        let (user, wanted_group) = match spec.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
            None => (spec, None),
        };
        let number = user.parse::<u32>().ok();
        let known = passwd.lines().filter_map(Account::parse).find(|a| a.name == user || number == Some(a.uid));
        let (uid, primary, name, home) = match (known, number) {
            (Some(account), _) => (account.uid, account.gid, account.name, account.home),
            (None, Some(uid)) => (uid, 0, "", "/"),
            (None, None) => return Err(UserError::NoUser(user.into())),
        };
        let gid = wanted_group.map_or(Ok(primary), |wanted| find_group(wanted, group))?;
        // With a group asked for, that one alone is meant.
        let groups =
            if wanted_group.is_none() && !name.is_empty() { groups_of(name, primary, group) } else { vec![gid] };
        Ok(Self { uid, gid, groups, home: home.into() })
    }
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let mut fields = fields.skip(1);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let home = fields.nth(1).filter(|home| home.starts_with('/')).unwrap_or("/");
        Some(Self { name, uid, gid, home })
    }
}

/// Name, id and members of each group.
fn groups(file: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    file.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

fn find_group(wanted: &str, file: &str) -> Result<u32, UserError> {
    let by_name = groups(file).find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
    by_name.or_else(|| wanted.parse().ok()).ok_or_else(|| UserError::NoGroup(wanted.into()))
}

fn groups_of(user: &str, primary: u32, file: &str) -> Vec<u32> {
    let member = groups(file).filter(|(_, _, members)| members.split(',').any(|member| member == user));
    let mut all: Vec<u32> = [primary].into_iter().chain(member.map(|(_, gid, _)| gid)).take(MAX_GROUPS).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// What is missing or unreadable holds nobody.
fn read(path: &Path) -> String {
    let read = || -> io::Result<String> {
        let file = fs::File::open(path)?;
        if !file.metadata()?.is_file() {
            return Ok(String::new());
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\nbroken\nbad:x:no:1::/:\nweb:x:33:33:www:/var/www:/bin/sh\n12:x:99:99::/odd:";
    const GROUP: &str = "root:x:0:\nadm:x:4:syslog,web\nweb:x:33:\nvideo:x:44:web\nhalf:x\n";

    fn resolve(spec: &str) -> Result<Identity, UserError> {
        Identity::resolve(spec, PASSWD, GROUP)
    }

    #[test]
    fn a_name_brings_its_groups_and_home() {
        let web = Identity { uid: 33, gid: 33, groups: vec![4, 33, 44], home: "/var/www".into() };
        assert_eq!(resolve("web"), Ok(web.clone()));
        assert_eq!(resolve("33"), Ok(web));
    }

    #[test]
    fn numbers_need_no_entry() {
        assert_eq!(resolve("1000"), Ok(Identity { uid: 1000, gid: 0, groups: vec![0], home: "/".into() }));
        assert_eq!(resolve("1000:7"), Ok(Identity { uid: 1000, gid: 7, groups: vec![7], home: "/".into() }));
    }

    #[test]
    fn a_group_that_is_asked_for_is_the_only_one() {
        assert_eq!(resolve("web:adm").unwrap().groups, [4]);
        assert_eq!(resolve("web:").unwrap().groups, [4, 33, 44]);
    }

    #[test]
    fn a_name_made_of_digits_is_found_by_name_first() {
        assert_eq!(resolve("12").unwrap().uid, 99);
    }

    #[test]
    fn unknown_names_are_errors() {
        assert_eq!(resolve("nobody"), Err(UserError::NoUser("nobody".into())));
        assert_eq!(resolve("web:nogroup"), Err(UserError::NoGroup("nogroup".into())));
        assert_eq!(resolve("bad"), Err(UserError::NoUser("bad".into())));
    }
}
