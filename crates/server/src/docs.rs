//! The OpenAPI document as a page to read: one file, no scripts, nothing from elsewhere.

use std::sync::LazyLock;

use askama::Template;
use serde_json::{Map, Value};

/// The page, made once.
pub fn page() -> &'static str {
    static PAGE: LazyLock<String> = LazyLock::new(|| page_of(&crate::routes::document()));
    &PAGE
}

/// A document as a page.
pub fn page_of(document: &utoipa::openapi::OpenApi) -> String {
    let document = serde_json::to_value(document).unwrap_or_default();
    // A template that compiles fails on a broken writer alone, and a string is none.
    Page::of(&document).render().unwrap_or_default()
}

#[derive(Template)]
#[template(path = "docs.html")]
struct Page {
    title: String,
    version: String,
    description: String,
    groups: Vec<Group>,
    types: Vec<Type>,
}

struct Group {
    name: String,
    description: String,
    calls: Vec<Call>,
}

struct Call {
    id: String,
    method: String,
    path: String,
    summary: String,
    more: Vec<String>,
    inputs: Vec<Field>,
    answers: Vec<Field>,
}

struct Field {
    name: String,
    kind: Kind,
    description: String,
}

/// What a value is, in words, and the type on this page that says more.
struct Kind {
    text: String,
    link: Option<String>,
}

struct Type {
    name: String,
    description: Vec<String>,
    values: Vec<String>,
    fields: Vec<Field>,
}

impl Page {
    fn of(document: &Value) -> Self {
        let info = &document["info"];
        Self {
            title: text(&info["title"]),
            version: text(&info["version"]),
            description: text(&info["description"]),
            groups: list(&document["tags"]).map(|tag| Group::of(tag, &document["paths"])).collect(),
            types: entries(&document["components"]["schemas"]).map(|(name, schema)| Type::of(name, schema)).collect(),
        }
    }
}

impl Group {
    fn of(tag: &Value, paths: &Value) -> Self {
        let calls = entries(paths).flat_map(|(path, item)| {
            entries(item)
                .filter(|(_, operation)| operation["tags"][0] == tag["name"])
                .map(|(method, operation)| Call::of(method, path, operation))
        });
        Self { name: text(&tag["name"]), description: text(&tag["description"]), calls: calls.collect() }
    }
}

impl Call {
    fn of(method: &str, path: &str, operation: &Value) -> Self {
        let parameters = list(&operation["parameters"]).map(|parameter| Field {
            name: text(&parameter["name"]),
            kind: Kind::of(&parameter["schema"], parameter["required"] == true).within(&text(&parameter["in"])),
            description: text(&parameter["description"]),
        });
        let body = &operation["requestBody"];
        let body = entries(&body["content"]).map(|(media, content)| Field {
            name: "body".into(),
            kind: Kind::of_content(media, content),
            description: text(&body["description"]),
        });
        let answers = entries(&operation["responses"]).map(|(status, answer)| Field {
            name: status.clone(),
            kind: entries(&answer["content"]).next().map_or_else(Kind::nothing, |(m, c)| Kind::of_content(m, c)),
            description: text(&answer["description"]),
        });
        Self {
            id: text(&operation["operationId"]),
            method: method.to_uppercase(),
            path: path.to_owned(),
            summary: text(&operation["summary"]),
            more: paragraphs(&operation["description"]),
            inputs: parameters.chain(body).collect(),
            answers: answers.collect(),
        }
    }
}

impl Type {
    fn of(name: &str, schema: &Value) -> Self {
        let required: Vec<&Value> = list(&schema["required"]).collect();
        let fields = entries(&schema["properties"]).map(|(name, property)| Field {
            name: name.clone(),
            kind: Kind::of(property, required.iter().any(|required| *required == name)),
            description: text(&property["description"]),
        });
        Self {
            name: name.to_owned(),
            description: paragraphs(&schema["description"]),
            values: list(&schema["enum"]).map(text).collect(),
            fields: fields.collect(),
        }
    }
}

impl Kind {
    fn nothing() -> Self {
        Self { text: String::new(), link: None }
    }

    fn of(schema: &Value, required: bool) -> Self {
        let mut kind = Self::of_value(schema);
        if required {
            kind.text.push_str(", required");
        }
        kind
    }

    /// JSON goes without saying.
    fn of_content(media: &str, content: &Value) -> Self {
        if media == "application/json" {
            return Self::of_value(&content["schema"]);
        }
        Self { text: media.to_owned(), link: None }
    }

    fn within(mut self, place: &str) -> Self {
        self.text = format!("{} in the {place}", self.text);
        self
    }

    fn of_value(schema: &Value) -> Self {
        if let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
            return Self { text: name.to_owned(), link: Some(name.to_owned()) };
        }
        // What may be null is one of several.
        let several = list(&schema["oneOf"]).chain(list(&schema["anyOf"])).chain(list(&schema["allOf"]));
        if let Some(one) = several.into_iter().find(|one| one["type"] != "null") {
            return Self::of_value(one);
        }
        let types = list(&schema["type"]).filter(|kind| *kind != "null").map(text).next();
        let kind = types.unwrap_or_else(|| text(&schema["type"]));
        match kind.as_str() {
            "array" => {
                let items = Self::of_value(&schema["items"]);
                Self { text: format!("array of {}", items.text), link: items.link }
            }
            "" => Self { text: "any".into(), link: None },
            _ => Self { text: kind, link: None },
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().replace('\n', " ")
}

fn paragraphs(value: &Value) -> Vec<String> {
    let whole = value.as_str().unwrap_or_default();
    whole.split("\n\n").filter(|text| !text.is_empty()).map(|text| text.replace('\n', " ")).collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_and_every_type_is_on_the_page() {
        let document = serde_json::to_value(crate::routes::document()).unwrap();
        for (path, item) in entries(&document["paths"]) {
            for (method, _) in entries(item) {
                let call = format!("<code>{} {path}</code>", method.to_uppercase());
                assert!(page().contains(&call), "{call}");
            }
        }
        for (name, _) in entries(&document["components"]["schemas"]) {
            assert!(page().contains(&format!("<h3 id=\"{name}\">")), "{name}");
        }
        let targets = page().split("href=\"#").skip(1).map(|rest| rest.split('"').next().unwrap());
        for target in targets {
            assert!(page().contains(&format!("id=\"{target}\"")), "a link leads to {target}, which is not there");
        }
        for elsewhere in ["<script", " src=", "href=\"http", "url("] {
            assert!(!page().contains(elsewhere), "{elsewhere}");
        }
    }
}
