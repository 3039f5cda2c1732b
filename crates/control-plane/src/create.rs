//! Making a sandbox: a row in the store first, then each step; a step that fails undoes everything before it.

use std::{sync::Arc, time::Duration};

use heyvm_agent_protocol::v1::{ExecInput, ExecStart, Exit, UnpackInput, exec_input, exec_output};
use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{CreateRequest, Reason, ReasonCode, SandboxInfo, Status},
};
use heyvm_store::KeyRow;
use heyvm_vm::{Vm, VmSpec};

use crate::{
    ControlPlane, ProgressSink, Sandbox, archives, errors,
    record::{self, Record},
    tell, validate,
};

/// Lines of a failed step's output that are told.
const TAIL_LINES: usize = 20;
const TAIL_WIDTH: usize = 500;
/// Bytes of a hook's output that are kept for its last lines.
const TAIL_BYTES: usize = 64 << 10;

impl ControlPlane {
    /// Makes a sandbox and returns when it is running (or healthy, where that was asked for).
    /// Dropping the future without an idempotency key undoes it; with a key it goes on.
    pub async fn create(
        self: &Arc<Self>,
        request: CreateRequest,
        idempotency_key: Option<String>,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let Some(key) = idempotency_key else {
            let sandbox = self.begin(&request, None).await?;
            let undo = UndoOnDrop { plane: Arc::clone(self), sandbox: Some(Arc::clone(&sandbox)) };
            let made = self.clone().make(Arc::clone(&sandbox), request, progress).await;
            undo.disarm();
            return made;
        };
        let wanted = record::fingerprint(&request);
        let sandbox = {
            let _one_at_a_time = self.keys.lock().await;
            match self.store.key(&key).await.map_err(errors::store)? {
                Some(known) if known.request != wanted => {
                    return Err(ApiError::new(
                        ErrorCode::IdempotencyKeyReused,
                        "this idempotency key came with another request",
                    )
                    .hint("use a new key for a new request"));
                }
                Some(known) => return self.wait_until_made(&known.sandbox_id).await,
                None => self.begin(&request, Some((&key, wanted))).await?,
            }
        };
        let making = tokio::spawn(Arc::clone(self).make(sandbox, request, progress));
        making.await.map_err(|error| errors::internal(&error))?
    }

    /// The row, before anything is done. With a key, the key as well.
    async fn begin(&self, request: &CreateRequest, key: Option<(&str, String)>) -> Result<Arc<Sandbox>, ApiError> {
        let mut record = validate::record(request, &self.config)?;
        if let Some(archive) = &record.archive_id {
            archives::check(&self.config.home, archive)?;
        }
        record.waiting_to_replace = request.replace && self.living_named(&record.name).is_some();
        self.store.insert(&record.row()).await.map_err(|error| match error {
            heyvm_store::Error::NameTaken => errors::store(error)
                .sandbox(self.living_named(&record.name).map(|other| other.record().id.clone()).unwrap_or_default()),
            other => errors::store(other),
        })?;
        if let Some((key, request)) = key {
            let row = KeyRow { request, sandbox_id: record.id.clone() };
            let now = record.created_at.timestamp_millis();
            self.store.add_key(key, &row, now).await.map_err(errors::store)?;
        }
        let sandbox = Sandbox::new(record);
        self.add(&sandbox);
        Ok(sandbox)
    }

    fn living_named(&self, name: &str) -> Option<Arc<Sandbox>> {
        self.all().into_iter().find(|sandbox| {
            let record = sandbox.record();
            record.name == name && record.is_living() && !record.waiting_to_replace
        })
    }

    async fn wait_until_made(&self, id: &str) -> Result<SandboxInfo, ApiError> {
        let sandbox = self.find(id)?;
        let mut changed = sandbox.changed.subscribe();
        while sandbox.record().status == Status::Provisioning {
            if changed.changed().await.is_err() {
                break;
            }
        }
        let record = sandbox.snapshot();
        match (record.status, &record.reason) {
            (Status::Removed, Some(reason)) => Err(ApiError::new(ErrorCode::VmFailed, reason.message.clone())
                .log_tail(reason.log_tail.clone())
                .hint("it failed while it was being made; send it again to try anew")),
            _ => Ok(self.info(&record)),
        }
    }

