fn main() {
    let home = std::path::PathBuf::from(std::env::args().nth(1).unwrap());
    std::fs::create_dir_all(&home).unwrap();
    let store = heyvm_images::ImageStore::open(&home).unwrap();
    println!("{:?}", store.import_kernel(std::path::Path::new(&std::env::args().nth(2).unwrap())));
    let rt = tokio::runtime::Runtime::new().unwrap();
    println!("{:?}", rt.block_on(store.kernel()));
    println!("{:?}", rt.block_on(store.resolve("ubuntu:24.04", "ubuntu:24.04", std::sync::Arc::new(|m, _, _| println!("{m}")))));
}
