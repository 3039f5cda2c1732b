//! Talks to an agent behind a Unix socket, for debugging: `talk SOCKET CALL [ARGUMENT…]`.
//!
//! ```text
//! cargo run --release -p heyvm-agent-protocol --example talk -- agent.sock exec -- ls -l /
//! ```

use std::{
    error::Error,
    io::{self, Write},
    time::{Duration, Instant, SystemTime},
};

use heyvm_agent_protocol::{
    hello, ports,
    v1::{agent_client::AgentClient, exec_input, exec_output, *},
};
use hyper_util::rt::TokioIo;
use tokio::{io::BufReader, net::UnixStream};
use tonic::transport::{Channel, Endpoint};

type Client = AgentClient<Channel>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, call, rest @ ..] = arguments.as_slice() else {
        return Err("usage: talk SOCKET CALL [ARGUMENT…]".into());
    };
    if call == "dial" {
        return dial(socket, rest).await;
    }
    let began = Instant::now();
    let mut client = connect(socket.clone()).await?;
    let connected = began.elapsed();
    match call.as_str() {
        "personalize" => println!("{:?}", personalize(&mut client, false).await?),
        "reserve" => println!("{:?}", personalize(&mut client, true).await?),
        "warm-up" => println!("{:?}", client.warm_up(WarmUpRequest {}).await?.into_inner()),
        "exec" => print!("{}", exec(&mut client, rest).await?.text()),
        "bench" => bench(&mut client, rest).await?,
        "flood" => flood(&mut client, rest).await?,
        "main" => {
            let start = ExecStart { argv: rest.to_vec(), shell: true, ..ExecStart::default() };
            println!(
                "{:?}",
                client.start_main(StartMainRequest { start: Some(start), ..Default::default() }).await?.into_inner()
            );
        }
        "watch" => {
            let mut events = client.watch_main(WatchMainRequest { from_offset: 0 }).await?.into_inner();
            while let Some(event) = events.message().await? {
                println!("{event:?}");
            }
        }
        "port" => {
            let port = rest.first().map_or(Ok(80), |port| port.parse())?;
            println!("{:?}", client.port_status(PortStatusRequest { port, wait_ms: 0 }).await?.into_inner());
        }
        "clock" => {
            let adjust_ns = rest.first().map_or(Ok(0), |by| by.parse())?;
            let now = client.clock(ClockRequest { adjust_ns }).await?.into_inner().unix_time_ns;
            println!("{}.{:09}", now / 1_000_000_000, now % 1_000_000_000);
        }
        "metrics" => println!("{:?}", client.metrics(MetricsRequest {}).await?.into_inner()),
        "shutdown" => println!("{:?}", client.shutdown(ShutdownRequest { grace_ms: 2000 }).await?.into_inner()),
        other => return Err(format!("there is no call {other}").into()),
    }
    eprintln!("connected after {connected:.1?}, done after {:.1?}", began.elapsed());
    Ok(())
}

async fn greet(socket: &str) -> io::Result<BufReader<UnixStream>> {
    let mut stream = BufReader::new(UnixStream::connect(socket).await?);
    let nonce = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_nanos());
    hello::greet(&mut stream, &format!("{nonce:032x}")).await?;
    Ok(stream)
}

async fn connect(socket: String) -> Result<Client, tonic::transport::Error> {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(greet(&socket).await?)) }
    });
    let endpoint = Endpoint::from_static("http://agent")
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(8 << 20);
    Ok(AgentClient::new(endpoint.connect_with_connector(connector).await?))
}

async fn personalize(client: &mut Client, reserve: bool) -> Result<PersonalizeReply, Box<dyn Error>> {
    let mut entropy = vec![0; 64];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut entropy)?;
    let network = Network {
        address: "10.0.2.15".into(),
        prefix: 24,
        gateway: "10.0.2.2".into(),
        nameservers: vec!["10.0.2.3".into()],
        mtu: 0,
    };
    let request = PersonalizeRequest {
        disk_bytes: 0,
        unix_time_ns: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos().try_into()?,
        hostname: "box".into(),
        machine_id: entropy[..16].iter().map(|byte| format!("{byte:02x}")).collect(),
        network: Some(network),
        env: vec![EnvVar { name: "GREETING".into(), value: "hello".into() }],
        working_dir: "/workspace".into(),
        entropy,
        reserve,
        ..PersonalizeRequest::default()
    };
    Ok(client.personalize(request).await?.into_inner())
}

#[derive(Default)]
struct Ran {
    output: Vec<u8>,
    bytes: usize,
    exit: Option<Exit>,
}

