//! docs/settings.md: every setting with its type, default and meaning, made from the types that read the files, so that
//! none is missing or out of date.

use std::{collections::BTreeMap, fs, path::Path};

use heyvm_api::sandbox::SizeClass;
use serde_json::Value;
use syn::{Attribute, Expr, Fields, GenericArgument, Item, Lit, Meta, PathArguments, Type};

use crate::{cloud::config::ServerConfig, config::Config};

/// Files with types that settings are read into, from the crates' directory.
const CONFIG: [&str; 2] = ["server/src/config.rs", "images/src/credentials.rs"];
const SERVER: [&str; 4] =
    ["server/src/cloud/config.rs", "cloud/src/quotas.rs", "archives/src/settings.rs", "server/src/config.rs"];

const HEAD: &str = "\
# Settings

Made from the types that read them: `HEYVM_UPDATE_DOCS=1 cargo test -p heyvm-server` writes it again.
Every key is optional unless its default says *required*; an unknown key is an error that names it.
";
const CONFIG_HEAD: &str = "\
## `~/.heyo/config.toml`: this machine's daemon

Read when the daemon starts: run `heyvm daemon restart` after a change (sandboxes keep running).
";
const SERVER_HEAD: &str = "\
## `~/.heyo/server.toml`: `heyvm server run`

Or the file that `--config` names. [server.md](server.md) has an example.
";
const ENVIRONMENT: &str = "\
## Environment

| variable | what |
| --- | --- |
| `HEYO_HOME` | directory of all state instead of `~/.heyo` |
| `HEYO_CLOUD_URL`, `HEYO_API_KEY`, `HEYO_ARCHIVE_TOKEN` | server to use, and credentials for it, where no login is wanted |
| `JWT_SECRET` | secret of the tokens that `heyvm --api` accepts |
| `HEYVM_STORE` | store of `heyvm server`, where `server.toml` names none |
| `HEYVM_AGENT` | the agent's program, where it does not lie beside `heyvm` |
| `HEYVM_LOG` | what the daemon logs, for example `debug` or `heyvm_vm=trace` |
| `DOCKER_CONFIG` | directory of the `config.json` with credentials for registries |
";
const SIZES: &str = "\
## Size classes (`--size-class`)

| class | processors | memory |
| --- | --- | --- |
";
const DEFAULTS: &str = "
A sandbox that names none is `small`. Its disk has 10 GB unless `--disk-size-gb` says otherwise; only what is written
takes space on the host.

## Reaching the local network

Sandboxes reach the internet, and neither this host nor private ranges. To let them reach one:

```toml
[network]
allow = [\"192.168.1.0/24\"]
```
";

/// A key of a table.
struct Key {
    name: String,
    doc: String,
    kind: Type,
    /// Whether it may be left out.
    optional: bool,
}

/// The types of the files, by name: the keys of each and its own meaning.
type Tables = BTreeMap<String, (String, Vec<Key>)>;

fn tables(files: &[&str]) -> Tables {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut tables = Tables::new();
    for file in files {
        let source = fs::read_to_string(crates.join(file)).unwrap();
        for item in syn::parse_file(&source).unwrap().items {
            let (name, doc, keys) = match item {
                Item::Struct(item) => (item.ident, doc(&item.attrs), keys_of(&item.attrs, &item.fields)),
                Item::Enum(item) => {
                    let keys = item.variants.iter().filter_map(|variant| {
                        let kind = variant.fields.iter().next()?.ty.clone();
                        Some(Key {
                            name: variant.ident.to_string().to_lowercase(),
                            doc: doc(&variant.attrs),
                            kind,
                            optional: true,
                        })
                    });
                    (item.ident, doc(&item.attrs), keys.collect())
                }
                _ => continue,
            };
            tables.entry(name.to_string()).or_insert((doc, keys));
        }
    }
    tables
}

fn keys_of(attrs: &[Attribute], fields: &Fields) -> Vec<Key> {
    let serde = |attrs: &[Attribute], word: &str| serde_attribute(attrs).iter().any(|text| text == word);
    let named = fields.iter().filter(|field| !serde(&field.attrs, "skip"));
    let keys = named.filter_map(|field| {
        let renamed = serde_attribute(&field.attrs)
            .into_iter()
            .find_map(|text| text.strip_prefix("rename = ").map(|name| name.trim_matches('"').to_owned()));
        let name = renamed.or_else(|| field.ident.as_ref().map(ToString::to_string))?;
        let optional = serde(attrs, "default") || serde(&field.attrs, "default");
        Some(Key { name, doc: doc(&field.attrs), kind: field.ty.clone(), optional })
    });
    keys.collect()
}

/// The parts of `#[serde(…)]`, as text.
fn serde_attribute(attrs: &[Attribute]) -> Vec<String> {
    let mut parts = Vec::new();
    for attribute in attrs.iter().filter(|attribute| attribute.path().is_ident("serde")) {
        let read = attribute.parse_nested_meta(|meta| {
            let name = meta.path.get_ident().map(ToString::to_string).unwrap_or_default();
            match meta.value() {
                Ok(value) => {
                    let literal: Lit = value.parse()?;
                    if let Lit::Str(text) = literal {
                        parts.push(format!("{name} = {:?}", text.value()));
                    }
                }
                Err(_) => parts.push(name),
            }
            Ok(())
        });
        read.unwrap();
    }
    parts
}

