//! Every call of a document that takes JSON, with every body it cannot mean: refused by the name of the field, and never
//! a fault of ours.

use axum::{Router, body::Body};
use bytes::Bytes;
use futures::stream;
use http::{Request, header};
use http_body_util::BodyExt;
use serde_json::{Map, Value, json};
use tower::ServiceExt;

const UNKNOWN: &str = "no_such_field";
/// More than any JSON body may be.
const TOO_LARGE_MIB: usize = 65;

/// Sends all of them to `router`, with `credentials` as `Authorization` and `id` in the path; says which were taken, and
/// how many were sent.
pub async fn try_all(document: &Value, router: &Router, credentials: &str, id: &str) -> (usize, Vec<String>) {
    let (mut sent, mut taken) = (0, Vec::new());
    for call in calls(document) {
        let mut cases = call.malformed();
        cases.extend(call.mistaken());
        for case in cases {
            let told = format!("{} {} with {}", call.method, call.path, case.what);
            sent += 1;
            if let Err(why) = call.is_refused(case, router, credentials, id).await {
                taken.push(format!("{told}: {why}"));
            }
        }
    }
    (sent, taken)
}

/// A call that takes JSON.
struct Call<'d> {
    document: &'d Value,
    method: String,
    path: &'d str,
    schema: &'d Value,
    /// Whether there must be a body.
    required: bool,
}

/// One wrong body.
struct Case {
    what: String,
    kind: Option<&'static str>,
    body: Body,
    status: &'static [u16],
    /// What the message must say.
    named: String,
}

impl Case {
    fn new(what: impl Into<String>, body: impl Into<Body>, named: &str) -> Self {
        let (what, body) = (what.into(), body.into());
        Self { what, kind: Some("application/json"), body, status: &[400, 422], named: named.to_owned() }
    }
}

fn calls(document: &Value) -> Vec<Call<'_>> {
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.iter().flat_map(|(path, item)| {
        item.as_object().unwrap().iter().map(move |(method, operation)| (path, method, operation))
    });
    let taking_json = operations.filter_map(|(path, method, operation)| {
        let body = operation.get("requestBody")?;
        let schema = body["content"].get("application/json")?.get("schema")?;
        let required = body["required"] == true;
        Some(Call { document, method: method.to_uppercase(), path, schema, required })
    });
    taking_json.collect()
}

impl<'d> Call<'d> {
    /// What is no JSON, too much of it, or not called JSON.
    fn malformed(&self) -> Vec<Case> {
        let name = self.properties().first().map_or(UNKNOWN, |(name, _)| name);
        let invalid = [format!("{{\"{name}\":\"").as_bytes(), b"\xff\xfe\"}"].concat();
        let good = Value::Object(self.good_object(self.schema)).to_string();
        let mut cases = vec![
            Case::new("no JSON", "no json", "JSON"),
            Case::new("half of it", "{\"", "JSON"),
            Case::new("two bodies", format!("{good} {{}}"), "JSON"),
            Case::new("too deep a body", "[".repeat(50_000), "body"),
            Case::new("invalid UTF-8", invalid, name),
            Case { kind: None, status: &[415], ..Case::new("an undeclared body", good.clone(), "JSON") },
            Case { kind: Some("text/plain"), status: &[415], ..Case::new("plain text", good, "JSON") },
        ];
        if self.required {
            cases.push(Case::new("an empty body", "", "JSON"));
        }
        let piece = Bytes::from_static(&[b' '; 1 << 20]);
        let pieces = stream::iter((0..TOO_LARGE_MIB).map(move |_| Ok::<_, std::io::Error>(piece.clone())));
        let large = Case::new("too large a body", Body::from_stream(pieces), "larger");
        cases.push(Case { status: &[413], ..large });
        cases
    }

    /// What is JSON, and not what the schema says.
    fn mistaken(&self) -> Vec<Case> {
        let case = |what: String, body: Value, named: &str| Case::new(what, body.to_string(), named);
        let mut cases: Vec<Case> = [json!(7), json!("x"), json!(true), json!([]), json!(null)]
            .into_iter()
            .map(|body| case(body.to_string(), body, "body"))
            .collect();
        let good = self.good_object(self.schema);
        let with = |name: &str, value: &Value| {
            let mut body = good.clone();
            body.insert(name.to_owned(), value.clone());
            Value::Object(body)
        };
        cases.push(case("an unknown field".into(), with(UNKNOWN, &json!(1)), UNKNOWN));
        for (name, schema) in self.properties() {
            for wrong in self.wrong(schema) {
                cases.push(case(format!("{name} = {wrong}"), with(name, &wrong), name));
            }
            if good.contains_key(name) {
                let mut without = good.clone();
                without.remove(name);
                cases.push(case(format!("no {name}"), Value::Object(without), name));
            }
        }
        cases
    }

    fn properties(&self) -> Vec<(&'d str, &'d Value)> {
        self.variants(self.schema).into_iter().flat_map(properties).collect()
    }

