use crate::connection_args::ConnectionArgs;
use crate::train::model_args::address;
use clap::Args;
use offshoot_client::{Client, ClientOptions};

/// The server that a command is about.
#[derive(Args, Debug)]
#[command(next_help_heading = "Server")]
pub struct PlaceArgs {
    /// The trunk server, such as trunk.local:50051, with https:// before it for TLS.
    #[arg(long, value_name = "URL", conflicts_with_all = ["server_host", "server_port"])]
    server: Option<String>,
    /// The trunk server's host.
    #[arg(long, value_name = "HOST", default_value = "localhost")]
    server_host: String,
    /// The trunk server's port.
    #[arg(long, value_name = "PORT", default_value_t = 50051)]
    server_port: u16,
    #[command(flatten)]
    connection: ConnectionArgs,
}

impl PlaceArgs {
    /// Where it is.
    pub fn address(&self) -> String {
        self.server.clone().unwrap_or_else(|| address(&self.server_host, self.server_port))
    }

    /// How it is reached.
    pub fn options(&self) -> anyhow::Result<ClientOptions> {
        self.connection.options(ClientOptions::default())
    }

    /// The same for what needs no token.
    pub fn without_token(&self) -> ClientOptions {
        self.connection.without_token(ClientOptions::default())
    }

    /// A connection to it.
    pub async fn connect(&self) -> anyhow::Result<Client> {
        Ok(Client::connect_with(&self.address(), self.options()?).await?)
    }
}
