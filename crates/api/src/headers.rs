//! Headers by which a trusted caller (the owner's socket, a server that a region's daemon knows) says for whom it asks.
//! `heyvm --api` takes them out of what its clients send.

/// The account asked for; absent: this machine's owner. `*` stands for all of them, where a list is asked for.
pub const ACCOUNT: &str = "heyvm-account";

/// The id (a UUID) that a new sandbox is to have. The same one again, with the same request, gives the same sandbox.
pub const SANDBOX_ID: &str = "heyvm-sandbox-id";

/// The protocol that a connection is upgraded to for the byte stream to a port of a sandbox.
pub const PORT_STREAM: &str = "heyvm-stream";

/// The value of [`ACCOUNT`] that stands for all.
pub const EVERY_ACCOUNT: &str = "*";

/// In an answer that is one page of a list: where the next page begins. Absent on the last page.
pub const NEXT_CURSOR: &str = "heyvm-next-cursor";

/// In the answer to a list: what to send as `since` to get what changes from then on. Absent while pages are left.
pub const REVISION: &str = "heyvm-revision";

/// Present: the caller showed no credentials, as any local user may over TCP. It reaches sandboxes, never the host.
pub const RESTRICTED: &str = "heyvm-restricted";
