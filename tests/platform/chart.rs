//! The Helm chart with the real helm, and what its pods run, run here: the commands, probes and checks of
//! reviewed renders, each in a folder that stands for the container's.

use offshoot_platform::{offshoot, root};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn the_chart_is_valid_restricted_and_as_it_was_reviewed() {
    let said = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(["run", "--quiet", "--package", "xtask", "--", "chart"])
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
}

#[test]
fn a_pod_with_tls_serves_answers_its_probes_and_passes_the_release_test() {
    let pod = Pod::new("tls");
    pod.write_certificates("trunk.example.com");
    let token =
        pod.tool(&["tenant", "add", "blue", "--tenants", "/etc/offshoot-tenants/tenants.toml"]);
    pod.write("/etc/offshoot-token/token", &token);
    let server = pod.container("StatefulSet", "/spec/template/spec/containers/0");
    let running = pod.serve(&server);
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        let command = words(&server[probe]["exec"]["command"]);
        assert_eq!(running.ask(&command[1..]).trim(), "serving", "{probe}: {command:?}");
    }
    for n in [0, 1] {
        let asks = pod.container("Pod", &format!("/spec/containers/{n}"));
        running.ask(&words(&asks["args"]));
    }
    // A probe whose answer is no is told by its exit status.
    let mut wrong = words(&server["readinessProbe"]["exec"]["command"]);
    wrong.push("--service=nobody".into());
    assert!(!running.run(&wrong[1..]).status.success());
    running.end();
}

#[test]
fn a_pod_fetches_its_model_once_and_serves_it_without_the_hub() {
    let pod = Pod::new("model-download");
    // As the hub's own tools leave it.
    let model = pod.path("/var/cache/offshoot/hub/models--meta-llama--Llama-3.1-8B");
    let snapshot = model.join("snapshots/0123456789abcdef");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(model.join("refs")).unwrap();
    fs::write(model.join("refs/main"), "0123456789abcdef").unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(root().join("tests/fixtures/llama").join(file), snapshot.join(file)).unwrap();
    }
    let fetch = pod.container("StatefulSet", "/spec/template/spec/initContainers/0");
    let said = pod.run(&words(&fetch["args"]), &fetch);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), snapshot.display().to_string());

    let server = pod.container("StatefulSet", "/spec/template/spec/containers/0");
    let running = pod.serve(&server);
    // What the kubelet asks by itself.
    let grpc = &server["livenessProbe"]["grpc"];
    let place = format!("--server=http://127.0.0.1:{}", grpc["port"]);
    let service = format!("--service={}", grpc["service"].as_str().unwrap());
    assert_eq!(running.ask(&["health".into(), place, service]).trim(), "serving");
    running.end();
}

/// One render, with a folder instead of the container's root.
struct Pod {
    documents: Vec<Value>,
    root: tempfile::TempDir,
}

/// Its server's process. Dropped, it is killed.
struct Running<'a> {
    pod: &'a Pod,
    process: Child,
    address: String,
}

impl Pod {
    fn new(name: &str) -> Pod {
        let golden = root().join("charts/offshoot/ci/golden").join(format!("{name}.yaml"));
        let text = fs::read_to_string(golden).unwrap();
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        let pod = Pod { documents, root: tempfile::tempdir().unwrap() };
        for folder in ["/etc/offshoot-tenants", "/var/lib/offshoot", "/tmp"] {
            fs::create_dir_all(pod.path(folder)).unwrap();
        }
        pod
    }

