//! Whether this host really reaches what set-up hooks commonly install from, and whose certificate answers.

use std::{sync::Once, time::Duration};

use heyvm_api::{
    error::with_causes,
    system::{Check, CheckStatus},
};
use heyvm_control_plane::GuestDefaults;
use reqwest::{Client, tls::TlsInfo};
use x509_parser::{pem::Pem, prelude::FromDer, x509::X509Name};

/// Where pip and npm install from when nobody says otherwise.
const PLACES: [&str; 2] = ["pypi.org", "registry.npmjs.org"];
const DEADLINE: Duration = Duration::from_secs(5);

/// One check for all places: fine where one of them answers.
pub async fn look(guest: &GuestDefaults) -> Vec<Check> {
    let answers = futures::future::join_all(PLACES.map(ask)).await;
    let mut checks: Vec<Check> = guest
        .problems
        .iter()
        .map(|problem| Check {
            name: "internet".into(),
            status: CheckStatus::Warn,
            message: problem.clone(),
            hint: Some("change that and run `heyvm daemon restart`, or set what sandboxes need with --env".into()),
        })
        .collect();
    checks.push(verdict(PLACES.iter().copied().zip(answers), guest));
    checks
}

/// The certificate that a place answers with.
async fn ask(place: &str) -> Result<Vec<u8>, String> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let client = Client::builder().tls_info(true).timeout(DEADLINE).build().map_err(|error| with_causes(&error))?;
    let response = client.head(format!("https://{place}/")).send().await;
    let response = response.map_err(|error| with_causes(&error.without_url()))?;
    let info = response.extensions().get::<TlsInfo>();
    Ok(info.and_then(TlsInfo::peer_certificate).map(<[u8]>::to_vec).unwrap_or_default())
}

fn verdict<'a>(answers: impl Iterator<Item = (&'a str, Result<Vec<u8>, String>)>, guest: &GuestDefaults) -> Check {
    let mut failures = Vec::new();
    for (place, answer) in answers {
        match answer {
            Ok(certificate) => {
                return Check {
                    name: "internet".into(),
                    status: CheckStatus::Ok,
                    message: format!("{place} answers, {}", authority(&certificate, guest)),
                    hint: None,
                };
            }
            Err(why) => failures.push(format!("{place}: {why}")),
        }
    }
    let untrusted = failures.iter().any(|why| why.contains("UnknownIssuer") || why.contains("certificate"));
    let hint = if untrusted {
        "something in between answers with a certificate of its own: add its authority to this host (Debian, Ubuntu: \
         /usr/local/share/ca-certificates and update-ca-certificates), then run `heyvm daemon restart`"
    } else {
        "set-up hooks such as `pip install` will fail; where a proxy is needed, set HTTPS_PROXY and run `heyvm daemon restart`"
    };
    Check {
        name: "internet".into(),
        status: CheckStatus::Warn,
        message: format!("this host does not reach the internet: {}", failures.join("; ")),
        hint: Some(hint.into()),
    }
}

fn authority(certificate: &[u8], guest: &GuestDefaults) -> String {
    let Ok((_, certificate)) = x509_parser::certificate::X509Certificate::from_der(certificate) else {
        return "through a proxy".into();
    };
    let issuer = certificate.issuer();
    let name = shown(issuer);
    let added = Pem::iter_from_buffer(guest.certificates.as_bytes())
        .flatten()
        .any(|pem| pem.parse_x509().is_ok_and(|authority| authority.subject().as_raw() == issuer.as_raw()));
    match added {
        true => {
            format!("with a certificate of {name}, an authority that was added to this host; sandboxes trust it, too")
        }
        false => format!("with a certificate of {name}"),
    }
}

fn shown(name: &X509Name<'_>) -> String {
    let common = name.iter_common_name().chain(name.iter_organization()).find_map(|part| part.as_str().ok());
    common.unwrap_or("an authority without a name").chars().filter(|c| !c.is_control()).take(80).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    use super::*;

    #[test]
    fn an_authority_that_was_added_to_the_host_is_named() {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "Corp Inspection");
        let key = KeyPair::generate().unwrap();
        let authority = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        let leaf_key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(["pypi.org".to_owned()]).unwrap().signed_by(&leaf_key, &issuer).unwrap();
        let answer = || [("a.example", Err("refused".to_owned())), ("pypi.org", Ok(leaf.der().to_vec()))].into_iter();

        let unknown = verdict(answer(), &GuestDefaults::default());
        assert_eq!(unknown.status, CheckStatus::Ok);
        assert_eq!(unknown.message, "pypi.org answers, with a certificate of Corp Inspection");
        let known = GuestDefaults { certificates: authority.pem(), ..GuestDefaults::default() };
        assert!(verdict(answer(), &known).message.contains("sandboxes trust it, too"));
    }

    #[test]
    fn each_failure_has_its_hint() {
        let failed = |why: &str| verdict([("pypi.org", Err(why.to_owned()))].into_iter(), &GuestDefaults::default());
        let untrusted = failed("invalid peer certificate: UnknownIssuer");
        assert_eq!(untrusted.status, CheckStatus::Warn);
        assert!(untrusted.hint.unwrap().contains("update-ca-certificates"));
        assert!(failed("connection refused").hint.unwrap().contains("HTTPS_PROXY"));
    }
}
