use crate::connection_args::ConnectionArgs;
use clap::Args;
use offshoot_client::ClientOptions;
use offshoot_trainer::options::{ModelOptions, TRAINING_RETRY};
use std::path::Path;

#[derive(Args)]
#[command(next_help_heading = "Model and server")]
pub struct ModelArgs {
    /// Model: a Hugging Face directory, a GGUF file or a hub name; the same one as the server's.
    #[arg(long, value_name = "NAME|PATH")]
    model_name: String,
    /// gpt2, llama, qwen2, qwen3 or gemma; only checked, the model says itself what it is.
    #[arg(long, value_name = "TYPE")]
    model_type: Option<String>,
    /// First layer of the trunk [default: what the server has]; another one is an error.
    #[arg(long, value_name = "LAYER")]
    split_point_1: Option<usize>,
    /// First layer behind the trunk [default: what the server has]; another one is an error.
    #[arg(long, value_name = "LAYER")]
    split_point_2: Option<usize>,
    /// The trunk server's host.
    #[arg(long, value_name = "HOST", default_value = "localhost")]
    server_host: String,
    /// The trunk server's port.
    #[arg(long, value_name = "PORT", default_value_t = 50051)]
    server_port: u16,
    /// Host and port in one, such as trunk.local:50051, with https:// before it for TLS.
    #[arg(long, value_name = "URL", conflicts_with_all = ["server_host", "server_port"])]
    server: Option<String>,
    /// Shown in the server's list of sessions [default: the output directory's name].
    #[arg(long, value_name = "NAME")]
    session_name: Option<String>,
    #[command(flatten)]
    connection: ConnectionArgs,
}

impl ModelArgs {
    /// What the trainer takes; the session is named after `output_dir` unless it has a name.
    pub fn into_options(self, output_dir: &Path) -> anyhow::Result<ModelOptions> {
        let server = self.server.unwrap_or_else(|| address(&self.server_host, self.server_port));
        let usual = ClientOptions { retry: TRAINING_RETRY, ..ClientOptions::default() };
        Ok(ModelOptions {
            name: self.model_name,
            model_type: self.model_type,
            split_point_1: self.split_point_1,
            split_point_2: self.split_point_2,
            server,
            client: self.connection.options(usual)?,
            session_name: self.session_name.unwrap_or_else(|| last_part(output_dir)),
        })
    }
}

/// An IPv6 address needs brackets before a port.
pub fn address(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

fn last_part(dir: &Path) -> String {
    let whole = std::path::absolute(dir).unwrap_or_else(|_| dir.into());
    whole.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
