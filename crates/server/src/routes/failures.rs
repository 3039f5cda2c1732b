//! Which errors each call answers: in the documents every status stands for itself, with the codes that it comes with. No
//! answer is left out, so that clients and tests can hold us to it.

use std::collections::{BTreeMap, BTreeSet};

use heyvm_api::{
    ErrorCode::{self, *},
    error::ErrorBody,
};
use http::StatusCode;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        Content, OpenApi, Ref, RefOr, ResponseBuilder,
        path::{Operation, PathItem},
    },
};

/// Whose document it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// The daemon's, through `heyvm --api`.
    Daemon,
    /// A cloud's.
    Cloud,
}

type Codes = &'static [ErrorCode];

const EVERY_CALL: Codes = &[BadRequest, BadHost, Internal, DaemonUnavailable];
const CREDENTIALS: Codes = &[Unauthorized, Forbidden];
const PARAMETERS: Codes = &[InvalidArgument];
const BODY: Codes = &[InvalidArgument, TooLarge];
const SANDBOX: Codes = &[SandboxNotFound, RegionUnavailable];
const IMAGE: Codes = &[ImageNotFound, ImageInvalid, RegistryUnavailable, RegionUnavailable];
const ARCHIVE: Codes = &[ArchiveNotFound, StorageUnavailable, OutOfResources];
const UPLOAD: Codes = &[InvalidName, ArchiveInvalid];
const NEW: Codes = &[
    LimitExceeded,
    InvalidName,
    InvalidPort,
    UnknownSizeClass,
    UnknownRegion,
    InvalidDirectory,
    NameTaken,
    IdempotencyKeyReused,
    QuotaExceeded,
    Unsupported,
];
const FIRST_STEPS: Codes = &[ArchiveInvalid, FileNotFound, FileConflict, SetupHookFailed, HealthTimeout];
const VM: Codes = &[InvalidState, VmFailed, SandboxUnreachable, HostNotReady, OutOfResources, Timeout];
const START: Codes = &[QuotaExceeded, ImageNotFound, StartCommandFailed, InvalidDirectory, Unsupported];
const AGENT: Codes = &[InvalidState, SandboxUnreachable];
const FILES: Codes = &[FileNotFound, FileConflict, OutOfResources];

/// Those that a daemon of one's own has no use for.
const OF_A_CLOUD: [ErrorCode; 4] = [QuotaExceeded, RateLimited, RegionUnavailable, StorageUnavailable];

/// What a call answers beyond what its path and its body say of it.
fn own(id: &str) -> &'static [Codes] {
    match id {
        "create_sandbox" => &[NEW, ARCHIVE, IMAGE, &[RateLimited], FIRST_STEPS, VM, START],
        // The answer comes before anything is made.
        "cloud_deploy" => &[NEW, ARCHIVE],
        "start_sandbox" | "restart_sandbox" | "restore_sandbox" => &[VM, START],
        "cloud_start" | "cloud_restart" | "cloud_restore" => &[VM, START],
        "resize_sandbox" | "cloud_resize" => &[&[UnknownSizeClass], VM, START],
        "stop_sandbox" | "remove_sandbox" | "checkpoint_sandbox" => &[VM],
        "cloud_stop" | "cloud_remove" | "cloud_checkpoint" => &[VM],
        "recover_sandbox" => &[&[InvalidName, NameTaken], VM],
        "set_restart_policy" => &[&[InvalidState]],
        "set_sandbox_ttl" | "cloud_set_ttl" => &[&[InvalidState, QuotaExceeded]],
        "add_mount" => &[VM, &[InvalidDirectory, FileNotFound, FileConflict, Unsupported]],
        "replace_mount" | "cloud_replace_mount" => &[ARCHIVE, UPLOAD, AGENT, FILES],
        "execute" | "cloud_exec" => &[AGENT, FILES],
        "exec_stream" => &[AGENT],
        "shell_stream" => &[&[InvalidState]],
        "list_files" | "remove_file" | "download_file" | "upload_file" | "pack_files" | "unpack_files" => {
            &[AGENT, FILES]
        }
        "cloud_read_file" | "cloud_write_file" => &[AGENT, FILES],
        "bind_port" | "cloud_bind" => {
            &[SANDBOX, &[LimitExceeded, InvalidPort, PortNotBound, InvalidState, Unsupported]]
        }
        "unbind_port" | "unbind_port_by_query" => &[&[InvalidPort, PortNotBound]],
        "dial_port" => &[AGENT, &[InvalidPort, PortNotListening]],
        "wait_for_port" => &[AGENT, &[InvalidPort]],
        "get_route" => &[SANDBOX],
        "list_images" | "cloud_images" => &[&[RegionUnavailable]],
        "pull_image" | "import_image" => &[IMAGE, &[RateLimited, HostNotReady, OutOfResources]],
        "prepare_default_image" => &[IMAGE, VM],
        "import_kernel" => &[&[ImageInvalid, HostNotReady, OutOfResources]],
        "remove_image" => &[&[ImageNotFound, InvalidState]],
        "put_archive" | "upload_archive" => &[ARCHIVE, UPLOAD, &[Forbidden, InvalidState, QuotaExceeded]],
        "finalize_archive" => &[ARCHIVE, &[InvalidName, InvalidState]],
        "list_archives" | "list_archives_as_local" => &[&[StorageUnavailable]],
        "presign_archive" => &[&[StorageUnavailable, RateLimited]],
        "get_archive" | "remove_archive" | "remove_archive_as_local" => &[ARCHIVE, &[InvalidState]],
        "log_in" | "exchange_api_key" => &[&[Unauthorized, RateLimited, HostNotReady]],
        "refresh_tokens" => &[&[Unauthorized, HostNotReady]],
        "log_out" => &[&[Unauthorized]],
        "revoke_api_key" => &[&[NotFound]],
        "public_keys" => &[&[HostNotReady]],
        _ => &[],
    }
}

