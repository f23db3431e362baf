//! The program as an operator starts it, and sessions that train on it.

use offshoot_client::{
    ADAMW_DEFAULTS, Client, ClientOptions, ForwardInput, HostTensor, LoraConfig, OpenSession,
    Session, Token, WireDType,
};
use offshoot_platform::{offshoot, root};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use tokio::runtime::Runtime;

/// A server in a process of its own. Dropped, it is killed.
pub struct World {
    server: Child,
    /// For clients.
    grpc: String,
    /// `http://...`, without a slash at its end.
    pub http: String,
    pub runtime: Runtime,
    dir: tempfile::TempDir,
}

impl World {
    /// With these tenants, of whom `ops` is an operator; none: open.
    pub fn start(tenants: &[&str]) -> World {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("tenants.toml");
        for tenant in tenants {
            let mut add = Command::new(offshoot());
            add.args(["tenant", "add", tenant, "--tenants"]).arg(&file);
            if *tenant == "ops" {
                add.arg("--operator");
            }
            let said = add.output().expect("it runs");
            assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
            std::fs::write(dir.path().join(tenant), said.stdout).expect("it can be written");
        }
        let mut serve = Command::new(offshoot());
        serve.args(["serve", "--split-point-1", "1", "--split-point-2", "3", "--threads", "1"]);
        serve.args(["--port", "0", "--http-port", "0", "--log", "warn"]);
        serve.arg("--model-name").arg(root().join("tests/fixtures/llama"));
        serve.arg("--store-dir").arg(dir.path().join("store"));
        if !tenants.is_empty() {
            serve.arg("--tenants").arg(&file);
        }
        let mut server = serve.stdout(Stdio::piped()).spawn().expect("it runs");
        let mut line = String::new();
        let output = server.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut line).expect("it says something");
        let rest = line.trim_end().strip_prefix("ready grpc=");
        let rest = rest.unwrap_or_else(|| panic!("the server said {line:?}"));
        let (grpc, http) = rest.split_once(" http=").expect("it says where it serves HTTP");
        let (grpc, http) = (grpc.to_string(), format!("http://{http}"));
        World { server, grpc, http, runtime: Runtime::new().expect("threads"), dir }
    }

    /// The token as `offshoot tenant add` printed it.
    pub fn token(&self, tenant: &str) -> String {
        let text = std::fs::read_to_string(self.path(tenant)).expect("it was added");
        text.trim().to_string()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A client of this tenant; of an open server, if the name is empty.
    pub async fn client(&self, tenant: &str) -> Client {
        let token = (!tenant.is_empty()).then(|| Token::new(&self.token(tenant)).expect("a token"));
        let options = ClientOptions { token, ..ClientOptions::default() };
        Client::connect_with(&self.grpc, options).await.expect("the server listens")
    }

    /// Opens a session.
    pub async fn open(&self, client: &Client, name: &str, rank: u32) -> Session {
        let server = client.describe().await.expect("it answers");
        let lora = LoraConfig { r: rank, lora_alpha: 2.0 * f64::from(rank), ..Default::default() };
        let wanted = OpenSession {
            name: name.into(),
            fingerprint: server.fingerprint,
            split_point_1: server.split_point_1,
            split_point_2: server.split_point_2,
            lora,
            adamw: ADAMW_DEFAULTS,
            seed: 7,
            wire_dtype: WireDType::F32,
            initial_adapter: vec![],
        };
        client.open(wanted).await.expect("there is room")
    }

    /// Ends it as `kill -9` does.
    pub fn kill(&mut self) {
        self.server.kill().expect("it runs");
        self.server.wait().expect("it ends");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Optimizer steps on made-up numbers, with this loss to share, if any. Each is done when it returns.
pub async fn train(session: &Session, hidden_size: usize, n_steps: usize, loss: Option<f64>) {
    for step in 0..n_steps {
        let n = 8 * hidden_size;
        let numbers: Vec<f32> = (0..n).map(|i| ((i * 37 + step * 11) % 97) as f32 / 97.0).collect();
        let input = ForwardInput {
            hidden: HostTensor::from_f32(&numbers, vec![8, hidden_size], WireDType::F32),
            seq_lens: vec![5, 3],
            position_ids: vec![],
            want_input_grad: false,
            dropout_key: step as u64,
        };
        let (output, microbatch, _) = session.forward(input).await.expect("it is computed");
        let pending = microbatch.send_backward(output).await.expect("it is sent");
        pending.await.expect("it is computed");
        match loss {
            Some(loss) => session.step_sharing_loss(1e-3, 1.0, loss - 0.1 * step as f64).await,
            None => session.step(1e-3, 1.0).await,
        }
        .expect("it is sent")
        .await
        .expect("it is taken");
    }
}
