//! The restricted Pod Security Standard, as <https://kubernetes.io/docs/concepts/security/pod-security-standards/>
//! has it for Kubernetes 1.35 (baseline included), and what we ask of our pods beyond it.

use serde_json::Value;

use super::document::{Document, containers, items};

/// Volumes by their source. Images are let in since 1.33, though the page does not list them.
const VOLUMES: [&str; 9] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
];
const SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];
const SELINUX_TYPES: [&str; 5] =
    ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];
const PROFILES: [&str; 2] = ["RuntimeDefault", "Localhost"];
const APPARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";

/// What is against the standard in the pod that a document is or makes.
pub fn violations(document: &Document) -> Vec<String> {
    let Some(pod) = document.pod() else { return Vec::new() };
    let mut found = of_pod(pod);
    for (name, container) in containers(pod) {
        let wrong = of_container(pod, container);
        found.extend(wrong.into_iter().map(|wrong| format!("container {name}: {wrong}")));
    }
    found.into_iter().map(|wrong| format!("{}: {wrong}", document.title())).collect()
}

fn of_pod(pod: &Value) -> Vec<String> {
    let spec = &pod["spec"];
    let mut wrong = Vec::new();
    for namespace in ["hostNetwork", "hostPID", "hostIPC"] {
        if spec[namespace] == true {
            wrong.push(format!("{namespace} is true"));
        }
    }
    for volume in items(spec, "/volumes") {
        let sources = volume.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
        for source in sources.filter(|key| *key != "name" && !VOLUMES.contains(key)) {
            wrong.push(format!("volume {} is a {source}", volume["name"]));
        }
    }
    for sysctl in items(spec, "/securityContext/sysctls") {
        if !sysctl["name"].as_str().is_some_and(|name| SYSCTLS.contains(&name)) {
            wrong.push(format!("sysctl {} is set", sysctl["name"]));
        }
    }
    let annotations = pod.pointer("/metadata/annotations").and_then(Value::as_object);
    for (key, value) in annotations.into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        let fine = value == "runtime/default" || value.starts_with("localhost/");
        if key.starts_with(APPARMOR) && !fine {
            wrong.push(format!("annotation {key} is {value:?}"));
        }
    }
    wrong.extend(of_context(&spec["securityContext"]));
    // Not of the standard: nothing of ours asks Kubernetes anything.
    if spec["automountServiceAccountToken"] != false {
        wrong.push("automountServiceAccountToken is not false".into());
    }
    wrong
}

/// What pods and containers have in common.
fn of_context(context: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    if context.pointer("/windowsOptions/hostProcess") == Some(&Value::Bool(true)) {
        wrong.push("windowsOptions.hostProcess is true".into());
    }
    if context["runAsUser"] == 0 {
        wrong.push("runAsUser is 0".into());
    }
    if context["runAsNonRoot"] == false {
        wrong.push("runAsNonRoot is false".into());
    }
    for profile in ["seccompProfile", "appArmorProfile"] {
        let kind = &context[profile]["type"];
        if !kind.is_null() && !kind.as_str().is_some_and(|kind| PROFILES.contains(&kind)) {
            wrong.push(format!("{profile}.type is {kind}"));
        }
    }
    let selinux = |key: &str| context["seLinuxOptions"][key].as_str().unwrap_or_default();
    if !SELINUX_TYPES.contains(&selinux("type")) {
        wrong.push(format!("seLinuxOptions.type is {:?}", selinux("type")));
    }
    for key in ["user", "role"] {
        if !selinux(key).is_empty() {
            wrong.push(format!("seLinuxOptions.{key} is {:?}", selinux(key)));
        }
    }
    wrong
}

