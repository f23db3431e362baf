//! Values that do not go together, and what the chart says of them.

use anyhow::Result;

use super::CHART;
use super::helm::Helm;
use crate::command::in_root;

/// A set of ci/, what is changed in it (as for `helm --set-json`; or an option of helm), and a part of the answer.
pub struct Case {
    set: &'static str,
    changes: &'static [&'static str],
    expected: &'static str,
}

const fn case(set: &'static str, changes: &'static [&'static str], expected: &'static str) -> Case {
    Case { set, changes, expected }
}

pub const CASES: &[Case] = &[
    // What is missing.
    case("minimal", &[r#"image.repository="""#], "image.repository is empty"),
    case("minimal", &[r#"config.model.name="""#], "config.model.name is empty"),
    case(
        "minimal",
        &["config.model.split_point_2=1"],
        "config.model.split_point_2 is 1: expected a layer behind config.model.split_point_1 = 1",
    ),
    // Open networks.
    case("minimal", &["config.listen.allow_insecure_network=false"], "nobody has to show a token"),
    case("minimal", &["config.listen.allow_insecure_network=false"], "TLS is off"),
    case(
        "gpu",
        &["tls.enabled=false", r#"tls.existingSecret="""#],
        "TLS is off: tokens could be read",
    ),
    case("gpu", &[r#"tenants.existingSecret="""#], "nobody has to show a token"),
    case(
        "minimal",
        &[r#"config.listen.host="127.0.0.1""#],
        "expected an address that the Service and the kubelet's probes reach",
    ),
    // Where the model comes from.
    case(
        "minimal",
        &[r#"config.model.name="Qwen/Qwen2-0.5B""#],
        "nothing downloads it: set model.download.enabled=true",
    ),
    case(
        "minimal",
        &["model.download.enabled=true"],
        "the model comes from model.existingClaim and model.download",
    ),
    case("model-download", &[r#"config.model.name="/models/x""#], "expected a hub name such as"),
    case("minimal", &[r#"config.model.name="/data/x""#], "but the model's volume is at /models"),
    case(
        "gpu",
        &["--kube-version=1.30.0"],
        "needs image volumes, which this cluster (v1.30.0) does not have",
    ),
    case("minimal", &["--kube-version=1.29.0"], "incompatible with Kubernetes v1.29.0"),
    // Devices.
    case("minimal", &["gpu.enabled=true"], "the GPU would stand idle"),
    case(
        "minimal",
        &[r#"config.model.device="cuda""#],
        "but the pod gets no GPU: set gpu.enabled=true",
    ),
    // Secrets.
    case(
        "gpu",
        &[r#"tls.existingSecret="""#],
        "there is no certificate: expected one of tls.existingSecret",
    ),
    case("tls", &[r#"tls.content.key="""#], "a certificate without a key"),
    case(
        "tls",
        &[r#"tls.existingSecret="x""#],
        "the certificate comes from tls.existingSecret and tls.content",
    ),
    case("minimal", &[r#"tls.existingSecret="x""#], "expected tls.enabled=true"),
    case(
        "minimal",
        &[r#"tls.clientCA.existingSecret="x""#],
        "but tls.enabled is false: expected TLS with it",
    ),
    case(
        "cert-manager",
        &[r#"tls.certManager.issuerRef.name="""#],
        "tls.certManager.issuerRef.name is empty",
    ),
    case("gpu", &[r#"config.tls.cert="/x.pem""#], "config.tls.cert is set and tls.enabled is true"),
    case(
        "gpu",
        &[r#"config.access.tenants="/x.toml""#],
        "The chart names the file that it mounts itself",
    ),
    case(
        "gpu",
        &[r#"tenants.content="x""#],
        "the tenants come from tenants.existingSecret and tenants.content",
    ),
    // Ways in.
    case(
        "gateway",
        &[r#"gateway.hostname="trunk.example.com""#],
        "with 3 replicas: expected {replica} in it",
    ),
    case("gateway", &[r#"gateway.hostname="""#], "gateway.hostname is empty"),
    case("gateway", &["gateway.parentRefs=[]"], "gateway.parentRefs is empty"),
    case("mtls", &[r#"gateway.mode="terminate""#], "set gateway.mode=passthrough"),
    case("ingress", &["ingress.passthrough=true"], "has no TLS to pass on to"),
    case("ingress", &[r#"ingress.tlsSecret="""#], "clients' tokens never travel without TLS"),
    case(
        "mtls",
        &[
            "ingress.enabled=true",
            r#"ingress.hostname="x.example.com""#,
            r#"ingress.tlsSecret="x""#,
        ],
        "set ingress.passthrough=true",
    ),
    case("gateway", &["service.nodePort=30051"], "since each replica has a Service of its own"),
    // The store and its pods.
    case("minimal", &[r#"config.store.dir="/tmp/store""#], "anything else is gone with the pod"),
    case(
        "minimal",
        &[r#"config.access.audit_log="audit.jsonl""#],
        "such as /var/lib/offshoot/audit.jsonl",
    ),
    case("tls", &["replicas=2"], "a store has one server"),
    case("rolling", &["replicas=2"], "Install one release for each trunk"),
    case("rolling", &["store.persistent=false"], "expected a store that the successor finds"),
    case("rolling", &["rollout.sameNode=false"], "have no ReadWriteMany"),
    case(
        "rolling",
        &[r#"store.accessModes=["ReadWriteOncePod"]"#],
        "expected ReadWriteOnce, since two pods",
    ),
    case(
        "rolling",
        &["probes.startup.failureThreshold=10"],
        "raise probes.startup.failureThreshold",
    ),
    // Probes and watching.
    case("gpu", &[r#"probes.handler="grpc""#], "Kubernetes' gRPC probes do not"),
    case("mtls", &["config.http.port=null"], "expected probes.clientCertificateSecret"),
    case("mtls", &[r#"probes.handler="exec""#], "expected probes.clientCertificateSecret"),
    case("tls", &[r#"probes.handler="http""#], "but config.http.port is null"),
    case(
        "monitoring",
        &[r#"metrics.serviceMonitor.tokenSecret.name="""#],
        "/metrics wants an operator's token",
    ),
    case("monitoring", &["config.http.port=null"], "config.http.port is null"),
    // The schema: words that it does not know, and values that cannot be.
    case("minimal", &["config.limits.max_rnk=8"], "max_rnk"),
    case("minimal", &["replica=2"], "replica"),
    case("minimal", &["replicas=0"], "replicas"),
    case("minimal", &["config.limits.max_rank=0"], "max_rank"),
    case("minimal", &[r#"config.model.dtype="int8""#], "dtype"),
    case("minimal", &[r#"config.model.device="gpu""#], "device"),
    case("minimal", &["config.http.port=70000"], "port"),
    case("minimal", &[r#"service.type="Clusterip""#], "service"),
    case("minimal", &[r#"store.size="50GB of it""#], "size"),
    case("minimal", &[r#"tenants.existingSecret="Not A Name""#], "existingSecret"),
];

/// Those that are not refused, or with other words.
pub fn accepted(helm: &Helm) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for Case { set, changes, expected } in CASES {
        let values = in_root(CHART).join(format!("ci/{set}.yaml"));
        let title = format!("{set} with {}", changes.join(" and "));
        match helm.refusal(&values, changes)? {
            None => {
                wrong.push(format!("{title}: it renders, expected a refusal with {expected:?}"))
            }
            Some(text) if !text.contains(expected) => {
                wrong.push(format!(
                    "{title}: expected a refusal with {expected:?}, helm said:\n{text}"
                ));
            }
            Some(_) => {}
        }
    }
    Ok(wrong)
}
