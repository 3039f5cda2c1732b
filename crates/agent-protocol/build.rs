//! Generates messages, client and server from `proto/agent.proto`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tonic_prost_build::compile_protos("proto/agent.proto")?;
    Ok(())
}
