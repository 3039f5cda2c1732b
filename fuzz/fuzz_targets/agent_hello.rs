#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heyvm_fuzz_targets::agent_hello(data));