    async fn make(
        self: Arc<Self>,
        sandbox: Arc<Sandbox>,
        request: CreateRequest,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let _one_transition = sandbox.transition.lock().await;
        let cancelled = sandbox.cancel.clone();
        let steps = self.steps(&sandbox, &request, &progress);
        let outcome = tokio::select! {
            outcome = steps => outcome,
            () = cancelled.cancelled() => Err(ApiError::new(ErrorCode::InvalidState, "the sandbox was removed while it was being made")
                .hint("deploy it again").step("vm")),
        };
        match outcome {
            Ok(info) => Ok(info),
            Err(error) => Err(self.fail(&sandbox, &request, error).await),
        }
    }

    async fn steps(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        request: &CreateRequest,
        progress: &ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let spec = self.prepare_image(sandbox, progress).await.map_err(|error| error.step("image"))?;
        tell(progress, "template", "preparing the template");
        let record = sandbox.snapshot();
        self.driver
            .prepare(&spec, self.forward(progress, "template"))
            .await
            .map_err(|error| errors::vm(error).step("vm"))?;
        tell(progress, "vm", "starting the VM");
        let vm = self.driver.create(&record.id, &spec).await.map_err(|error| errors::vm(error).step("vm"))?;
        sandbox.set_vm(Some(Arc::clone(&vm)));
        check_type(&vm, request.sandbox_type.as_deref()).await.map_err(|error| error.step("image"))?;
        if let Some(archive) = &record.archive_id {
            tell(progress, "unpack", "unpacking the archive");
            self.unpack(&vm, archive, &record.working_directory).await.map_err(|error| error.step("unpack"))?;
        }
        for hook in &record.setup_hooks {
            tell(progress, "setup_hook", hook);
            run_hook(&vm, hook).await.map_err(|error| error.step("setup_hook"))?;
        }
        self.run_start_command(sandbox, &vm, progress).await?;
        for port in &record.open_ports {
            self.bind_port(&record.id, *port).await.map_err(|error| error.step("bind"))?;
        }
        self.wait_until_ready(sandbox, &vm, progress).await?;
        let replaced = if record.waiting_to_replace { self.living_named(&record.name) } else { None };
        if let Some(old) = replaced {
            self.take_the_place_of(&old, sandbox).await?;
        } else {
            self.save(sandbox, |record| {
                record.waiting_to_replace = false;
                record.enter(Status::Running, None);
                record.started_at = Some(record.status_changed_at);
            })
            .await?;
        }
        self.watch(sandbox, vm);
        Ok(self.info(&sandbox.snapshot()))
    }

    /// Image and kernel, and from them what the VM is made from.
    async fn prepare_image(&self, sandbox: &Sandbox, progress: &ProgressSink) -> Result<VmSpec, ApiError> {
        let asked = sandbox.record().image.clone();
        let forward = self.forward(progress, "image");
        let resolved = self.images.resolve(&asked, &self.config.default_image, forward).await.map_err(errors::image)?;
        let record = self
            .save(sandbox, |record| {
                record.image_env.clone_from(&resolved.image.config.env);
                if let Some(sentence) = &resolved.substituted {
                    record.image.clone_from(&resolved.image.name);
                    record.image_requested = Some(asked.clone());
                    record.warnings.push(sentence.clone());
                }
            })
            .await?;
        let kernel = self.images.kernel().await.map_err(errors::image)?;
        Ok(vm_spec(&record, kernel, resolved.image))
    }

    /// The VM that a sandbox of nothing but defaults would have.
    pub(crate) async fn default_spec(&self, record: &Record, progress: &ProgressSink) -> Result<VmSpec, ApiError> {
        let forward = self.forward(progress, "image");
        let resolved =
            self.images.resolve(&record.image, &self.config.default_image, forward).await.map_err(errors::image)?;
        let kernel = self.images.kernel().await.map_err(errors::image)?;
        Ok(vm_spec(record, kernel, resolved.image))
    }