    /// The schemas of which a value has to fit one.
    fn variants(&self, schema: &'d Value) -> Vec<&'d Value> {
        if let Some(all) = schema["oneOf"].as_array() {
            return all.iter().flat_map(|one| self.variants(one)).collect();
        }
        match schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
            Some(name) => self.variants(&self.document["components"]["schemas"][name]),
            None => vec![schema],
        }
    }

    fn wrong(&self, schema: &'d Value) -> Vec<Value> {
        let variants = self.variants(schema);
        let of_each_kind =
            [json!(null), json!(true), json!(-1), json!(1.5), json!("no such word"), json!([]), json!({})];
        let mut wrong: Vec<Value> =
            of_each_kind.into_iter().filter(|value| !variants.iter().any(|variant| may_be(variant, value))).collect();
        for variant in variants {
            if let Some(items) = variant.get("items") {
                wrong.extend(self.wrong(items).into_iter().map(|item| json!([item])));
            }
            if let Some(values) = variant.get("additionalProperties").filter(|values| values.is_object()) {
                wrong.extend(self.wrong(values).into_iter().map(|value| json!({"key": value})));
            }
            if variant.get("properties").is_some() {
                wrong.extend(self.wrong_objects(variant));
            }
        }
        wrong
    }

    fn wrong_objects(&self, schema: &'d Value) -> Vec<Value> {
        let good = self.good_object(schema);
        let with = |name: &str, value: Value| {
            let mut object = good.clone();
            object.insert(name.to_owned(), value);
            Value::Object(object)
        };
        let fields = properties(schema).into_iter();
        let wrong = fields.flat_map(|(name, field)| self.wrong(field).into_iter().map(move |value| (name, value)));
        let mut objects: Vec<Value> = wrong.map(|(name, value)| with(name, value)).collect();
        objects.push(with(UNKNOWN, json!(1)));
        for name in good.keys() {
            let mut object = good.clone();
            object.remove(name);
            objects.push(Value::Object(object));
        }
        objects
    }

    /// What must be in an object, each of the right kind.
    fn good_object(&self, schema: &'d Value) -> Map<String, Value> {
        let variants = self.variants(schema);
        let required = variants.iter().flat_map(|variant| variant["required"].as_array().into_iter().flatten());
        let fields = required.filter_map(Value::as_str).map(|name| {
            let field = variants.iter().map(|variant| &variant["properties"][name]).find(|field| !field.is_null());
            let kind = field.and_then(|field| self.variants(field).first().copied()).unwrap_or(&Value::Null);
            let value = match (kind["enum"].get(0), kind["type"].get(0).unwrap_or(&kind["type"]).as_str()) {
                (Some(first), _) => first.clone(),
                (None, Some("integer" | "number")) => json!(1),
                (None, Some("string")) => json!("x"),
                other => panic!("{}: no example of {name}: {other:?}", self.path),
            };
            (name.to_owned(), value)
        });
        fields.collect()
    }

    async fn is_refused(&self, case: Case, router: &Router, credentials: &str, id: &str) -> Result<(), String> {
        let request = Request::builder()
            .method(self.method.as_str())
            .uri(self.path.replace("{id}", id))
            .header(header::AUTHORIZATION, credentials);
        let request = case.kind.into_iter().fold(request, |request, kind| request.header(header::CONTENT_TYPE, kind));
        let answer = router.clone().oneshot(request.body(case.body).unwrap()).await.unwrap();
        let status = answer.status().as_u16();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let error = serde_json::from_slice::<Value>(&bytes).unwrap_or_default()["error"].clone();
        let is_told = error["message"].as_str().is_some_and(|message| message.contains(&case.named))
            && error["hint"].is_string()
            && error["code"].is_string();
        if case.status.contains(&status) && is_told { Ok(()) } else { Err(format!("{status} {text}")) }
    }
}

fn properties(schema: &Value) -> Vec<(&str, &Value)> {
    schema["properties"].as_object().into_iter().flatten().map(|(name, field)| (name.as_str(), field)).collect()
}

/// Whether a value is of a schema's kind, the inside of arrays and objects aside.
fn may_be(schema: &Value, value: &Value) -> bool {
    let kinds: Vec<&str> = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        kind => kind.as_str().into_iter().collect(),
    };
    let allows = |kind: &str| kinds.contains(&kind);
    match value {
        Value::Null => allows("null"),
        Value::Bool(_) => allows("boolean"),
        Value::String(_) => allows("string") && schema.get("enum").is_none(),
        Value::Array(_) => allows("array"),
        // With fields that must be there, an empty one is wrong.
        Value::Object(_) => allows("object") && schema.get("required").is_none(),
        Value::Number(number) if number.is_f64() => allows("number"),
        Value::Number(_) => allows("number") || (allows("integer") && schema["minimum"] != 0),
    }
}