    fn container(&self, kind: &str, pointer: &str) -> Value {
        let found = self.documents.iter().find(|document| document["kind"] == kind).unwrap();
        found.pointer(pointer).unwrap_or_else(|| panic!("{kind} has no {pointer}")).clone()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// The container's paths in a text, as they are here.
    fn here(&self, text: &str) -> String {
        // The folder that stands for the root may be below /tmp itself: it comes last.
        let mut text = text.to_owned();
        for folder in ["/etc/offshoot", "/var/lib/offshoot", "/var/cache/offshoot", "/tmp"] {
            text = text.replace(folder, &format!("\0{}", &folder[1..]));
        }
        text.replace('\0', &format!("{}/", self.root.path().display()))
    }

    fn write_certificates(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        let own = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let cert = params.signed_by(&own, &issuer).unwrap();
        for folder in ["/etc/offshoot-tls", "/etc/offshoot-ca"] {
            self.write(&format!("{folder}/ca.crt"), &ca.pem());
        }
        self.write("/etc/offshoot-tls/tls.crt", &cert.pem());
        self.write("/etc/offshoot-tls/tls.key", &own.serialize_pem());
    }

    /// The program as the container starts it: these arguments, its variables, nothing else.
    fn command(&self, args: &[String], container: &Value) -> Command {
        let mut command = Command::new(offshoot());
        command.args(args.iter().map(|arg| self.here(arg)));
        command.env_clear().current_dir(self.root.path()).stdin(Stdio::null());
        for variable in container["env"].as_array().into_iter().flatten() {
            let value = variable["value"].as_str().unwrap_or_default();
            command.env(variable["name"].as_str().unwrap(), self.here(value));
        }
        command.env("OMP_NUM_THREADS", "1");
        command
    }

    fn run(&self, args: &[String], container: &Value) -> std::process::Output {
        self.command(args, container).output().unwrap()
    }

    /// What it prints.
    fn tool(&self, args: &[&str]) -> String {
        let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let said = self.run(&args, &Value::Null);
        assert!(said.status.success(), "{args:?}: {}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8(said.stdout).unwrap()
    }

    /// Its server on a free port of loopback, with the tiny model's layers instead of the real one's.
    fn serve(&self, server: &Value) -> Running<'_> {
        let settings = self.container("ConfigMap", "/data/server.toml");
        let mut lines: Vec<String> = Vec::new();
        for line in settings.as_str().unwrap().lines() {
            lines.push(match line.split_once(" = ") {
                Some(("port", _)) => "port = 0".into(),
                Some(("host", _)) => "host = \"127.0.0.1\"".into(),
                Some(("split_point_1", _)) => "split_point_1 = 1".into(),
                Some(("split_point_2", _)) => "split_point_2 = 3".into(),
                Some(("name", path)) if path.starts_with("\"/") => {
                    format!(
                        "name = {:?}",
                        root().join("tests/fixtures/llama").display().to_string()
                    )
                }
                _ => self.here(line),
            });
        }
        self.write("/etc/offshoot/server.toml", &lines.join("\n"));
        let mut command = self.command(&words(&server["args"]), server);
        let log = fs::File::create(self.path("/log")).unwrap();
        let mut process = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let address = ready.split(&['=', ' ', '\n'][..]).nth(2).unwrap_or_default().to_owned();
        let log = || fs::read_to_string(self.path("/log")).unwrap();
        assert!(ready.starts_with("ready grpc="), "it said {ready:?}, and in its log:\n{}", log());
        Running { pod: self, process, address }
    }
}

impl Running<'_> {
    /// Commands that the cluster would run, with the server's address here.
    fn run(&self, args: &[String]) -> std::process::Output {
        let args: Vec<_> = args
            .iter()
            .map(|arg| match arg.strip_prefix("--server=").and_then(|url| url.split_once("://")) {
                Some((scheme, _)) => format!("--server={scheme}://{}", self.address),
                None => arg.clone(),
            })
            .collect();
        self.pod.run(&args, &Value::Null)
    }

    /// What they print; they must succeed.
    fn ask(&self, args: &[String]) -> String {
        let said = self.run(args);
        assert!(said.status.success(), "{args:?}: {}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8(said.stdout).unwrap()
    }

    /// As a pod ends.
    fn end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let begun = Instant::now();
        let status = loop {
            match self.process.try_wait().unwrap() {
                Some(status) => break status,
                None if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(20)),
                None => panic!("it does not end"),
            }
        };
        let log = fs::read_to_string(self.pod.path("/log")).unwrap();
        assert!(status.success(), "{status}:\n{log}");
        // As log.format of the values says.
        let is_json = |line: &str| serde_json::from_str::<Value>(line).is_ok();
        assert!(log.lines().all(is_json) && !log.is_empty(), "{log}");
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn words(list: &Value) -> Vec<String> {
    let words = list.as_array().unwrap_or_else(|| panic!("expected a list: {list}"));
    words.iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}
