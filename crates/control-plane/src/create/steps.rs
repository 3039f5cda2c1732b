//! The steps of a deploy, from the image to the first healthy answer. They may be cut off at any point.

use std::sync::Arc;

use heyvm_agent_protocol::v1::UnpackInput;
use heyvm_api::{ApiError, ErrorCode, sandbox::CreateRequest, system::ProgressEvent};
use heyvm_images::{Requester, Variant, Wanted};
use heyvm_vm::{Rehearsal, Vm, VmSpec};

use crate::{
    Account, ControlPlane, ProgressSink, Sandbox, archives, begin_step,
    blocking::blocking,
    errors,
    guest_command::run,
    hooks::{self, HookOutput},
    image_run::{self, ImageRun},
    main_command::Main,
    orphans,
    record::Record,
};

/// A sandbox that is ready but not yet told of.
pub(super) struct Prepared {
    pub vm: Arc<dyn Vm>,
    pub main: Option<Main>,
}

impl ControlPlane {
    /// Every step up to the moment at which it could be told to the world.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        request: &CreateRequest,
        progress: &ProgressSink,
    ) -> Result<Prepared, ApiError> {
        begin_step(sandbox, progress, "image", "looking for the image");
        let spec = self.prepare_image(sandbox, request, progress).await.map_err(|error| error.step("image"))?;
        begin_step(sandbox, progress, "template", "preparing the template");
        let record = sandbox.snapshot();
        self.driver
            .prepare(&spec, self.forward(progress, "template"))
            .await
            .map_err(|error| errors::vm(error).step("vm"))?;
        begin_step(sandbox, progress, "vm", "starting the VM");
        let vm = self.driver.create(&record.id, &spec).await.map_err(|error| errors::vm(error).step("vm"))?;
        sandbox.set_vm(Some(Arc::clone(&vm)));
        orphans::keep_note(self.driver.as_ref(), &self.store_id, &sandbox.snapshot()).await;
        check_type(&vm, request.sandbox_type.as_deref()).await.map_err(|error| error.step("image"))?;
        if let Some(archive) = &record.archive_id {
            begin_step(sandbox, progress, "unpack", "unpacking the archive");
            let unpacked = self.unpack(
                &vm,
                &record.account,
                archive,
                record.archive_root.as_deref(),
                &record.working_directory,
                false,
            );
            unpacked.await.map_err(|error| error.step("unpack"))?;
        }
        // Behind the archive: what lies below a mount stays in the sandbox, and nothing is unpacked to this host.
        self.mount_all(sandbox, &vm).await.map_err(|error| error.step("mount"))?;
        let mut output = HookOutput::new(self, sandbox, progress);
        for hook in &record.setup_hooks {
            begin_step(sandbox, progress, hooks::STEP, hook);
            output.run(&vm, hook).await.map_err(|error| error.step(hooks::STEP))?;
        }
        let mut main = self.run_start_command(sandbox, &vm, progress).await?;
        for port in &record.open_ports {
            self.bind_port(record.id.clone(), *port, record.ports_are_public)
                .await
                .map_err(|error| error.step("bind"))?;
        }
        self.wait_until_ready(sandbox, &vm, main.as_mut(), progress).await?;
        Ok(Prepared { vm, main })
    }

    /// Image and kernel, and from them what the VM is made from.
    async fn prepare_image(
        &self,
        sandbox: &Arc<Sandbox>,
        request: &CreateRequest,
        progress: &ProgressSink,
    ) -> Result<VmSpec, ApiError> {
        let named = request.image.as_deref();
        // Fetching or building an image takes a minute; that there is no kernel for it is known at once.
        let kernel = self.images.kernel().await.map_err(errors::image)?;
        let resolved = self.claim_image(sandbox, request, progress).await?;
        let record = self
            .save(sandbox, |record| {
                record.image_env.clone_from(&resolved.image.config.env);
                record.image_run = ImageRun::of(&resolved.image.config);
                if let Some(directory) = image_run::working_directory(&resolved.image.config)
                    && request.working_directory.is_none()
                {
                    record.working_directory = directory;
                }
                if resolved.stands_in {
                    record.image.clone_from(&resolved.image.name);
                    record.image_requested = named.map(str::to_owned);
                    record.warnings.extend(resolved.substituted.clone());
                }
            })
            .await?;
        Ok(self.vm_spec(&record, kernel, resolved.image))
    }

    /// The VM that a sandbox of nothing but defaults would have.
    pub(crate) async fn default_spec(&self, record: &Record, progress: &ProgressSink) -> Result<VmSpec, ApiError> {
        let kernel = self.images.kernel().await.map_err(errors::image)?;
        let wanted = Wanted {
            named: None,
            default_image: self.config.default_image.clone(),
            full: false,
            requester: Requester::Operator,
        };
        // What an earlier version has built may lack what this one puts in.
        if let Some(old) = self.images.stand_in(Variant::Base).await
            && self.images.get(&wanted.default_image).await.is_none()
            && let Err(error) = self.images.build_default(Variant::Base, self.forward(progress, "image")).await
        {
            tracing::warn!(%error, image = old.name, "the default image could not be brought up to date");
        }
        let resolved = self.images.resolve(&wanted, self.forward(progress, "image")).await.map_err(errors::image)?;
        Ok(self.vm_spec(record, kernel, resolved.image))
    }

    /// The VM of an existing record: the very image its disk lies over must still be here.
    pub(crate) async fn spec_of(&self, record: &Record) -> Result<VmSpec, ApiError> {
        let digest = record.image_digest.as_deref().unwrap_or("unknown");
        let image = self.images.with_digest(digest).await.ok_or_else(|| {
            ApiError::new(ErrorCode::ImageNotFound, format!("the sandbox's image {} ({digest}) is gone", record.image))
                .hint("heyvm pull NAME@DIGEST brings the same one back; another one does not fit the sandbox's disk")
        })?;
        self.images.touch(&image.digest).await;
        let kernel = self.images.kernel().await.map_err(errors::image)?;
        Ok(self.vm_spec(record, kernel, image))
    }

    /// Progress of the parts below, as events of ours.
    pub(crate) fn forward(&self, progress: &ProgressSink, step: &'static str) -> heyvm_vm::Progress {
        let progress = progress.clone();
        Arc::new(move |message, done, total| {
            let event = ProgressEvent { done, total, ..ProgressEvent::new(step, message) };
            progress.send(event).ok();
        })
    }

    /// Unpacks an archive, or one directory of it, into a directory; with `clean`, nothing else is left in it.
    pub(crate) async fn unpack(
        &self,
        vm: &Arc<dyn Vm>,
        account: &Account,
        archive: &str,
        root: Option<&str>,
        directory: &str,
        clean: bool,
    ) -> Result<(), ApiError> {
        let (home, id) = (self.config.home.clone(), archive.to_owned());
        let pieces = blocking(move || archives::read(&home, &id)).await.flatten()?;
        let limits = archives::limits(account);
        let first = UnpackInput {
            path: directory.to_owned(),
            root: root.unwrap_or_default().to_owned(),
            clean,
            as_user: true,
            max_bytes: limits.unpacked,
            max_entries: limits.entries,
            ..UnpackInput::default()
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let feeding = tokio::task::spawn_blocking(move || {
            // An agent that has gone takes nothing of what follows either.
            sender.blocking_send(first).ok();
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

    fn vm_spec(&self, record: &Record, kernel: heyvm_images::Kernel, image: heyvm_images::Image) -> VmSpec {
        let mut env = self.config.guest.env.clone();
        env.extend(record.image_env.clone());
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
            certificates: self.config.guest.certificates.clone(),
            user: record.image_run.user.clone(),
            rehearsal: record.start_command.as_ref().and_then(|command| Rehearsal::of(&command.to_string())),
        }
    }
}

/// The image must be able to run what the type promises.
async fn check_type(vm: &Arc<dyn Vm>, kind: Option<&str>) -> Result<(), ApiError> {
    let program = match kind {
        Some("python") => "python3",
        Some("node") => "node",
        Some("full") => "cc",
        _ => return Ok(()),
    };
    let (exit, _) = run(vm, &format!("command -v {program}")).await?;
    if exit.code == 0 {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, format!("the image has no {program}"))
        .hint("use an image that has it, or leave the type out"))
}