fn doc(attrs: &[Attribute]) -> String {
    let lines = attrs.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => match &pair.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => Some(text.value().trim().to_owned()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    });
    lines.collect::<Vec<_>>().join(" ")
}

/// The last name of a type's path and what stands in its angle brackets.
fn parts(kind: &Type) -> (String, Vec<Type>) {
    let Type::Path(path) = kind else { panic!("a setting is of a named type") };
    let last = path.path.segments.last().unwrap();
    let inner = match &last.arguments {
        PathArguments::AngleBracketed(arguments) => arguments.args.iter().filter_map(|argument| match argument {
            GenericArgument::Type(kind) => Some(kind.clone()),
            _ => None,
        }),
        _ => return (last.ident.to_string(), Vec::new()),
    };
    (last.ident.to_string(), inner.collect())
}

/// Writes the table of one type, then those of the types in it.
fn describe(tables: &Tables, type_name: &str, place: &str, default: &Value, page: &mut String) {
    let (_, keys) = &tables[type_name];
    let mut inner = Vec::new();
    let mut rows = String::new();
    for key in keys {
        let value = default.get(&key.name);
        let (mut kind, mut arguments) = parts(&key.kind);
        let mut header = join(place, &key.name);
        let mut is_list = false;
        let mut is_optional = false;
        while let "Option" | "Vec" | "BTreeMap" = kind.as_str() {
            is_list |= kind == "Vec";
            is_optional |= kind == "Option";
            if kind == "BTreeMap" {
                header = join(place, "NAME");
            }
            (kind, arguments) = parts(&arguments.pop().unwrap());
        }
        if tables.contains_key(&kind) {
            let brackets = if is_list { format!("[[{header}]]") } else { format!("[{header}]") };
            let doc = if key.doc.is_empty() { tables[&kind].0.clone() } else { key.doc.clone() };
            inner.push((kind, brackets, header, value.cloned().unwrap_or_default(), doc));
            continue;
        }
        let default = match value {
            Some(Value::Null) => "-".to_owned(),
            Some(value) => format!("`{value}`"),
            None if default.is_null() && !is_optional && !key.optional => "*required*".into(),
            None => "-".into(),
        };
        let word = word(&kind);
        let word = if is_list { format!("list of {word}s") } else { word.to_owned() };
        rows.push_str(&format!("| `{}` | {word} | {default} | {} |\n", key.name, key.doc));
    }
    if !rows.is_empty() {
        page.push_str(&format!("\n| key | type | default | what |\n| --- | --- | --- | --- |\n{rows}"));
    }
    for (kind, brackets, header, value, doc) in inner {
        let titled = tables[&kind].1.iter().any(|key| !tables.contains_key(&parts(&key.kind).0));
        if titled && parts_are_plain(tables, &kind) {
            page.push_str(&format!("\n### `{brackets}`\n\n{doc}\n"));
        }
        describe(tables, &kind, &header, &value, page);
    }
}

/// Whether the type has keys of its own, rather than tables of a name that the user chooses.
fn parts_are_plain(tables: &Tables, type_name: &str) -> bool {
    tables[type_name].1.iter().any(|key| parts(&key.kind).0 != "BTreeMap")
}

fn join(place: &str, name: &str) -> String {
    if place.is_empty() { name.to_owned() } else { format!("{place}.{name}") }
}

fn word(kind: &str) -> &'static str {
    match kind {
        "String" => "text",
        "bool" => "true or false",
        "u16" | "u32" | "u64" | "i64" | "usize" | "f64" | "NonZeroU32" => "number",
        "IpAddr" => "address",
        "SocketAddr" => "address and port",
        "PathBuf" => "path",
        "Url" => "URL",
        "IpNet" => "range",
        other => panic!("settings of type {other} need a word here"),
    }
}

fn page() -> String {
    let mut page = format!("{HEAD}\n{CONFIG_HEAD}");
    describe(&tables(&CONFIG), "Config", "", &serde_json::to_value(Config::default()).unwrap(), &mut page);
    page.push_str(&format!("\n{SERVER_HEAD}"));
    let server = serde_json::to_value(ServerConfig::default()).unwrap();
    describe(&tables(&SERVER), "ServerConfig", "", &server, &mut page);
    page.push_str(&format!("\n{ENVIRONMENT}\n{SIZES}"));
    for class in SizeClass::ALL {
        let (processors, memory) = (f64::from(class.cpu_millis()) / 1000.0, class.memory_mib());
        page.push_str(&format!("| `{}` | {processors} | {} GiB |\n", class.as_str(), memory as f64 / 1024.0));
    }
    page + DEFAULTS
}

#[test]
fn settings_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/settings.md");
    let page = page();
    if std::env::var_os("HEYVM_UPDATE_DOCS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == page, "docs/settings.md is not up to date: HEYVM_UPDATE_DOCS=1 cargo test -p heyvm-server");
}

#[test]
fn settings_page_names_every_kind_of_setting() {
    let page = page();
    for key in [
        "`reserve`",
        "`[edge]`",
        "`base_domain`",
        "`[network]`",
        "`mirrors`",
        "`[archives.s3]`",
        "`[[region]]`",
        "`max_running`",
    ] {
        assert!(page.contains(key), "{key}: {page}");
    }
}