fn of_container(pod: &Value, container: &Value) -> Vec<String> {
    let context = &container["securityContext"];
    let of_pod = &pod["spec"]["securityContext"];
    let mut wrong = of_context(context);
    if context["privileged"] == true {
        wrong.push("privileged is true".into());
    }
    if context["allowPrivilegeEscalation"] != false {
        wrong.push("allowPrivilegeEscalation is not false".into());
    }
    if !items(context, "/capabilities/drop").any(|capability| capability == "ALL") {
        wrong.push("capabilities.drop has no ALL".into());
    }
    for added in items(context, "/capabilities/add").filter(|added| *added != "NET_BIND_SERVICE") {
        wrong.push(format!("capabilities.add has {added}"));
    }
    if context["runAsNonRoot"].is_null() && of_pod["runAsNonRoot"] != true {
        wrong.push("runAsNonRoot is not true, neither here nor in the pod".into());
    }
    if context["seccompProfile"].is_null() && of_pod["seccompProfile"].is_null() {
        wrong.push("there is no seccompProfile, neither here nor in the pod".into());
    }
    let proc_mount = &context["procMount"];
    if !proc_mount.is_null() && proc_mount != "Default" {
        wrong.push(format!("procMount is {proc_mount}"));
    }
    for port in items(container, "/ports") {
        if port["hostPort"].as_u64().is_some_and(|port| port != 0) {
            wrong.push(format!("hostPort {} is taken", port["hostPort"]));
        }
    }
    const ASKED: [&str; 5] = [
        "/livenessProbe",
        "/readinessProbe",
        "/startupProbe",
        "/lifecycle/postStart",
        "/lifecycle/preStop",
    ];
    for asked in ASKED.into_iter().filter_map(|asked| container.pointer(asked)) {
        for action in ["httpGet", "tcpSocket"] {
            if !asked[action]["host"].as_str().unwrap_or_default().is_empty() {
                wrong.push(format!("{action} asks the host {}", asked[action]["host"]));
            }
        }
    }
    // Not of the standard.
    if context["readOnlyRootFilesystem"] != true {
        wrong.push("readOnlyRootFilesystem is not true".into());
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Value {
        json!({
            "kind": "StatefulSet",
            "metadata": {"name": "x"},
            "spec": {"template": {"metadata": {}, "spec": {
                "automountServiceAccountToken": false,
                "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
                "volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "image": {"reference": "m"}}],
                "containers": [{
                    "name": "c",
                    "livenessProbe": {"httpGet": {"port": 1}},
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "readOnlyRootFilesystem": true,
                        "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
                    },
                }],
            }}},
        })
    }

    #[test]
    fn a_pod_that_keeps_to_it_passes_and_other_kinds_have_none() {
        assert_eq!(violations(&Document(good())), Vec::<String>::new());
        assert!(violations(&Document(json!({"kind": "ConfigMap"}))).is_empty());
    }

    #[test]
    fn each_control_is_seen_when_it_is_broken() {
        // Where, below the pod's spec; what; and what is said of it.
        let c = "/containers/0";
        let cs = "/containers/0/securityContext";
        let ps = "/securityContext";
        let cases = [
            ("", "hostNetwork", json!(true), "hostNetwork is true"),
            ("", "hostPID", json!(true), "hostPID is true"),
            ("", "hostIPC", json!(true), "hostIPC is true"),
            ("", "volumes", json!([{"name": "h", "hostPath": {"path": "/"}}]), "is a hostPath"),
            ("", "volumes", json!([{"name": "n", "nfs": {}}]), "is a nfs"),
            ("", "automountServiceAccountToken", json!(true), "automountServiceAccountToken"),
            (
                ps,
                "sysctls",
                json!([{"name": "kernel.msgmax", "value": "1"}]),
                "sysctl \"kernel.msgmax\"",
            ),
            (ps, "runAsUser", json!(0), "runAsUser is 0"),
            (ps, "runAsNonRoot", json!(false), "runAsNonRoot is false"),
            (ps, "runAsNonRoot", Value::Null, "runAsNonRoot is not true"),
            (
                ps,
                "seccompProfile",
                json!({"type": "Unconfined"}),
                "seccompProfile.type is \"Unconfined\"",
            ),
            (ps, "seccompProfile", Value::Null, "there is no seccompProfile"),
            (ps, "appArmorProfile", json!({"type": "Unconfined"}), "appArmorProfile.type"),
            (ps, "seLinuxOptions", json!({"type": "spc_t"}), "seLinuxOptions.type is \"spc_t\""),
            (ps, "seLinuxOptions", json!({"user": "root"}), "seLinuxOptions.user"),
            (ps, "seLinuxOptions", json!({"role": "r"}), "seLinuxOptions.role"),
            (ps, "windowsOptions", json!({"hostProcess": true}), "hostProcess is true"),
            (cs, "windowsOptions", json!({"hostProcess": true}), "hostProcess is true"),
            (cs, "privileged", json!(true), "privileged is true"),
            (cs, "allowPrivilegeEscalation", Value::Null, "allowPrivilegeEscalation is not false"),
            (cs, "capabilities", json!({"drop": ["NET_RAW"]}), "capabilities.drop has no ALL"),
            (
                cs,
                "capabilities",
                json!({"drop": ["ALL"], "add": ["CHOWN"]}),
                "capabilities.add has \"CHOWN\"",
            ),
            (cs, "runAsUser", json!(0), "runAsUser is 0"),
            (cs, "runAsNonRoot", json!(false), "runAsNonRoot is false"),
            (cs, "seccompProfile", json!({"type": "Unconfined"}), "seccompProfile.type"),
            (cs, "procMount", json!("Unmasked"), "procMount is \"Unmasked\""),
            (cs, "readOnlyRootFilesystem", json!(false), "readOnlyRootFilesystem is not true"),
            (c, "ports", json!([{"containerPort": 1, "hostPort": 1}]), "hostPort 1 is taken"),
            (c, "livenessProbe", json!({"httpGet": {"host": "10.0.0.1"}}), "httpGet asks the host"),
            (
                c,
                "lifecycle",
                json!({"preStop": {"tcpSocket": {"host": "h"}}}),
                "tcpSocket asks the host",
            ),
        ];
        for (place, key, value, expected) in cases {
            let mut document = good();
            let spec = document.pointer_mut(&format!("/spec/template/spec{place}")).unwrap();
            spec[key] = value;
            let found = violations(&Document(document));
            // What a pod says false its containers do not say true.
            let n_told = if (place, key) == (ps, "runAsNonRoot") { found.len() } else { 1 };
            assert_eq!(found.len(), n_told, "{place}/{key}: {found:?}");
            let found = found.join("\n");
            assert!(found.contains(expected) && found.contains("StatefulSet/x"), "{found}");
        }
        let mut document = good();
        document["spec"]["template"]["metadata"]["annotations"] =
            json!({format!("{APPARMOR}c"): "unconfined"});
        assert_eq!(violations(&Document(document)).len(), 1);
    }

    #[test]
    fn init_containers_and_pods_of_their_own_are_looked_at_too() {
        let mut document = good();
        document["spec"]["template"]["spec"]["initContainers"] = json!([{"name": "i"}]);
        let found = violations(&Document(document)).join("\n");
        assert!(found.contains("container i: allowPrivilegeEscalation"), "{found}");
        let pod = json!({"kind": "Pod", "spec": {"containers": [{"name": "p"}]}});
        assert!(violations(&Document(pod)).join("\n").contains("container p: "));
    }
}