    /// The VM of an existing record: its image must still be here.
    pub(crate) async fn spec_of(&self, record: &Record) -> Result<VmSpec, ApiError> {
        let image = self.images.get(&record.image).ok_or_else(|| {
            ApiError::new(ErrorCode::ImageNotFound, format!("the sandbox's image {} is gone", record.image))
                .hint(format!("heyvm pull {} brings it back", record.image))
        })?;
        let kernel = self.images.kernel().await.map_err(errors::image)?;
        Ok(vm_spec(record, kernel, image))
    }

    /// Progress of the parts below, as events of ours.
    pub(crate) fn forward(&self, progress: &ProgressSink, step: &'static str) -> heyvm_vm::Progress {
        let progress = progress.clone();
        Arc::new(move |message, done, total| {
            let event = heyvm_api::system::ProgressEvent { step: step.into(), message: message.into(), done, total };
            let _ = progress.send(event);
        })
    }

    async fn unpack(&self, vm: &Arc<dyn Vm>, archive: &str, directory: &str) -> Result<(), ApiError> {
        let pieces = archives::read(&self.config.home, archive)?;
        let first = UnpackInput {
            path: directory.to_owned(),
            max_bytes: archives::MAX_UNPACKED,
            max_entries: archives::MAX_ENTRIES,
            ..UnpackInput::default()
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let feeding = tokio::task::spawn_blocking(move || {
            let _ = sender.blocking_send(first);
            archives::feed(pieces, |data| sender.blocking_send(UnpackInput { data, ..UnpackInput::default() }).is_ok())
        });
        let mut client = vm.agent().client().await.map_err(errors::vm)?;
        let input = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let unpacked = client.unpack(input).await.map_err(|status| errors::agent(&status));
        feeding
            .await
            .map_err(|error| errors::internal(&error))?
            .map_err(|error| errors::io("reading the archive", &error))?;
        unpacked.map(drop)
    }

    /// Undoes a sandbox whose making failed; what is left is the word of it.
    async fn fail(self: &Arc<Self>, sandbox: &Arc<Sandbox>, request: &CreateRequest, error: ApiError) -> ApiError {
        let step = error.step.clone().unwrap_or_else(|| "vm".into());
        let id = sandbox.record().id.clone();
        let reason = Reason {
            code: ReasonCode::FailedStep,
            message: format!("failed at step {step}: {}", error.message),
            exit_code: None,
            log_tail: error.log_tail.clone(),
        };
        let _ = self.store.remove_keys(&id).await;
        if request.keep_on_failure
            && !sandbox.cancel.is_cancelled()
            && let Some(vm) = sandbox.vm()
        {
            // Kept running, so that one can look into it.
            let kept = self
                .save(sandbox, |record| {
                    record.waiting_to_replace = false;
                    record.enter(Status::Failed, Some(reason));
                })
                .await;
            if kept.is_ok() {
                self.watch(sandbox, vm);
                return error.sandbox(id);
            }
        } else {
            self.destroy(sandbox, reason).await;
        }
        error
    }

    /// In one step of the store the new one has the name and the old one's URLs; then the old one goes.
    async fn take_the_place_of(self: &Arc<Self>, old: &Arc<Sandbox>, new: &Arc<Sandbox>) -> Result<(), ApiError> {
        let _no_transition_of_the_old = old.transition.lock().await;
        let (mut old_record, mut new_record) = (old.snapshot(), new.snapshot());
        let reason = record::reason(ReasonCode::Replaced, format!("replaced by {}", new_record.id));
        old_record.enter(Status::Removed, Some(reason));
        new_record.waiting_to_replace = false;
        new_record.enter(Status::Running, None);
        new_record.started_at = Some(new_record.status_changed_at);
        let moved: Vec<_> =
            self.rows_of(&old_record.id).into_iter().filter(|row| new_record.open_ports.contains(&row.port)).collect();
        self.store.replace(&old_record.row(), &new_record.row(), &moved).await.map_err(errors::store)?;
        *old.record() = old_record.clone();
        *new.record() = new_record;
        self.reload_endpoints().await?;
        old.changed.send_replace(());
        new.changed.send_replace(());
        let (plane, old) = (Arc::clone(self), Arc::clone(old));
        tokio::spawn(async move {
            // Answers that are on their way get through.
            tokio::time::sleep(Duration::from_secs(2)).await;
            old.set_vm(None);
            if let Err(error) = plane.driver.destroy(&old_record.id).await {
                tracing::error!(%error, "a replaced sandbox could not be removed");
            }
        });
        Ok(())
    }
}

fn vm_spec(record: &Record, kernel: heyvm_images::Kernel, image: heyvm_images::Image) -> VmSpec {
    let mut env = record.image_env.clone();
    env.extend(record.env_vars.clone());
    VmSpec {
        kernel,
        image,
        memory_mib: record.size_class.memory_mib(),
        cpu_millis: record.size_class.cpu_millis(),
        disk_gib: record.disk_gib,
        hostname: if record.slug.is_empty() { "sandbox".into() } else { record.slug.clone() },
        env,
        working_dir: record.working_directory.clone(),
    }
}

/// The image must be able to run what the type promises.
async fn check_type(vm: &Arc<dyn Vm>, kind: Option<&str>) -> Result<(), ApiError> {
    let program = match kind {
        Some("python") => "python3",
        Some("node") => "node",
        _ => return Ok(()),
    };
    let (exit, _) = run(vm, &format!("command -v {program}")).await?;
    if exit.code == 0 {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, format!("the image has no {program}"))
        .hint("use an image that has it, or leave the type out"))
}

