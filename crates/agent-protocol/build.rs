//! Generates messages, client and server from `proto/agent.proto`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // What goes through a mount is large and is not copied on its way.
    tonic_prost_build::configure()
        .bytes(".heyvm.agent.v1.MountInput")
        .bytes(".heyvm.agent.v1.MountOutput")
        .compile_protos(&["proto/agent.proto"], &["proto"])?;
    Ok(())
}
