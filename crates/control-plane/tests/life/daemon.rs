//! A control plane on a home of its own, which can die and be opened again while its machines run on.

use std::{
    fs,
    io::Write,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_api::{ApiError, sandbox::*};
use heyvm_control_plane::{Asked, Config, ControlPlane, LogQuery, Who};
use heyvm_store::Store;
use heyvm_vm::Driver;
use tokio::runtime::Runtime;

use crate::machines::Machines;

/// A home with a control plane, or none at the moment.
pub struct Daemon {
    home: tempfile::TempDir,
    pub machines: Arc<Machines>,
    life: Option<(Runtime, Arc<ControlPlane>)>,
}

impl Daemon {
    pub fn new() -> Self {
        let home = tempfile::Builder::new().prefix("hv-cp-").tempdir_in("/tmp").unwrap();
        prepare_images(home.path());
        let machines = Machines::new(&home.path().join("sandboxes"));
        let mut daemon = Self { home, machines, life: None };
        daemon.revive();
        daemon
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn plane(&self) -> &Arc<ControlPlane> {
        &self.life.as_ref().unwrap().1
    }

    /// As SIGKILL does it: nothing is said to anyone.
    pub fn die(&mut self) {
        let (runtime, plane) = self.life.take().unwrap();
        runtime.shutdown_timeout(Duration::from_secs(5));
        drop(plane);
    }

    pub fn revive(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let plane = runtime.block_on(async {
            let store = Store::open(&self.home().join("heyvm.db")).await.unwrap();
            let images = Arc::new(heyvm_images::ImageStore::open(self.home(), Default::default()).unwrap());
            ControlPlane::open(self.config(), store, Arc::clone(&self.machines) as Arc<dyn Driver>, images)
                .await
                .unwrap()
        });
        self.life = Some((runtime, plane));
    }

    fn config(&self) -> Config {
        Config {
            home: self.home().to_owned(),
            base_domain: "localhost".into(),
            url_scheme: "http".into(),
            url_port: 8480,
            regions: vec!["US".into()],
            default_image: "test:1".into(),
            images: Default::default(),
            guest: Default::default(),
        }
    }

    /// Runs a call of the control plane to its end.
    pub fn run<T>(&self, call: impl Future<Output = T>) -> T {
        self.life.as_ref().unwrap().0.block_on(call)
    }

    /// Starts a call and goes on at once.
    pub fn spawn<T: Send + 'static>(
        &self,
        call: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.life.as_ref().unwrap().0.spawn(call)
    }

    /// A request with a directory of its own to work in.
    pub fn request(&self, name: &str) -> CreateRequest {
        CreateRequest {
            name: Some(name.into()),
            working_directory: Some(self.home().join("work").join(name).to_str().unwrap().into()),
            health_timeout_seconds: Some(10.0),
            ..CreateRequest::default()
        }
    }

    pub fn create(&self, request: CreateRequest) -> Result<SandboxInfo, ApiError> {
        self.create_with(request, None)
    }

    pub fn create_with(&self, request: CreateRequest, key: Option<&str>) -> Result<SandboxInfo, ApiError> {
        self.run(self.plane().create(request, key.map(keyed).unwrap_or_default(), sink()))
    }

    pub fn get(&self, who: &str) -> SandboxInfo {
        self.run(self.plane().get(&Who::owners(who))).unwrap()
    }

    pub fn list(&self, filter: ListFilter) -> Vec<SandboxInfo> {
        self.run(self.plane().list(filter, None)).unwrap()
    }

    /// Waits until the sandbox has this status.
    #[track_caller]
    pub fn becomes(&self, who: &str, status: Status) -> SandboxInfo {
        eventually(&format!("{who} becomes {status:?}"), || {
            let info = self.get(who);
            if info.status == status { Ok(info) } else { Err(format!("{:?} {:?}", info.status, info.reason)) }
        })
    }

    pub fn log(&self, who: &str) -> String {
        use futures::TryStreamExt;
        let all = self.run(async {
            let chunks = self.plane().logs(&Who::owners(who), LogQuery::default()).await.unwrap();
            chunks.map_ok(|chunk| chunk.data.to_vec()).try_concat().await.unwrap()
        });
        String::from_utf8(all).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.life.is_some() {
            self.die();
        }
        for id in self.machines.running() {
            futures::executor::block_on(self.machines.destroy(&id)).unwrap();
        }
    }
}

/// Asked by the owner with an idempotency key.
pub fn keyed(key: &str) -> Asked {
    Asked { idempotency_key: Some(key.into()), ..Asked::default() }
}

/// Where nobody looks at the progress.
pub fn sink() -> heyvm_control_plane::ProgressSink {
    tokio::sync::mpsc::unbounded_channel().0
}

#[track_caller]
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match look() {
            Ok(found) => return found,
            Err(last) => assert!(Instant::now() < deadline, "{what}: {last}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A port that nobody has.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A shell command that serves HTTP on a port: any path but /missing is there, and says `word`.
pub fn server(port: u16, word: &str) -> String {
    format!(
        "exec python3 -c '
import http.server
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if self.path == \"/missing\" else 200)
        self.end_headers()
        self.wfile.write(b\"{word}\")
http.server.HTTPServer((\"127.0.0.1\", {port}), Answer).serve_forever()'"
    )
}

/// Names and digests of an image and a kernel; nobody boots them.
fn prepare_images(home: &Path) {
    have_image(home, "test:1", "00");
    let kernel = home.join("kernels/1.0");
    fs::create_dir_all(&kernel).unwrap();
    fs::write(kernel.join("vmlinuz"), "").unwrap();
    fs::write(kernel.join("order"), "").unwrap();
    // A kernel goes with the agent that lies beside the program.
    let agent = std::env::current_exe().unwrap().parent().unwrap().join("heyvm-agent");
    if let Ok(mut file) = fs::File::create_new(agent) {
        file.write_all(b"not run").unwrap();
    }
}

/// From now on the name means the image of this digest.
pub fn have_image(home: &Path, name: &str, digest: &str) {
    let image = home.join(format!("images/sha256-{digest}"));
    fs::create_dir_all(&image).unwrap();
    fs::write(image.join("root.erofs"), "").unwrap();
    let told = format!(
        r#"{{"name":"{name}","digest":"sha256:{digest}","rootfs":"","size_bytes":0,"config":{{"env":[],"working_dir":null}},"created_at":0,"source":"import"}}"#
    );
    fs::write(image.join("image.json"), told).unwrap();
    let index = format!(r#"{{"{name}":"sha256:{digest}"}}"#);
    fs::write(home.join("images/index.json"), index).unwrap();
}