async fn run_hook(vm: &Arc<dyn Vm>, hook: &str) -> Result<(), ApiError> {
    let (exit, output) = run(vm, hook).await?;
    if exit.code == 0 {
        return Ok(());
    }
    let shown: String = hook.chars().take(80).collect();
    Err(ApiError::new(ErrorCode::SetupHookFailed, format!("setup hook `{shown}` exited with {}", exit.code))
        .hint("the last lines of its output say why; --keep-on-failure keeps the sandbox to look into")
        .log_tail(tail(&output)))
}

/// Runs a script and keeps the end of its output.
async fn run(vm: &Arc<dyn Vm>, script: &str) -> Result<(Exit, Vec<u8>), ApiError> {
    let start = ExecStart { argv: vec![script.to_owned()], shell: true, ..ExecStart::default() };
    // The stream of input stays open until the end: its end would be the host's leave.
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let _ = sender.send(ExecInput { kind: Some(exec_input::Kind::Start(start)) }).await;
    let mut client = vm.agent().client().await.map_err(errors::vm)?;
    let input = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut messages = client.exec(input).await.map_err(|status| errors::agent(&status))?.into_inner();
    let mut output = Vec::new();
    while let Some(message) = messages.message().await.map_err(|status| errors::agent(&status))? {
        match message.kind {
            Some(exec_output::Kind::Stdout(data) | exec_output::Kind::Stderr(data)) => {
                output.extend(data);
                if output.len() > 2 * TAIL_BYTES {
                    output.drain(..output.len() - TAIL_BYTES);
                }
            }
            Some(exec_output::Kind::Exit(exit)) => return Ok((exit, output)),
            _ => {}
        }
    }
    Err(ApiError::new(ErrorCode::SandboxUnreachable, "the sandbox's agent went away"))
}

/// The last lines of what a guest printed, fit to be shown.
pub(crate) fn tail(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control() || *c == '\t').take(TAIL_WIDTH).collect())
        .collect();
    lines.split_off(lines.len().saturating_sub(TAIL_LINES))
}

/// A client that goes away takes its half-made sandbox along.
struct UndoOnDrop {
    plane: Arc<ControlPlane>,
    sandbox: Option<Arc<Sandbox>>,
}

impl UndoOnDrop {
    fn disarm(mut self) {
        self.sandbox = None;
    }
}

impl Drop for UndoOnDrop {
    fn drop(&mut self) {
        let Some(sandbox) = self.sandbox.take() else { return };
        let plane = Arc::clone(&self.plane);
        tokio::spawn(async move {
            let reason =
                record::reason(ReasonCode::FailedStep, "the client went away while the sandbox was being made");
            let _one_transition = sandbox.transition.lock().await;
            plane.destroy(&sandbox, reason).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_short_and_clean() {
        let output = format!("first\n{}\x1b[31mlast\n", "line\n".repeat(30));
        let lines = tail(output.as_bytes());
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines.last().unwrap(), "[31mlast");
    }
}