impl Ran {
    fn text(&self) -> String {
        format!("{}{:?}\n", String::from_utf8_lossy(&self.output), self.exit)
    }
}

/// Options before `--`: `--shell`, `--session NAME`, `--user NAME`, `--timeout MS`, `--cwd DIR`, `--pty`.
fn start(arguments: &[String]) -> ExecStart {
    let mut start = ExecStart::default();
    let mut arguments = arguments.iter().cloned();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--shell" => start.shell = true,
            "--pty" => start.pty = Some(Pty { cols: 80, rows: 24, term: String::new() }),
            "--session" => start.session = arguments.next().unwrap_or_default(),
            "--user" => start.user = arguments.next().unwrap_or_default(),
            "--cwd" => start.cwd = arguments.next().unwrap_or_default(),
            "--timeout" => start.timeout_ms = arguments.next().and_then(|ms| ms.parse().ok()).unwrap_or_default(),
            "--" => break,
            _ => {
                start.argv.push(argument);
                break;
            }
        }
    }
    start.argv.extend(arguments);
    start
}

async fn exec(client: &mut Client, arguments: &[String]) -> Result<Ran, Box<dyn Error>> {
    let first = ExecInput { kind: Some(exec_input::Kind::Start(start(arguments))) };
    // The host's side stays open, as it does for a command that may be sent signals.
    let requests = tokio_stream::StreamExt::chain(tokio_stream::once(first), tokio_stream::pending());
    let mut replies = client.exec(requests).await?.into_inner();
    let mut ran = Ran::default();
    while let Some(reply) = replies.message().await? {
        match reply.kind {
            Some(exec_output::Kind::Stdout(data) | exec_output::Kind::Stderr(data)) => {
                ran.bytes += data.len();
                if ran.output.len() < 1 << 20 {
                    ran.output.extend(data);
                }
            }
            Some(exec_output::Kind::Exit(exit)) => ran.exit = Some(exit),
            Some(exec_output::Kind::Started(_) | exec_output::Kind::StdinTaken(_)) | None => {}
        }
    }
    Ok(ran)
}

/// Runs a command over and over: `bench [TIMES] [COMMAND…]`.
async fn bench(client: &mut Client, arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let times = arguments.first().map_or(Ok(50), |times| times.parse::<usize>())?;
    let command = if arguments.len() > 1 { arguments[1..].to_vec() } else { vec!["true".to_owned()] };
    let mut took = Vec::new();
    for _ in 0..times {
        let began = Instant::now();
        let ran = exec(client, &command).await?;
        took.push(began.elapsed());
        if ran.exit.as_ref().is_none_or(|exit| exit.code != 0) {
            return Err(ran.text().into());
        }
    }
    let first = took[0];
    took.sort_unstable();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    println!("first {first:.1?} min {:.1?} median {:.1?} p95 {:.1?}", took[0], at(50), at(95));
    Ok(())
}

/// Has a command print so many MB: `flood [MB]`.
async fn flood(client: &mut Client, arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let megabytes = arguments.first().map_or(Ok(100), |mb| mb.parse::<usize>())?;
    let script = format!("head -c {megabytes}000000 /dev/zero");
    let began = Instant::now();
    let ran = exec(client, &["--shell".into(), script]).await?;
    let seconds = began.elapsed().max(Duration::from_nanos(1)).as_secs_f64();
    println!("{} bytes in {seconds:.2} s: {:.1} MB/s; {:?}", ran.bytes, ran.bytes as f64 / seconds / 1e6, ran.exit);
    io::stdout().flush()?;
    Ok(())
}

/// Standard input to a port of the guest, what comes back to standard output: `ports.sock dial PORT`.
async fn dial(socket: &str, arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let port = arguments.first().map_or("80", String::as_str);
    let (sender, connection) = ports::client().handshake::<_, bytes::Bytes>(greet(socket).await?).await?;
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://ports/{port}")).body(())?;
    let (answer, send) = sender.ready().await?.send_request(request, false)?;
    let answer = answer.await?;
    if !answer.status().is_success() {
        return Err(format!("status {}", answer.status()).into());
    }
    let (mut from, mut to) = ports::Stream::new(answer.into_body(), send).into_split();
    tokio::spawn(async move {
        tokio::io::copy(&mut tokio::io::stdin(), &mut to).await.ok();
        tokio::io::AsyncWriteExt::shutdown(&mut to).await.ok();
        to.reset().await;
    });
    tokio::io::copy(&mut from, &mut tokio::io::stdout()).await?;
    Ok(())
}