/// Whether a call wants no credentials, or others than `Authorization` has.
fn is_open(id: &str, server: Server) -> bool {
    match id {
        "health" => true,
        "openapi" | "docs" | "public_keys" | "upload_archive" => server == Server::Cloud,
        "log_in" | "refresh_tokens" | "log_out" | "exchange_api_key" => true,
        _ => false,
    }
}

/// Writes into a document what its calls answer when they fail.
pub fn describe(document: &mut OpenApi, server: Server) {
    let components = document.components.get_or_insert_with(Default::default);
    components.schemas.insert(ErrorBody::name().into(), ErrorBody::schema());
    let mut more = Vec::new();
    ErrorBody::schemas(&mut more);
    components.schemas.extend(more);
    for (path, item) in &mut document.paths.paths {
        for operation in operations(item) {
            for (status, codes) in statuses(path, operation, server) {
                let names: Vec<String> = codes.iter().map(|code| format!("`{code}`")).collect();
                let content = Content::new(Some(Ref::from_schema_name(ErrorBody::name())));
                let answer = ResponseBuilder::new().description(names.join(", ")).content("application/json", content);
                operation.responses.responses.insert(status.as_str().to_owned(), answer.build().into());
            }
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().flatten()
}

/// Each status of a call's failures, with its codes.
fn statuses(path: &str, operation: &Operation, server: Server) -> BTreeMap<StatusCode, BTreeSet<String>> {
    let mut all = BTreeMap::<_, BTreeSet<String>>::new();
    let mut add = |status: StatusCode, code: ErrorCode| {
        all.entry(status).or_default().insert(code.as_str());
    };
    for code in codes(path, operation, server) {
        add(StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), code);
    }
    if takes_json(operation) {
        add(StatusCode::UNSUPPORTED_MEDIA_TYPE, InvalidArgument);
    }
    if operation.responses.responses.contains_key(StatusCode::SWITCHING_PROTOCOLS.as_str()) {
        add(StatusCode::UPGRADE_REQUIRED, InvalidArgument);
    }
    all
}

fn takes_json(operation: &Operation) -> bool {
    matches!(&operation.request_body, Some(RefOr::T(body)) if body.content.contains_key("application/json"))
}

fn codes(path: &str, operation: &Operation, server: Server) -> impl Iterator<Item = ErrorCode> {
    let id = operation.operation_id.as_deref().unwrap_or_default();
    let of_a_sandbox = path.contains("sandboxes/{id}") || path.starts_with("/sandbox/{id}");
    let shape = [
        (true, EVERY_CALL),
        (!is_open(id, server), CREDENTIALS),
        (operation.parameters.is_some(), PARAMETERS),
        (operation.request_body.is_some(), BODY),
        (of_a_sandbox, SANDBOX),
    ];
    let shape = shape.into_iter().filter_map(|(applies, codes)| applies.then_some(codes));
    let all = shape.chain(own(id).iter().copied()).flatten().copied();
    all.filter(move |code| server == Server::Cloud || !OF_A_CLOUD.contains(code))
}
